"""DPO's reference given by path, and in 4 or 8 bits."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dpo_runs
import tiny
from dpo_runs import dpo_run, dpo_trainer, lines, slow_logps, tiny_model


# bitsandbytes' kernels for some CPUs want layers in multiples of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
BY_HAND = {
    "4bit": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of a policy and of another model that can be its reference."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in {"policy": 0, "reference": 1}.items():
        tiny_model(seed=seed, **SIZES).save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("policy", "reference")}


def layers_of(model):
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}


@pytest.mark.integration
def test_reference_given_by_path_is_the_model_in_that_folder(tmp_path, paths):
    by_path = dpo_run(tmp_path / "path", {"ref_model": paths["reference"]})
    in_memory = dpo_run(tmp_path / "memory", {"ref_model": tiny_model(seed=1, **SIZES)})
    for one, other in zip(lines(by_path), lines(in_memory), strict=True):
        assert one["loss"] == other["loss"]
        assert one["logps/chosen"] == other["logps/chosen"]


@pytest.mark.integration
@pytest.mark.parametrize("bits", LAYERS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "copy of the policy"])
def test_rewards_are_against_the_reference_in_fewer_bits(tmp_path, paths, bits, given):
    models = {"model": paths["policy"], "ref_model": paths["reference"] if given else None}
    trainer = dpo_run(tmp_path, models, ref_model_quantization=bits, max_steps=1, per_device_train_batch_size=8)
    assert layers_of(trainer.ref_model) == {LAYERS[bits], "Linear"}
    assert layers_of(trainer.model) == {"Linear"}
    policy = tiny_model(**SIZES)
    reference = AutoModelForCausalLM.from_pretrained(
        paths["reference" if given else "policy"], dtype=torch.float32, quantization_config=BY_HAND[bits]
    ).eval()
    (line,) = lines(trainer)
    for side in ("chosen", "rejected"):
        rewards = [
            trainer.beta
            * (
                slow_logps(policy, row["prompt_ids"], row[f"{side}_ids"])
                - slow_logps(reference, row["prompt_ids"], row[f"{side}_ids"])
            )
            for row in trainer.train_dataset
        ]
        assert line[f"rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), rel=5e-2, abs=1e-2)
    assert line["rewards/margins"] != 0.0


@pytest.mark.integration
def test_policy_in_memory_is_copied_from_its_folder(tmp_path, paths):
    """As TRL does for a reference in full precision."""
    policy = AutoModelForCausalLM.from_pretrained(paths["policy"], dtype=torch.float32)
    trainer = dpo_trainer(tmp_path, {"model": policy, "ref_model": None}, ref_model_quantization="4bit")
    assert layers_of(trainer.ref_model) == {"Linear4bit", "Linear"}


REFUSED = {
    "reference in memory": ({"ref_model": tiny_model(seed=1)}, {}, "`ref_model` is a LlamaForCausalLM in memory"),
    "policy from no folder": (
        {"model": tiny_model(), "ref_model": None},
        {},
        "`model` is a LlamaForCausalLM in memory",
    ),
    "adapter": (
        {"ref_model": None, "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")},
        {},
        "nothing to quantise: the reference is the policy under another adapter or none",
    ),
    "precomputed": (
        {"ref_model": None},
        {"precompute_ref_log_probs": True},
        "with `precompute_ref_log_probs` the policy itself is the reference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_quantisation_without_a_reference_to_load_is_refused(tmp_path, paths, case):
    models, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, {"model": paths["policy"]} | models, ref_model_quantization="4bit", **options)


def test_reference_of_another_vocabulary_is_refused_before_it_is_loaded(tmp_path, paths):
    tiny.tiny_config(vocab_size=80).save_pretrained(tmp_path / "other")  # a config without weights
    for other in (str(tmp_path / "other"), tiny_model(vocab_size=80)):
        with pytest.raises(ValueError, match=r"64 tokens and `ref_model` one of 80.* that the policy\s+started from"):
            dpo_trainer(tmp_path, {"ref_model": other})


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_reward_model_as_policy_or_reference_is_refused(tmp_path, paths, role):
    tiny.tiny_reward_model().save_pretrained(tmp_path / "scores")
    with pytest.raises(
        ValueError, match=r"scores' \(`(ref_)?model`\) holds a LlamaForSequenceClassification, which scores text"
    ):
        dpo_trainer(tmp_path, {role: str(tmp_path / "scores")})


def test_reference_that_is_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter without its base model"):
        dpo_runs.dpo_trainer(tmp_path, {"ref_model": str(tmp_path / "adapter")})
