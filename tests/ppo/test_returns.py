"""returns.py: what the critic's gate and a λ by length do to a rollout's advantages, on one rank and on two."""

import dataclasses
import math

import pytest
import torch

import oracles
from trl_ext import PPOConfigX
from trl_ext.masked import identity
from trl_ext.ppo.returns import estimate_returns
from trl_ext.ppo.rewards import RunningMoments
from trl_ext.ppo.rollout import Rollout


LENGTHS = [5, 2, 4, 1, 3, 4]
SCORES = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0]


def rollout(scores=SCORES, noise=0.0):
    """Responses of `LENGTHS` tokens; the values are the rewards to come of this rollout, plus noise."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    to_go = torch.tensor(scores, dtype=torch.float64)[:, None] * mask
    known = torch.ones(len(scores), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    values = to_go + noise * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    ids = torch.zeros_like(mask, dtype=torch.long)
    made = Rollout(ids, ids.bool(), ids, mask, mask, torch.tensor(scores), known, known, old_values=values)
    return made, to_go


def estimated(made, all_reduce=identity, **options):
    args = PPOConfigX("out", whiten_advantages=False, use_cpu=True, **options)
    _, measured = estimate_returns(made, args, 0.0, RunningMoments(), all_reduce)
    return made.advantages, made.returns, measured


@pytest.mark.parametrize("estimator", ["gae", "1_step", "reinforce_baseline"])
def test_gate_is_open_while_the_critic_explains_the_rewards_to_come(estimator):
    options = {"advantage_estimator": estimator}
    advantages, returns, measured = estimated(rollout(noise=0.1)[0], critic_gate=True, **options)
    assert measured["value/gate"] == 1
    assert 0.9 < measured["value/explained_variance_mc"] < 1
    without = estimated(rollout(noise=0.1)[0], **options)
    assert torch.equal(advantages, without[0])
    assert torch.equal(returns, without[1])
    assert "value/gate" not in without[2]


@pytest.mark.parametrize("estimator", ["gae", "1_step", "reinforce_baseline"])
def test_closed_gate_leaves_rewards_to_go_minus_their_mean(estimator):
    """EVPO's other branch; the critic's returns stay those of the estimator."""
    made, to_go = rollout(noise=5.0)
    advantages, returns, measured = estimated(made, critic_gate=True, advantage_estimator=estimator)
    assert measured["value/gate"] == 0
    flat = oracles.counted(to_go, made.mask)
    assert measured["value/explained_variance_mc"] == pytest.approx(
        oracles.explained_variance(oracles.counted(made.old_values, made.mask), flat)
    )
    mean = sum(flat) / len(flat)
    assert oracles.counted(advantages, made.mask) == pytest.approx([each - mean for each in flat])
    assert not advantages[~made.mask].any()
    assert torch.equal(returns, estimated(rollout(noise=5.0)[0], advantage_estimator=estimator)[1])


def test_gate_is_closed_where_all_rewards_to_come_are_equal():
    advantages, _, measured = estimated(rollout(scores=[1.0] * 6, noise=0.1)[0], critic_gate=True)
    assert math.isnan(measured["value/explained_variance_mc"])
    assert measured["value/gate"] == 0
    assert advantages.abs().max() < 1e-12


@pytest.mark.parametrize("noise", [0.1, 5.0])
def test_gate_of_two_ranks_is_that_of_all_responses(noise):
    """The first rank alone would decide otherwise: its responses have all the same score."""
    scores = [1.0, 1.0, 1.0, -3.0, 0.0, 2.0]
    whole, _ = rollout(scores, noise)
    shards = []
    for rows in (torch.arange(3), torch.arange(3, 6)):
        own = {name: tensor[rows] for name, tensor in whole.tensors().items()}
        shards.append((dataclasses.replace(whole, **own),))
    results = oracles.on_ranks(lambda made, all_reduce: estimated(made, all_reduce, critic_gate=True), *shards)
    advantages, _, measured = estimated(whole, critic_gate=True)
    torch.testing.assert_close(torch.cat([rank[0] for rank in results]), advantages, **oracles.FLOAT64)
    for rank in results:
        assert rank[2] == pytest.approx(measured)


@pytest.mark.parametrize("alpha, warns", [(0.2, True), (0.6, False)])
def test_lam_by_length_warns_where_a_quarter_of_the_responses_are_too_short(alpha, warns, caplog):
    """With α = 0.2 all responses have λ = 0, and TD errors for advantages; with 0.6 one of six."""
    made, _ = rollout(noise=1.0)
    advantages, _, _ = estimated(made, lam_alpha=alpha)
    lams = [max(0.0, 1 - 1 / (alpha * length)) for length in LENGTHS]
    rewards = torch.zeros_like(made.old_values)
    rewards[torch.arange(6), torch.tensor(LENGTHS) - 1] = torch.tensor(SCORES, dtype=torch.float64)
    for row, lam in enumerate(lams):
        length = LENGTHS[row]
        each = oracles.gae(rewards[row, :length].tolist(), made.old_values[row, :length].tolist(), 1.0, lam)
        assert advantages[row, :length].tolist() == pytest.approx(each)
    assert (f"`lam_alpha={alpha}`" in caplog.text) == warns
