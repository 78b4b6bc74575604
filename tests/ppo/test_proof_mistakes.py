"""The tests of the critic's own optimisation can fail: each entry is a mistake in a run that one of them notices."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Trainer

from mistakes import assert_noticed, given, instead


pytestmark = pytest.mark.proof


def with_the_actor(self, model, rollout, inputs):
    return self._compute_loss(model, replace(inputs, critic_alone=False))


def towards_itself(rollout):
    return replace(rollout, returns=rollout.old_values)


def by_one_norm(self, model):
    return Trainer._clip_grad_norm(self, model)


# (function, the mistake, test of test_optimizer.py that must notice, its parameters)
MISTAKES = [
    ("trainer:PPOTrainerX._critic_loss", instead(with_the_actor), "extra_steps_move", {"models": {}, "options": {}}),
    ("micro_batches:critic_loss", given(rollout=towards_itself), "extra_steps_are_adams", {"options": {}}),
    (
        "trainer:PPOTrainerX._clip_grad_norm",
        instead(by_one_norm),
        "actor_and_critic_are",
        {"options": {}, "models": {}},
    ),
    ("optimizer:give_own_groups", given(decayed=lambda _: []), "weight_decay", {}),
    ("optimizer:give_own_schedule", instead(lambda *args: None), "rates", {"mine": "linear", "of_critic": "constant"}),
    ("roles.critic:freeze", instead(lambda *args: None), "frozen_parameters", {}),
]


@pytest.mark.parametrize("target, mistake, beginning, parameters", MISTAKES)
def test_mistake_in_a_run_is_noticed(tmp_path, monkeypatch, target, mistake, beginning, parameters):
    path = Path(__file__).with_name("test_optimizer.py")
    parameters = parameters | {"tmp_path": tmp_path}
    assert_noticed(path, beginning, parameters, f"trl_ext.ppo.{target}", mistake, monkeypatch)
