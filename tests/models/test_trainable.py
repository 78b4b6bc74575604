"""Runs that would train nothing are refused by all three trainers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import dpo_runs
import ppo_runs
import tiny
from reward_runs import reward_trainer
from trl_ext.models.trainable import check_optimizer, check_trainable


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def merged(folder):
    return get_peft_model(tiny.tiny_actor(), LORA).merge_and_unload()


def loaded_frozen(folder):
    get_peft_model(tiny.tiny_actor(), LORA).save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny.tiny_actor(), folder / "adapter")


FROZEN = {"merged": merged, "adapter loaded for inference": loaded_frozen}


TRAINERS = {"policy": dpo_runs.dpo_trainer, "actor": ppo_runs.ppo_trainer}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("role", TRAINERS)
def test_model_without_a_trainable_parameter_is_refused(tmp_path, role, kind):
    with pytest.raises(ValueError, match=rf"No parameter of the {role} requires a gradient.*is_trainable=True"):
        TRAINERS[role](tmp_path / "out", {"model": FROZEN[kind](tmp_path), "ref_model": None})


def test_optimizer_without_a_trained_parameter_is_refused():
    model = tiny.tiny_actor()
    trained = check_trainable(model, "policy")
    assert len(trained) == len(list(model.parameters()))
    held = [parameter for name, parameter in model.named_parameters() if name != "lm_head.weight"]
    check_optimizer(torch.optim.SGD(trained, lr=0.1), {"policy": trained}, "")
    with pytest.raises(ValueError, match=r"does not hold 1 of the policy's 21 trained parameters.*Give it all"):
        check_optimizer(torch.optim.SGD(held, lr=0.1), {"policy": trained}, "Give it all.")


@pytest.mark.integration
def test_optimizer_of_another_model_is_refused_by_dpo(tmp_path):
    optimizer = torch.optim.SGD(dpo_runs.tiny_model(seed=3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"The optimizer in `optimizers` does not hold 21 of the policy's 21"):
        dpo_runs.dpo_trainer(tmp_path, {"optimizers": (optimizer, None)})


def with_unread_parameter(checkpointing):
    """A model of which only a table is trained that its forward pass does not read."""
    model = tiny.tiny_actor().requires_grad_(False)
    model.add_module("unread", torch.nn.Embedding(4, 4))
    if checkpointing:  # then the loss requires a gradient all the same
        model.enable_input_require_grads()
    return model


@pytest.mark.integration
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parameters_that_get_no_gradient_stop_dpo_before_the_first_step(tmp_path, checkpointing):
    options = {"gradient_checkpointing": checkpointing, "packing": False}
    trainer = dpo_runs.dpo_trainer(
        tmp_path, {"model": with_unread_parameter(checkpointing), "ref_model": None}, **options
    )
    with pytest.raises(ValueError, match="The loss depends on none of the policy's 1 trained parameters"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.integration
def test_actor_that_gets_no_gradient_beside_its_critic_stops_ppo(tmp_path):
    """The critic's share of the loss has a gradient, so that nothing else would tell."""
    trainer = ppo_runs.ppo_trainer(tmp_path, {"model": with_unread_parameter(False)})
    with pytest.raises(ValueError, match="The loss depends on none of the actor's 1 trained parameters"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.integration
def test_guard_of_reward_training_stops_a_run(tmp_path):
    model, rows = tiny.tiny_reward_model().requires_grad_(False), dpo_runs.tiny_pairs(4)
    with pytest.raises(ValueError, match="No parameter of the reward model requires a gradient"):
        reward_trainer(tmp_path, rows, None, model)
    model.add_module("unread", torch.nn.Embedding(4, 4))
    model.enable_input_require_grads()
    trainer = reward_trainer(tmp_path, rows, None, model)
    with pytest.raises(ValueError, match="The loss depends on none of the reward model's 1 trained parameters"):
        trainer.train()


@pytest.mark.integration
@pytest.mark.parametrize("critic", ["head", "model", "adapter"])
def test_critic_of_an_earlier_run_is_neither_saved_nor_trained(tmp_path, critic, caplog):
    """The model that PPO has trained goes on to another trainer in the same process, or is saved by hand."""
    model = tiny.tiny_actor()
    if critic == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    own = set(model.state_dict())
    ppo_runs.ppo_run(tmp_path / "ppo", {"model": model}, critic=critic)
    if critic == "adapter":
        model.delete_adapter("ref")
    else:
        model.save_pretrained(tmp_path / "by_hand")
        assert load_file(tmp_path / "by_hand" / "model.safetensors").keys() == own
    assert set(model.state_dict()) > own
    trainer = dpo_runs.dpo_trainer(tmp_path / "dpo", {"model": model, "ref_model": None})
    assert "still held the critic of an earlier run" in caplog.text
    assert {name for name in trainer.model.state_dict() if ".ref." not in name} == own
    trainer.train()
    assert dpo_runs.lines(trainer)[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    if critic == "adapter":
        model.delete_adapter("ref")
    again = ppo_runs.ppo_run(tmp_path / "again", {"model": model}, critic="head")
    assert {name.rpartition("critic.")[2] for name in again.model.state_dict() if "critic." in name} == {
        "score.weight",
        "score.bias",
    }
    assert ppo_runs.log_lines(again)[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
