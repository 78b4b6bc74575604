"""Optimizers that save memory, in PPO, DPO and reward training: real ones, which run on a CPU too."""

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager

import dpo_runs
import tiny
from ppo_runs import ppo_trainer, snapshot
from reward_runs import reward_trainer


WIDE = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes keeps 8 bits from 4096 elements on
RATES = {"learning_rate": 1e-3, "critic_learning_rate": 5e-2}
# Paged states stay in memory on a CPU, as bitsandbytes says in a warning.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _forget_earlier_runs():
    """bitsandbytes remembers what has 32 bits by its place in the optimizer."""
    GlobalOptimManager.get_instance().initialize()


def ppo(folder, **options):
    models = {"model": tiny.tiny_actor(**WIDE), "reward_model": tiny.tiny_reward_model(**WIDE)}
    return ppo_trainer(folder, models, lr_scheduler_type="constant", **(RATES | options))


def dpo(folder, **options):
    models = {"model": tiny.tiny_actor(**WIDE), "ref_model": tiny.tiny_actor(1, **WIDE)}
    return dpo_runs.dpo_trainer(folder, models, **options)


def reward(folder, **options):
    pairs, model = dpo_runs.tiny_pairs(), tiny.tiny_reward_model(**WIDE)
    return reward_trainer(folder, pairs, pairs, model=model, learning_rate=1e-3, **options)


CASES = [(ppo, "adafactor"), (ppo, "paged_adamw_8bit"), (dpo, "adamw_8bit"), (reward, "adafactor")]


@pytest.mark.parametrize("trainer_of, optim", CASES)
def test_resumed_run_is_the_run_that_never_stopped(tmp_path, trainer_of, optim):
    """Of PPO within a rollout."""
    options = {"optim": optim, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", **options)
    start = snapshot(whole.model)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor"])
def test_actor_and_critic_have_rates_and_states_of_their_own(tmp_path, optim):
    trainer = ppo(tmp_path, optim=optim, max_steps=1)
    before = snapshot(trainer.model)
    trainer.train()
    for name, rate in (("critic.model.score.weight", 5e-2), ("lm_head.weight", 1e-3)):
        step = trainer.model.get_parameter(name).detach() - before[name]
        assert step.square().mean().sqrt() == pytest.approx(rate, rel=0.05), name  # as long as it can be
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    states = {names[parameter]: state for parameter, state in trainer.optimizer.state.items()}
    assert states.keys() == set(names.values())
    for name, state in states.items():
        shape = trainer.model.get_parameter(name).shape
        if optim == "adafactor":
            assert ("exp_avg_sq_row" in state) == (len(shape) == 2), name
        else:
            in_32_bits = "embed_tokens" in name or shape.numel() < 4096
            assert state["state1"].dtype == (torch.float32 if in_32_bits else torch.uint8), name


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_optimizer_resumes_on_a_gpu(tmp_path, optim):
    """Not to the last bit: sums over tokens have another order in every run."""
    options = {"optim": optim, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    ppo(tmp_path / "whole", **options).train()
    resumed = ppo(tmp_path / "resumed", **options)
    start = snapshot(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, parameter in resumed.model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start[name]), name
        states = [value for value in resumed.optimizer.state[parameter].values() if torch.is_tensor(value)]
        assert {value.device.type for value in states} == {"cuda"}, name
