"""A run that starts from a saved adapter: it equals the run from the same `PeftModel`, and names what is wrong."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import dpo_runs
import four_roles
import ppo_runs
import tiny
from trl_ext._trl import create_model_from_path
from trl_ext.dpo import trainer as dpo_trainer
from trl_ext.models import merging
from trl_ext.models import saved_adapter as module
from trl_ext.models.saved_adapter import adapter_folder


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return four_roles.prepare(tmp_path_factory.mktemp("saved"))


def in_memory(paths, quantization=None):
    base = AutoModelForCausalLM.from_pretrained(paths["base"], quantization_config=quantization)
    return PeftModel.from_pretrained(base, paths["start"], is_trainable=True)


OF_THE_MACHINE = ("time/", "step_time", "train_", "tokens_per", "memory/")


def trained(trainer):
    """Log lines without times, and every weight that is trained."""
    trainer.train()
    kept = [
        {key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)}
        for line in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return kept, weights


def assert_same_run(runs, make, one, other):
    """Make and train the trainers of two sets of models; return the first."""
    first = make(runs / "1", one)
    lines, weights = trained(first)
    expected, expected_weights = trained(make(runs / "2", other))
    assert str(lines) == str(expected)  # NaN equals itself
    assert weights.keys() == expected_weights.keys()
    assert any("lora_" in name for name in weights)
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    return first


@pytest.mark.parametrize("critic, bits", [("model", None), ("head", four_roles.NF4), ("adapter", four_roles.NF4)])
def test_ppo_from_a_folder_is_ppo_from_the_model_to_the_last_bit(tmp_path, paths, critic, bits):
    judge = {"reward_model": paths["reward"]} if critic == "adapter" else {}
    folder = {"model": paths["start"], "processing_class": None, "quantization_config": bits}
    make = partial(ppo_runs.ppo_trainer, critic=critic)
    trainer = assert_same_run(tmp_path, make, folder | judge, {"model": in_memory(paths, bits)} | judge)
    first, second = ppo_runs.logged(trainer, "kl/ref")
    assert first == 0.0
    assert second != 0.0


@pytest.mark.parametrize("bits", [None, four_roles.NF4], ids=["float32", "4 bits"])
def test_dpo_from_a_folder_is_dpo_from_the_model_to_the_last_bit(tmp_path, paths, bits):
    folder = {"model": paths["start"], "ref_model": None, "processing_class": None, "quantization_config": bits}
    in_python = {"model": in_memory(paths, bits), "ref_model": None}
    first, second = dpo_runs.lines(assert_same_run(tmp_path, dpo_runs.dpo_trainer, folder, in_python))
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert second["rewards/chosen"] != 0.0


def test_mutant_without_the_adapter_is_seen(tmp_path, paths, monkeypatch):
    """The oracle above fails where the base alone is loaded under a fresh adapter of the same config."""

    def fresh(base, folder):
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        return module.PeftModel(base, config)

    monkeypatch.setattr(module, "put_on", fresh)
    models = [{"model": given, "ref_model": None} for given in (paths["start"], in_memory(paths))]
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, dpo_runs.dpo_trainer, *models)


def resumed(runs, make):
    """Train for three steps, and again from the checkpoint of the second, without a model but the start's."""
    straight = make(runs / "1")
    straight.train()
    again = make(runs / "2")
    again.train(resume_from_checkpoint=str(runs / "1" / "checkpoint-2"))
    return straight, again


def assert_same_end(straight, again):
    pairs = list(zip(straight.model.named_parameters(), again.model.named_parameters(), strict=True))
    assert len({name.split(".")[-2] for (name, _), _ in pairs} & {"default", "ref"}) == 2
    for (name, weight), (other, value) in pairs:
        assert name == other
        assert weight.dtype == value.dtype, name
        assert torch.equal(weight, value), name
    lines = [next(line for line in run.state.log_history if line.get("step") == 3) for run in (straight, again)]
    assert lines[0]["loss"] == lines[1]["loss"]
    assert lines[0]["grad_norm"] == lines[1]["grad_norm"]


SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
RESUMED = {
    "dpo": lambda paths, to: dpo_runs.dpo_trainer(
        to, {"model": paths["start"], "ref_model": None, "quantization_config": four_roles.NF4}, **SAVES
    ),
    "ppo": lambda paths, to: ppo_runs.ppo_trainer(
        to,
        {"model": paths["start"], "reward_model": paths["reward"], "quantization_config": four_roles.NF4},
        critic="adapter",
        **SAVES,
    ),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_run_from_an_adapter_in_4_bits_is_resumed_to_the_last_bit(tmp_path, paths, kind):
    assert_same_end(*resumed(tmp_path, partial(RESUMED[kind], paths)))


def test_mutant_that_resumes_as_peft_loads_is_seen(tmp_path, paths, monkeypatch):
    """PEFT casts what it loads to float32, where the run had trained it in bfloat16."""
    monkeypatch.setattr(dpo_trainer, "restore_adapters", lambda model, folder: model.load_adapter(folder, "default"))
    with pytest.raises((AssertionError, ValueError)):
        assert_same_end(*resumed(tmp_path, partial(RESUMED["dpo"], paths)))


WIDER = {  # options of the adapter, which is saved with 70 rows where the base has 64
    "saved beside": {},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "single tokens": {"trainable_token_indices": {"embed_tokens": [5, 69]}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WIDER)
def test_adapter_saved_with_a_wider_embedding_is_loaded_onto_one(tmp_path, paths, case):
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    base.resize_token_embeddings(70)
    trained = ("lora_B", "lora_embedding_A", "magnitude", "tokens_delta")
    model = four_roles.fill(get_peft_model(base, four_roles.lora(**WIDER[case])), 4, of=trained)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    ids = torch.tensor([[5, 69, 3]])
    expected = model.eval()(ids).logits[..., :64]  # PEFT may leave out the new rows of the output layer
    narrow = create_model_from_path(paths["base"])
    assert narrow.get_input_embeddings().num_embeddings == 64
    before = torch.get_rng_state()
    assert torch.equal(module.put_on(narrow, str(tmp_path)).eval()(ids).logits[..., :64], expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module.load_writer(str(tmp_path)).eval()(ids).logits[..., :64], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_of_one_of_two_tied_layers_is_merged_into_that_one(tmp_path, target, monkeypatch):
    tiny.tiny_actor(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = four_roles.lora(target_modules=["q_proj", target])
    model = four_roles.fill(get_peft_model(base, config), 4, of=("lora_B", "lora_embedding_A"))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 3]])
    expected = model.eval()(ids).logits

    def error(to):
        folder = str(tmp_path / "adapter")
        merging.merge_adapter(folder, PeftConfig.from_pretrained(folder), torch.float32).save_pretrained(to)
        return (AutoModelForCausalLM.from_pretrained(to)(ids).logits - expected).abs().max()

    assert error(tmp_path / "merged") < 1e-5
    monkeypatch.setattr(merging, "_untie_adapted", lambda model: None)
    assert error(tmp_path / "mutant") > 0.1


def test_chat_template_beside_an_adapter_without_a_tokenizer_is_read(tmp_path, paths):
    folder = copied(paths, tmp_path / "adapter")
    for file in Path(folder).glob("*token*"):
        file.unlink()
    (Path(folder) / "chat_template.jinja").write_text("its own")
    saved = module.saved_adapter(folder, dpo_runs.dpo_config(tmp_path))
    assert saved.processing_class().chat_template == module.load_tokenizer(folder).chat_template == "its own"


def copied(paths, folder, **changes):
    """The adapter with other words in its config; `None` removes one."""
    shutil.copytree(paths["start"], folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def other_base(paths, folder):
    tiny.tiny_actor(9).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return copied(paths, folder / "adapter", base_model_name_or_path=str(folder))


REFUSED = {
    "a new adapter on top": (lambda paths, _: (paths["start"], {"peft_config": four_roles.lora()}), "`trl-ext merge"),
    "an adapter that scores": (lambda paths, _: (paths["reward"], {}), "task type SEQ_CLS, which scores text"),
    "no base": (lambda paths, to: (copied(paths, to, base_model_name_or_path=None), {}), "does not say what it was"),
    "a base that is gone": (
        lambda paths, to: (copied(paths, to, base_model_name_or_path="/gone/far/away"), {}),
        r"There is no folder '/gone/far/away' \(the base of the adapter .*write where the base is into",
    ),
    "an adapter as its base": (
        lambda paths, to: (copied(paths, to, base_model_name_or_path=paths["start"]), {}),
        "an adapter itself. Merge that one first",
    ),
    "another base": (lambda paths, to: (other_base(paths, to), {}), "was trained on other weights than those in"),
    "a file of no adapter": (
        lambda paths, to: (copied(paths, to, peft_type="FOO"), {}),
        "cannot be read by this vers",
    ),
    "virtual tokens": (
        lambda paths, to: (copied(paths, to, peft_type="PROMPT_TUNING", num_virtual_tokens=3), {}),
        r"learns virtual tokens \(PROMPT_TUNING\)",
    ),
    "biases of the base": (lambda paths, to: (copied(paths, to, bias="all"), {}), "has `bias='all'`"),
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # of PEFT, for a config of two kinds
@pytest.mark.parametrize("case", REFUSED)
def test_adapter_that_cannot_be_trained_on_is_refused_before_it_is_loaded(tmp_path, paths, case, monkeypatch):
    monkeypatch.setattr(module, "create_model_from_path", None)
    make, message = REFUSED[case]
    model, more = make(paths, tmp_path / "given")
    for run, reference in ((ppo_runs.ppo_trainer, {}), (dpo_runs.dpo_trainer, {"ref_model": None})):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", {"model": model} | more | reference)


@pytest.mark.parametrize("changes", [{"target_modules": ["c_attn"]}, {"r": 5}])
def test_adapter_that_does_not_fit_its_base_is_said_in_a_line(tmp_path, paths, changes):
    with pytest.raises(ValueError, match=r"does not fit .*actor: .*Give the adapter as it was saved"):
        module.load_writer(copied(paths, tmp_path / "given", **changes))


def test_adapter_from_a_folder_has_no_other_name(tmp_path, paths):
    with pytest.raises(ValueError, match=r"`model_adapter_name` is 'policy'.*is named 'default'"):
        ppo_runs.ppo_trainer(tmp_path, {"model": paths["start"]}, model_adapter_name="policy")


@pytest.mark.parametrize("case", ["an adapter as its base", "another base"])
def test_writer_stands_on_the_base_that_it_was_trained_on(tmp_path, paths, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        module.require_writer(make(paths, tmp_path / "given")[0], "--model")


def test_adapter_of_the_hub_is_downloaded_without_its_checkpoints(paths, monkeypatch):
    asked = {}

    def download(name, revision, ignore_patterns):
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return paths["start"]

    monkeypatch.setattr(module, "snapshot_download", download)
    monkeypatch.setattr(module, "find_adapter_config_file", lambda name, revision: name == "me/adapter" or None)
    assert adapter_folder("me/adapter", "v2") == paths["start"]
    assert asked == {"name": "me/adapter", "revision": "v2", "ignored": ["*/*"]}
    assert adapter_folder("me/model") is None
    assert adapter_folder(str(Path(paths["start"]))) == paths["start"]
    assert adapter_folder(paths["base"]) is None


def test_revision_of_an_adapter_is_not_that_of_its_base(paths, tmp_path):
    saved = module.saved_adapter(paths["start"], dpo_runs.dpo_config(tmp_path))
    args = dpo_runs.dpo_config(tmp_path, model_init_kwargs={"revision": "v2", "dtype": "float32"})
    assert saved.args_of_base(args).model_init_kwargs == {"dtype": "float32"}
    assert args.model_init_kwargs["revision"] == "v2"
    saved.config.revision = "base-3"
    assert saved.args_of_base(args).model_init_kwargs == {"dtype": "float32", "revision": "base-3"}
