"""What a run says of its model: the actor alone, whatever hangs on it."""

import pytest
from peft import LoraConfig, get_peft_model

import dpo_runs
import ppo_runs
import tiny
from trl_ext.ppo.roles.adapters import CRITIC, REWARD
from trl_ext.runs.facts import ATTACHED, model_facts


@pytest.mark.parametrize("role", [CRITIC, REWARD])
def test_parameters_are_the_actors(role):
    actor = tiny.tiny_actor()
    alone = model_facts(actor)
    setattr(actor, role, tiny.tiny_reward_model())
    assert model_facts(actor) == alone
    assert role in ATTACHED


@pytest.mark.parametrize("trainer_of", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
def test_adapter_that_is_the_reference_is_not_counted(tmp_path, trainer_of):
    """The trained adapter's parameters are counted before the trainer copies it."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["k_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny.tiny_actor(), config)
    trained, total = model.get_nb_trainable_parameters()
    trainer = trainer_of(tmp_path, {"model": model, "ref_model": None})
    assert set(model.peft_config) == {"default", "ref"}
    facts = model_facts(trainer.model)
    assert facts["parameters"] == f"{total:,}"
    assert facts["trained"].endswith(f"; {trained:,} of {total:,} parameters")
