"""The weights of the loss terms over a run: from the options, and moved by the controllers."""

import dataclasses

import pytest

from ppo_runs import ppo_config
from trl_ext.ppo.coefficients import Coefficients
from trl_ext.ppo.config import PPOLoopConfig


def coefficients(aux=0.0, **options):
    return Coefficients(PPOLoopConfig(ppo_config("unused", **options)), aux)


def test_coefficients_are_those_of_the_options():
    weights = coefficients(aux=0.6, kl_coef=0.1, vf_coef=0.2, ent_coef=0.3, old_kl_coef=0.4).now
    given = {"kl": 0.1, "vf": 0.2, "entropy": 0.3, "old_kl": 0.4, "aux": 0.6}
    assert given.items() <= dataclasses.asdict(weights).items()


def test_option_that_a_callback_changes_counts_from_then_on():
    args = PPOLoopConfig(ppo_config("unused"))
    weights = Coefficients(args, 0.0)
    args.ent_coef = 0.25
    assert weights.now.entropy == 0.25


def test_kl_of_a_rollout_moves_its_coefficient_once():
    weights = coefficients(kl_coef=0.1, kl_controller="band", kl_band=[1.0, 2.0])
    weights.saw_kl(3.0)
    assert weights.now.kl == 0.1  # not before the rollout is closed
    weights.close_rollout()
    assert weights.now.kl == 0.2
    weights.close_rollout()  # nothing was seen since
    assert weights.now.kl == 0.2


def test_old_kl_of_the_last_pass_moves_its_coefficient():
    """Two passes of two mini-batches: the mean of the last is above the target's range, that of both within it."""
    weights = coefficients(old_kl_coef=0.1, old_kl_target=0.02, num_mini_batches=2, num_ppo_epochs=2)
    for old_kl in (0.0, 0.0, 0.02, 0.05):
        weights.saw_old_kl(old_kl)
    weights.close_rollout()
    assert weights.now.old_kl == pytest.approx(0.2)
