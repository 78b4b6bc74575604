"""A copy of an adapter computes the same, wherever its kind keeps its weights."""

import pytest
import torch
from peft import AdaLoraConfig, HRAConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model

import dpo_runs
import ppo_runs
import tiny
from trl_ext.ppo.roles.adapters import copy_adapter


KINDS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=2, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=["q_proj"]),
    "PiSSA": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "DoRA": lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "VeRA": lambda: VeraConfig(r=2, target_modules=["q_proj"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=["q_proj"]),
    "HRA": lambda: HRAConfig(r=2, target_modules=["q_proj"]),
}
IDS = torch.tensor([[4, 9, 8, 7, 6]])


def adapted(kind):
    """A tiny model whose adapter "default" does something."""
    model = get_peft_model(tiny.tiny_actor(), KINDS[kind]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def assert_copied(model, before):
    assert not any(p.requires_grad for name, p in model.named_parameters() if "ref" in name.split("."))
    assert torch.equal(model.eval()(input_ids=IDS).logits, before)
    model.set_adapter("ref", inference_mode=True)
    assert torch.equal(model(input_ids=IDS).logits, before)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_every_kind_of_adapter_is_whole(kind):
    model = adapted(kind)
    before = model(input_ids=IDS).logits.detach()
    copy_adapter(model, "default", "ref")
    assert_copied(model, before)


@pytest.mark.parametrize("kind", ["AdaLoRA", "PiSSA", "VeRA", "IA3"])
def test_reference_of_dpo_is_a_whole_copy_of_the_adapter(tmp_path, kind):
    model = adapted(kind)
    before = model(input_ids=IDS).logits.detach()
    dpo_runs.dpo_trainer(tmp_path, {"model": model, "ref_model": None})
    assert "add_adapter" not in vars(model)
    assert_copied(model, before)


def with_biases(folder, trainer, starts_from_an_adapter, **others):
    """A run whose LoRA trains the base's biases."""
    model, config = tiny.tiny_actor(attention_bias=True), LoraConfig(r=2, bias="lora_only", task_type="CAUSAL_LM")
    given = {"model": get_peft_model(model, config)} if starts_from_an_adapter else {"model": model}
    return trainer(folder, given | ({} if starts_from_an_adapter else {"peft_config": config}) | others)


@pytest.mark.parametrize("trainer", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
@pytest.mark.parametrize("starts_from_an_adapter", [True, False])
def test_base_whose_biases_are_trained_is_no_reference(tmp_path, trainer, starts_from_an_adapter):
    """The adapter can be switched off; the trained biases would stay."""
    with pytest.raises(ValueError, match=r"bias.* pass a `ref_model`"):
        with_biases(tmp_path, trainer, starts_from_an_adapter, ref_model=None)
    with_biases(tmp_path, trainer, starts_from_an_adapter, ref_model=tiny.tiny_actor(attention_bias=True))


@pytest.mark.parametrize("trainer", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
def test_base_that_is_unfrozen_beside_the_adapter_is_no_reference(tmp_path, trainer):
    model = get_peft_model(tiny.tiny_actor(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 parameters of the base .* first is .*embed_tokens\.weight\. The reference"
    ):
        trainer(tmp_path, {"model": model, "ref_model": None})
