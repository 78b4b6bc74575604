"""What a run says of its model: the actor alone, whatever hangs on it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import dpo_runs
import ppo_runs
import tiny
from trl_ext.ppo.roles.adapters import CRITIC, REWARD
from trl_ext.runs.facts import model_facts


@pytest.mark.parametrize("role", [CRITIC, REWARD])
def test_parameters_are_the_actors(role):
    """Also where a role stands on the actor's base, and its own parameters have other names than LoRA's."""
    on_base = torch.nn.Module()
    adapter = get_peft_model(tiny.tiny_actor(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    on_base.base, on_base.token_deltas = adapter.get_base_model().model, torch.nn.Linear(16, 3)
    for actor, attached in ((tiny.tiny_actor(), tiny.tiny_reward_model()), (adapter, on_base)):
        alone = model_facts(actor)
        actor.add_module(role, attached)
        assert model_facts(actor) == alone


@pytest.mark.parametrize("trainer_of", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
def test_adapter_that_is_the_reference_is_not_counted(tmp_path, trainer_of):
    """The trained adapter's parameters are counted before the trainer copies it."""
    modules = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["k_proj"]}
    model = get_peft_model(tiny.tiny_actor(), LoraConfig(r=2, task_type="CAUSAL_LM", **modules))
    trained, total = model.get_nb_trainable_parameters()
    trainer = trainer_of(tmp_path, {"model": model, "ref_model": None})
    assert set(model.peft_config) == {"default", "ref"}
    facts = model_facts(trainer.model)
    assert facts["parameters"] == f"{total:,}"
    assert facts["trained"].endswith(f"; {trained:,} of {total:,} parameters")
