"""The tests of whole runs can fail: each entry is a mistake in a run that one of them notices."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Trainer

from mistakes import assert_noticed, given, instead, to


pytestmark = pytest.mark.proof


def with_the_actor(self, model, rollout, inputs):
    return self._compute_loss(model, replace(inputs, critic_alone=False))


def towards_itself(rollout):
    return replace(rollout, returns=rollout.old_values)


def by_one_norm(self, model):
    return Trainer._clip_grad_norm(self, model)


def into_the_trunk(self, positions, states, groups, **inputs):
    return self(states)


def without_what_was_sampled_by(generate):
    def forgetful(self, rows):
        rollout = generate(self, rows)
        rollout.sampling_logps = None
        return rollout

    return forgetful


OPTIMIZER, VLLM, TOOLS = "test_optimizer.py", "test_vllm.py", "test_tools.py"
# (function, the mistake, file and test that must notice, its parameters)
MISTAKES = [
    (
        "trainer:PPOTrainerX._critic_loss",
        instead(with_the_actor),
        OPTIMIZER,
        "extra_steps_move",
        {"models": {}, "options": {}},
    ),
    ("micro_batches:critic_loss", given(rollout=towards_itself), OPTIMIZER, "extra_steps_are_adams", {"options": {}}),
    (
        "trainer:PPOTrainerX._clip_grad_norm",
        instead(by_one_norm),
        OPTIMIZER,
        "actor_and_critic_are",
        {"options": {}, "models": {}},
    ),
    ("optimizer:give_own_groups", given(decayed=lambda _: []), OPTIMIZER, "weight_decay", {}),
    (
        "optimizer:give_own_schedule",
        instead(lambda *args: None),
        OPTIMIZER,
        "rates",
        {"mine": "linear", "of_critic": "constant"},
    ),
    ("roles.critic:freeze", instead(lambda *args: None), OPTIMIZER, "frozen_parameters", {}),
    ("roles.critic:ValueHead.values_at", instead(into_the_trunk), OPTIMIZER, "value_loss_stays", {}),
    (
        "trainer:PPOTrainerX._generate_and_score_completions",
        without_what_was_sampled_by,
        VLLM,
        "mask_takes",
        {"more": {"old_kl_coef": 0.1}},
    ),
    ("micro_batches:ppo_terms", given(sampling_logps=to(None)), VLLM, "mask_takes", {"more": {"old_kl_coef": 0.1}}),
    ("config:PPOConfigX.reads_old_policy", instead(property(to(True))), VLLM, "mask_takes", {"more": {}}),
    ("trainer:turn_sources", given(tool_mask=to(lambda: None)), TOOLS, "environment_pays", {}),
]


@pytest.mark.parametrize("target, mistake, file, beginning, parameters", MISTAKES)
def test_mistake_in_a_run_is_noticed(tmp_path, monkeypatch, target, mistake, file, beginning, parameters):
    path = Path(__file__).with_name(file)
    assert_noticed(path, beginning, parameters, f"trl_ext.ppo.{target}", mistake, monkeypatch, tmp_path=tmp_path)
