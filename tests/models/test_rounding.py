"""A warning before training if steps are too small to move 16-bit weights."""

import math

import pytest
import torch
from peft import LoraConfig
from torch import nn

import dpo_runs
import ppo_runs
import tiny
from trl_ext.models.rounding import moving_share


def test_share_is_that_of_the_weights_which_a_step_changes():
    """Next to w in bfloat16, 2^(⌊log2 |w|⌋ − 7) away, is the next number; half of that, and no less, is a step."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 0.02
    weights = nn.Parameter(values.bfloat16())
    step = 3e-6
    by_hand = [step >= 2.0 ** (math.floor(math.log2(abs(w))) - 8) for w in weights.tolist() if w]
    assert moving_share([weights], step) == pytest.approx(sum(by_hand) / len(by_hand), abs=5e-3)
    assert 0.005 < moving_share([weights], step) < 0.1


def test_share_by_an_optimizer():
    weights = nn.Parameter((torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())
    before = weights.detach().clone()
    optimizer = torch.optim.AdamW([weights], lr=1e-5, weight_decay=0.0)
    weights.grad = torch.randn(4000).bfloat16()
    optimizer.step()
    assert moving_share([nn.Parameter(before)], 1e-5) == pytest.approx(
        (weights != before).float().mean().item(), abs=0.05
    )


def test_float32_weights_have_no_share():
    assert moving_share(tiny.tiny_actor().parameters(), 1e-6) is None


@pytest.mark.parametrize("dtype, rate, warns", [("bfloat16", 1e-6, 1), ("bfloat16", 1e-2, 0), ("float32", 1e-6, 0)])
def test_both_trainers_say_it_once_with_figures_and_the_cure(tmp_path, caplog, dtype, rate, warns):
    of_type = getattr(torch, dtype)
    dpo_runs.dpo_trainer(
        tmp_path,
        {"model": tiny.tiny_actor().to(of_type), "ref_model": tiny.tiny_actor(1).to(of_type)},
        learning_rate=rate,
    )
    ppo_runs.ppo_trainer(
        tmp_path,
        {"model": tiny.tiny_actor().to(of_type), "value_model": tiny.tiny_reward_model(2).to(of_type)},
        learning_rate=rate,
    )
    lines = [r.getMessage() for r in caplog.records if "rounds to nothing" in r.getMessage()]
    assert [line.split()[4] for line in lines] == ["policy", "actor", "critic"] * warns
    for line in lines:
        assert "are trained in bfloat16, and a step of learning_rate=1e-06 moves " in line
        assert "`bf16=True`" in line


def test_each_role_of_ppo_is_told_of_at_its_own_rate(tmp_path, caplog):
    """The adapter is in float32; the critic has weights in bfloat16, and, in the second run, steps that they feel."""
    for critic_rate in (1e-6, 1e-2):
        models = {"model": tiny.tiny_actor().bfloat16(), "value_model": tiny.tiny_reward_model(2).bfloat16()}
        models |= {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2)}
        ppo_runs.ppo_trainer(tmp_path, models, critic_learning_rate=critic_rate, learning_rate=1e-6)
    (line,) = [r.getMessage() for r in caplog.records if "rounds to nothing" in r.getMessage()]
    assert line.startswith(
        "The weights of the critic are trained in bfloat16, and a step of critic_learning_rate=1e-06"
    )


@pytest.mark.integration
@pytest.mark.parametrize("run", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
def test_evaluation_that_casts_the_weights_for_good_says_so(tmp_path, run, caplog):
    held_out = dpo_runs.tiny_pairs(4) if run is dpo_runs.dpo_trainer else tiny.tiny_prompts(4)
    for option in ({}, {"bf16_full_eval": True}):
        trainer = run(tmp_path, {"eval_dataset": held_out}, per_device_eval_batch_size=4, use_cpu=True, **option)
        trainer.evaluate()
        is_cast = next(trainer.model.parameters()).dtype == torch.bfloat16
        assert is_cast == ("`bf16_full_eval` casts the weights" in caplog.text) == bool(option)
