"""Adapters that cannot make a run: what the error says, and that it comes before any weights are loaded."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import four_roles
import tiny
from fake_vllm import vllm
from ppo_runs import ppo_config, ppo_trainer
from trl_ext.ppo.roles.adapter_checks import check_adapters


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The folders of `four_roles`, and some that do not fit them."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = four_roles.prepare(folder)
    tiny.tiny_actor(8).save_pretrained(folder / "other")
    tiny.tiny_tokenizer().save_pretrained(folder / "other")
    paths["reward_model"] = str(folder / "reward_model")
    paths["other"] = str(folder / "other")
    paths["of other"] = four_roles.save_adapter(paths["other"], folder / "of_other", "SEQ_CLS", 1)
    paths["no head"] = four_roles.save_adapter(paths["base"], folder / "no_head", "CAUSAL_LM", 1)
    config = folder / "no_head" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
    return paths


@pytest.fixture(scope="module")
def without_weights(paths, tmp_path_factory):
    """The base without its weights, so that loading it would raise another error."""
    folder = tmp_path_factory.mktemp("weightless") / "base"
    shutil.copytree(paths["base"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def adapter(**options):
    return {"peft_config": four_roles.lora(**options)}


# Arguments of the trainer and what the error says; a value is a folder of `paths`, where it has that name.
BEFORE_LOADING = {
    "head adapted": (
        adapter(target_modules=["q_proj", "lm_head"]),
        "changes `lm_head`.*Leave it out of `--lora_target_modules`.*trl-ext merge",
    ),
    "head by a pattern": (adapter(target_modules=r".*(q_proj|lm_head)"), "changes `lm_head`"),
    "head trained in full": (adapter(modules_to_save=["lm_head"]), "changes `lm_head`"),
    "task of the actor": (adapter(task_type="SEQ_CLS"), "actor's adapter has task type SEQ_CLS; .* CAUSAL_LM"),
    "critic without an adapter": ({"critic": "adapter"}, "`critic='adapter'` .* pass a `peft_config`"),
    "critic of a model": (
        adapter() | {"critic": "adapter", "value_model": "base"},
        "continues from the folder of an adapter with a score head, .* `value_model` is '.*actor'",
    ),
    "critic of an object": (
        adapter() | {"critic": "adapter", "value_model": tiny.tiny_reward_model()},
        "`value_model` is LlamaForSequenceClassification. Give such a folder",
    ),
    "task of the critic": (
        adapter() | {"critic": "adapter", "value_model": "start"},
        "an adapter of task type CAUSAL_LM",
    ),
    "task of the reward": (adapter() | {"reward_model": "start"}, "an adapter of task type CAUSAL_LM, .* has SEQ_CLS"),
    "reward on a moving base": ({"reward_model": "reward"}, "adapter without its base.* the actor a `peft_config`"),
    "reward adapter as actor": ({"model": "reward"}, r"\(`model`\) holds an adapter of task type SEQ_CLS"),
    "reward adapter as reference": ({"ref_model": "reward"}, r"\(`ref_model`\) .* SEQ_CLS, which scores text"),
    "critic adapter as a whole": ({"value_model": "reward"}, "without its base model. Set `critic='adapter'`"),
    "reward without a head": (adapter() | {"reward_model": "no head"}, r"\(`reward_model`\) has no score head"),
    "trained biases": (adapter(bias="all") | {"reward_model": "reward"}, "`bias='all'`, which changes the base"),
    "base changed at the start": (
        adapter(init_lora_weights="pissa") | {"critic": "adapter"},
        "`init_lora_weights='pissa'`",
    ),
}


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_error_comes_before_any_weights_are_loaded(tmp_path, paths, without_weights, case):
    arguments, message = BEFORE_LOADING[case]
    arguments = {name: paths.get(v, v) if isinstance(v, str) else v for name, v in arguments.items()}
    options = {"critic": arguments.pop("critic", "head")}
    if "value_model" in arguments and options["critic"] == "head":
        options["critic"] = "model"
    given = {"model": without_weights, "reward_model": paths["reward_model"]} | arguments
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, given, **options)


def test_control_fitting_adapters_pass_the_checks_and_the_base_fails_to_load(tmp_path, paths, without_weights):
    given = adapter() | {"model": without_weights, "reward_model": paths["reward"]}
    with pytest.raises(OSError, match="no file named"):
        ppo_trainer(tmp_path, given, critic="adapter")


def test_reward_adapter_of_two_labels_is_refused(tmp_path, paths):
    folder = tmp_path / "two_labels"
    shutil.copytree(paths["reward"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = torch.zeros(2, 16)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="score head with 2 labels; a response gets one score"):
        ppo_trainer(tmp_path, four_roles.models(paths, reward_model=str(folder)))


# --- the base


@pytest.mark.parametrize("role", ["reward_model", "value_model"])
@pytest.mark.parametrize("written", [True, False], ids=["fingerprint", "named folder"])
def test_adapter_trained_on_another_base_is_an_error(tmp_path, paths, role, written):
    folder = tmp_path / "of_other"
    shutil.copytree(paths["of other"], folder)
    if not written:
        (folder / "base_model.json").unlink()
    given = four_roles.models(paths) | {role: str(folder)}
    with pytest.raises(
        ValueError, match=rf"\(`{role}`\) was trained on other weights than .* Train it on the actor's"
    ):
        ppo_trainer(tmp_path, given, critic="adapter")


def test_base_under_another_name_is_the_same_base(tmp_path, paths):
    moved = tmp_path / "moved"
    shutil.copytree(paths["base"], moved)
    ppo_trainer(tmp_path, four_roles.models(paths) | {"model": str(moved)}, critic="adapter")


def test_other_weights_under_the_same_name_are_another_base(tmp_path, paths):
    base = tmp_path / "base"
    shutil.copytree(paths["base"], base)
    reward = four_roles.save_adapter(str(base), tmp_path / "reward", "SEQ_CLS", 1)
    tiny.tiny_actor(9).save_pretrained(base)
    with pytest.raises(ValueError, match="trained on other weights"):
        ppo_trainer(
            tmp_path, four_roles.models(paths) | {"model": str(base), "reward_model": reward}, critic="adapter"
        )


def test_base_that_cannot_be_compared_is_warned_about_once(tmp_path, paths, caplog):
    """An adapter made elsewhere: neither a fingerprint nor the folder that it was trained on."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(paths["reward"], folder)
    (folder / "base_model.json").unlink()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "some/where"}))
    ppo_trainer(
        tmp_path, four_roles.models(paths, quantization=None) | {"reward_model": str(folder)}, critic="adapter"
    )
    lines = [
        record.message for record in caplog.records if "was trained on the actor's base is unknown" in record.message
    ]
    assert len(lines) == 1
    assert "has no base_model.json" in lines[0]


def test_control_known_bases_are_not_warned_about(tmp_path, paths, caplog):
    ppo_trainer(tmp_path, four_roles.models(paths, quantization=None), critic="adapter")
    assert "is unknown" not in caplog.text


# --- what is seen in the models alone


def test_reward_adapter_with_another_tokenizer_is_an_error(tmp_path, paths):
    folder = tmp_path / "own_tokenizer"
    shutil.copytree(paths["reward"], folder)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="trained with another tokenizer than the actor's"):
        ppo_trainer(tmp_path, four_roles.models(paths, quantization=None) | {"reward_model": str(folder)})


@pytest.mark.parametrize("name", ["critic", "reward_model"])
def test_name_of_the_actors_adapter_is_not_that_of_another_role(tmp_path, paths, name):
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    model = PeftModel.from_pretrained(base, paths["start"], is_trainable=True, adapter_name=name)
    given = four_roles.models(paths) | {"model": model}
    del given["peft_config"], given["quantization_config"]
    with pytest.raises(ValueError, match=f"actor's adapter is named '{name}'"):
        ppo_trainer(tmp_path, given, critic="adapter")


def test_head_of_a_model_in_memory_is_found_by_its_own_name(tmp_path, paths):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="changes `lm_head`"):
        ppo_trainer(tmp_path, {"model": get_peft_model(tiny.tiny_actor(), config)})


def test_a_reward_adapter_is_not_quantised_by_itself(tmp_path, paths):
    with pytest.raises(ValueError, match=r"cannot quantise the adapter .* `quantization_config` sets"):
        ppo_trainer(tmp_path, four_roles.models(paths), reward_model_quantization="4bit")


def test_fsdp_is_refused_where_roles_share_weights(tmp_path, paths, monkeypatch):
    args = ppo_config(tmp_path, critic="adapter")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP cannot partition weights that several models hold"):
        check_adapters(args, paths["base"], paths["reward"], None, four_roles.lora())


def test_vllm_on_a_shared_4_bit_base_is_refused_before_it_starts(tmp_path, paths):
    said = r"on a quantised base PEFT makes new weights .* Switch `use_vllm` off"
    with vllm(), pytest.raises(ValueError, match=said):
        ppo_trainer(tmp_path, four_roles.models(paths), critic="adapter", use_vllm=True)
