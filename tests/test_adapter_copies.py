"""A copy of an adapter computes what the adapter computes, wherever its kind keeps its weights."""

import pytest
import torch
from peft import HRAConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model

import dpo_runs
import tiny
from trl_ext.ppo.adapters import copy_adapter


KINDS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
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


@pytest.mark.parametrize("kind", ["VeRA", "IA3"])
def test_reference_of_dpo_is_a_whole_copy_of_the_adapter(tmp_path, kind):
    model = adapted(kind)
    before = model(input_ids=IDS).logits.detach()
    dpo_runs.dpo_trainer(tmp_path, {"model": model, "ref_model": None})
    assert "add_adapter" not in vars(model)
    assert_copied(model, before)
