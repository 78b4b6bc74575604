"""Models that are refused by their config or tokenizer, before any weights are loaded."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import dpo_runs
import ppo_runs
import tiny
from reward_runs import reward_trainer
from trl_ext import ImplicitReward, _trl
from trl_ext.dpo import reference as dpo_reference
from trl_ext.models import loading, saved_adapter
from trl_ext.models.loading import check_same_tokens
from trl_ext.ppo.roles import critic
from trl_ext.ppo.roles import load as ppo_roles


IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
MODELS = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(d_model=16, **HEADS, **IDS)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **IDS)),
}
MESSAGE = r"is an encoder-decoder \((bart|t5)\): .* trained on what it has read. Use a decoder-only model"


@pytest.fixture
def no_loading(monkeypatch):
    """Fails where weights are loaded."""

    def load(*args, **kwargs):
        raise AssertionError("weights are being loaded")

    for module in (_trl, ppo_roles, dpo_reference):
        monkeypatch.setattr(module, "create_model_from_path", load)


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


READERS = {
    "model of DPO": lambda folder, model: dpo_runs.dpo_trainer(folder, {"model": model}),
    "reference of DPO": lambda folder, model: dpo_runs.dpo_trainer(folder, {"ref_model": model}),
    "model of PPO": lambda folder, model: ppo_runs.ppo_trainer(folder, {"model": model}),
    "reference of PPO": lambda folder, model: ppo_runs.ppo_trainer(folder, {"ref_model": model}),
    "reward training": lambda folder, model: reward_trainer(folder, dpo_runs.tiny_pairs(4), None, model),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reader", READERS)
def test_encoder_decoder_is_refused_before_it_is_loaded(tmp_path, no_loading, name, reader):
    for given in (saved(MODELS[name](), tmp_path / name), MODELS[name]()):
        with pytest.raises(ValueError, match=MESSAGE):
            READERS[reader](tmp_path, given)


def test_encoder_decoder_is_refused_as_an_implicit_reward():
    for policy, reference in ((MODELS["bart"](), tiny.tiny_actor()), (tiny.tiny_actor(), MODELS["bart"]())):
        with pytest.raises(ValueError, match=MESSAGE):
            ImplicitReward(policy, reference, tiny.tiny_tokenizer())


def test_decoder_of_such_a_family_is_taken(tmp_path):
    config = BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, is_decoder=True, **IDS)
    config.is_encoder_decoder = False
    model = dpo_runs.AutoModelForCausalLM.from_config(config)
    assert dpo_runs.dpo_trainer(tmp_path, {"model": model, "ref_model": None})


def with_other_ids(folder) -> str:
    """A model of the same vocabulary whose tokenizer has the words in another order."""
    tokenizer = tiny.tiny_tokenizer()
    path = saved(tiny.tiny_actor(), folder)
    words = {token: id_ if id_ < 7 else 70 - id_ for token, id_ in tokenizer.get_vocab().items()}
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    spec = json.loads(text)
    spec["model"]["vocab"] = words
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return path


def test_reference_and_critic_of_another_tokenizer_are_refused_before_they_are_loaded(tmp_path, no_loading):
    path = with_other_ids(tmp_path / "other")
    message = r"`ref_model` was trained with another tokenizer.*5\d of 64 ids mean other tokens .*\(id 7 is 'zero'"
    with pytest.raises(ValueError, match=message):
        dpo_runs.dpo_trainer(tmp_path, {"ref_model": path})
    with pytest.raises(ValueError, match=message):
        ppo_runs.ppo_trainer(tmp_path, {"ref_model": path})
    with pytest.raises(ValueError, match=message.replace("ref_model", "value_model")):
        ppo_runs.ppo_trainer(tmp_path, {"value_model": path})


def test_tokenizers_that_add_or_rename_a_token_are_one(tmp_path):
    path = saved(tiny.tiny_actor(), tmp_path / "same")
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    args = dpo_runs.dpo_config(tmp_path)
    assert check_same_tokens(tokenizer, path, "ref_model", args) is None


@pytest.mark.parametrize(
    "role, size, options, message",
    [
        ("ref_model", 60, {}, r"of 64 tokens and `ref_model` one of 60; the actor may sample any of its ids"),
        ("ref_model", 72, {"kl_estimator": "full"}, r"of 64 tokens and `ref_model` one of 72; the exact KL sums over"),
        ("value_model", 60, {}, r"of 64 tokens and `value_model` one of 60; .*`resize_token_embeddings\(64\)`"),
    ],
)
def test_ids_that_another_role_does_not_know_are_refused_before_it_is_loaded(
    tmp_path, no_loading, role, size, options, message
):
    make = tiny.tiny_actor if role == "ref_model" else tiny.tiny_reward_model
    model = make(1, vocab_size=size)
    model.save_pretrained(tmp_path / "small")
    for given in (str(tmp_path / "small"), model):
        with pytest.raises(ValueError, match=message):
            ppo_runs.ppo_trainer(tmp_path, {role: given}, **options)


def test_larger_reference_is_fine_where_one_token_at_a_time_is_compared(tmp_path):
    assert ppo_runs.ppo_trainer(tmp_path, {"ref_model": tiny.tiny_actor(1, vocab_size=72)})


def test_reward_model_that_does_not_know_every_id_is_refused_or_reads_text(tmp_path):
    """The actor's embedding has rows beyond the tokenizer's tokens, as padded ones have; it can sample them."""
    actor, judge = tiny.tiny_actor(vocab_size=128), tiny.tiny_reward_model()
    with pytest.raises(ValueError, match=r"knows 64 tokens and the actor 128.*`reward_processing_classes`"):
        ppo_runs.ppo_trainer(tmp_path, {"model": actor, "reward_model": judge})
    models = {"model": actor, "reward_model": judge, "reward_processing_classes": tiny.tiny_tokenizer()}
    trainer = ppo_runs.ppo_trainer(tmp_path, models)
    rewards = trainer._calculate_rewards([{}], ["one two"], [" three"], [[10, 100, 2]])
    assert torch.isfinite(rewards).all()


def of_pairs(folder, tokenizer, rows):
    reward = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tokenizer)
    return reward.of_pairs(rows["prompt"], rows["chosen"], rows["rejected"])


def dpo(folder, tokenizer, rows):
    return dpo_runs.dpo_trainer(folder, {"processing_class": tokenizer, "train_dataset": rows})


def dpo_of_a_stream(folder, tokenizer, rows):
    return dpo(folder, tokenizer, rows.to_iterable_dataset()).train()


def dpo_from_a_path(folder, tokenizer, rows):
    models = {"model": saved(tiny.tiny_actor(), folder / "policy"), "ref_model": None}
    return dpo_runs.dpo_trainer(folder, models | {"processing_class": tokenizer, "train_dataset": rows})


def ppo(folder, tokenizer, rows):
    return ppo_runs.ppo_trainer(folder, {"processing_class": tokenizer, "train_dataset": rows})


def ppo_of_ids(folder, tokenizer, rows):
    return ppo(folder, tokenizer, rows.map(lambda row: tokenizer(row["prompt"])).select_columns("input_ids"))


def ppo_of_a_stream(folder, tokenizer, rows):
    return ppo_runs.ppo_trainer(
        folder, {"processing_class": tokenizer, "train_dataset": rows.to_iterable_dataset()}, max_steps=4
    ).train()


def reward_training(folder, tokenizer, rows):
    return reward_trainer(folder, rows, None, tokenizer=tokenizer)


TRAINERS = [dpo, dpo_from_a_path, dpo_of_a_stream, ppo, ppo_of_ids, ppo_of_a_stream, reward_training, of_pairs]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", TRAINERS)
def test_token_without_an_embedding_is_named(tmp_path, reader):
    """Added to the tokenizer alone, or of another model's: an embedding answers it with an error without a name."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["zebra", "gnu"])  # which are in no row yet
    rows = dpo_runs.tiny_pairs()
    reader(tmp_path / "known", tokenizer, rows)
    rows = Dataset.from_list([*rows.to_list()[:-1], rows[-1] | {"prompt": "the zebra is "}])
    with pytest.raises(ValueError, match=r"knows 64 tokens, and a .* has the id 64 \('zebra'\)\. Give the tokenizer"):
        reader(tmp_path / "unknown", tokenizer, rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", [dpo, reward_training])
def test_padding_without_an_embedding_is_refused(tmp_path, reader):
    """It would stand in the config of the model that is saved, which could not be loaded again."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match=r"knows 64 tokens, and the pad token has the id 64 \('<padding>'\)"):
        reader(tmp_path, tokenizer, dpo_runs.tiny_pairs())


@pytest.mark.parametrize("name", ["my-sfft", "./my-sfft"])
def test_misspelt_folder_is_named_before_the_hub_is_asked(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    saved(tiny.tiny_actor(), tmp_path / "my-sft")
    (tmp_path / "my-sffo").mkdir()  # no model
    for module, asks in ((saved_adapter, "find_adapter_config_file"), (loading.PretrainedConfig, "get_config_dict")):
        monkeypatch.setattr(module, asks, None)
    assert saved_adapter.adapter_folder(name) is None
    with pytest.raises(ValueError, match=r"no folder .*my-sfft' \(`--model`\)\. Did you mean `--model my-sft`"):
        loading.require_model(name, "--model")


def test_name_of_a_model_in_the_hubs_cache_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tiny.tiny_actor(), tmp_path / "gpt2")
    assert loading.near_folder("gpt-2") == "gpt2"
    assert loading.near_folder("gpt2-large") is None
    assert loading.near_folder("gpt2") is None
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_, **__: "cached/config.json")
    assert loading.near_folder("gpt-2") is None


ROLES = {"actor": tiny.tiny_actor, "reference": tiny.tiny_actor, "critic": tiny.tiny_reward_model}


def test_revision_is_that_of_the_policy_alone(tmp_path, monkeypatch):
    asked, load = {}, _trl.create_model_from_path

    def note(path, **kwargs):
        asked[path.rstrip("/").split("/")[-1]] = kwargs.get("revision")
        return load(path, **kwargs)

    for module in (ppo_roles, dpo_reference, critic):
        monkeypatch.setattr(module, "create_model_from_path", note)
    paths = {name: saved(make(), tmp_path / name) for name, make in ROLES.items()}
    options = {"model_init_kwargs": {"revision": "v2"}}
    ppo_runs.ppo_trainer(tmp_path / "ppo", {"model": paths["actor"], "ref_model": paths["reference"]}, **options)
    ppo_runs.ppo_trainer(tmp_path / "ppo", {"value_model": paths["critic"]}, **options)
    dpo_runs.dpo_trainer(tmp_path / "dpo", {"ref_model": paths["reference"]}, **options)
    assert asked == {"actor": "v2", "reference": None, "critic": None}
