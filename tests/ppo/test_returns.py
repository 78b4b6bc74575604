"""returns.py: what the critic's gate and a λ by length do to a rollout's advantages, on one rank and on two."""

import dataclasses
import math

import pytest
import torch
from transformers.utils import logging

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


def test_errors_of_the_value_by_place():
    """Counted by hand: of 5, 2, 4, 1, 3 and 4 tokens the first quarter has 2, 1, 1, 1, 1 and 1, the last the rest."""
    made, to_go = rollout(noise=1.0)
    first, last = [2, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]
    errors = (to_go - made.old_values).square()
    early = [errors[row, t] for row, count in enumerate(first) for t in range(count)]
    late = [errors[row, LENGTHS[row] - 1] for row, count in enumerate(last) if count]
    measured = estimated(made)[2]
    assert measured["value/rmse_early"] == pytest.approx((sum(early) / len(early)).sqrt().item())
    assert measured["value/rmse_late"] == pytest.approx((sum(late) / len(late)).sqrt().item())


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
    logging.warning_once.cache_clear()
    caplog.clear()
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


def paid_rollout():
    """Like `rollout`, with rewards at every token, holes, and a response without its end token."""
    made, _ = rollout(noise=1.0)
    mask = made.mask.clone()
    mask[0, 2] = mask[2, 0] = False
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    paid = torch.randn(mask.shape, **draw).masked_fill(~mask, 0)
    old_logps, ref_logps = torch.randn(2, *mask.shape, **draw)
    has_eos = torch.tensor([True, False, True, True, True, False])
    of_tokens = {"paid": paid, "scores": paid.sum(1), "old_logps": old_logps, "ref_logps": ref_logps}
    return dataclasses.replace(made, mask=mask, has_eos=has_eos, **of_tokens)


def rewards_by_hand(made, args, kl_coef):
    """The rewards of each response, one after the other, as lists of its counted tokens."""
    scale = oracles.moments(made.scores.tolist())[2] ** 0.5 if args.normalize_rewards else 1.0
    rows = []
    for row, counts in enumerate(made.mask):
        rewards = [x / scale for x in made.paid[row][counts].tolist()]
        rewards[-1] -= 0.0 if made.has_eos[row] else (args.missing_eos_penalty or 0.0)
        if args.kl_placement == "reward":
            kl = (made.old_logps - made.ref_logps)[row][counts].tolist()
            rewards = [x - kl_coef * y for x, y in zip(rewards, kl, strict=True)]
        rows.append(rewards)
    if args.whiten_rewards:
        _, mean, variance = oracles.moments([x for row in rows for x in row])
        rows = [[(x - mean) / (variance + 1e-8) ** 0.5 + mean for x in row] for row in rows]
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0.8, "gamma": 0.9},
        {"normalize_rewards": True, "missing_eos_penalty": 0.7},
        {"whiten_rewards": True, "kl_placement": "reward", "kl_estimator": "k1", "normalize_rewards": True},
        {"critic_lam": 1.0, "lam_alpha": 0.6},
        {"advantage_estimator": "2_step", "gamma": 0.9},
        {"advantage_estimator": "reinforce", "gamma": 0.9},
        {"advantage_estimator": "reinforce_baseline"},
        {"critic_gate": True},
    ],
    ids=str,
)
def test_rewards_at_tokens_are_read_by_every_estimator(options):
    made = paid_rollout()
    args = PPOConfigX("out", whiten_advantages=False, use_cpu=True, **options)
    total, measured = estimate_returns(made, args, 0.3, RunningMoments(), identity)
    rewards = rewards_by_hand(made, args, 0.3)
    plain = rewards_by_hand(made, dataclasses.replace(args, whiten_rewards=False), 0.3)
    assert total.tolist() == pytest.approx([sum(row) for row in plain])
    all_to_go, all_values = [], []
    for row, own in enumerate(rewards):
        counts = made.mask[row]
        values = made.old_values[row][counts].tolist()
        to_go = oracles.rewards_to_go(own, args.gamma)
        all_to_go += to_go
        all_values += values
        lam = args.lam if args.lam_alpha is None else max(0.0, 1 - 1 / (args.lam_alpha * len(own)))
        expected = {
            "gae": lambda own=own, values=values, lam=lam: oracles.gae(own, values, args.gamma, lam),
            "2_step": lambda own=own, values=values: oracles.n_step(own, values, args.gamma, 2),
            "reinforce": lambda to_go=to_go: to_go,
            "reinforce_baseline": lambda own=own, values=values: oracles.gae(own, values, args.gamma, 1.0),
        }[args.advantage_estimator]()
        returns = [a + v for a, v in zip(expected, values, strict=True)]
        if args.advantage_estimator == "reinforce":
            returns = to_go
        elif args.critic_lam is not None:
            targets = oracles.gae(own, values, args.gamma, args.critic_lam)
            returns = [a + v for a, v in zip(targets, values, strict=True)]
        assert made.returns[row][counts].tolist() == pytest.approx(returns)
        if not args.critic_gate:
            assert made.advantages[row][counts].tolist() == pytest.approx(expected)
    explained = oracles.explained_variance(all_values, all_to_go)
    assert measured["value/explained_variance_mc"] == pytest.approx(explained)
    if args.critic_gate:
        assert measured["value/gate"] == 0
        mean = sum(all_to_go) / len(all_to_go)
        assert oracles.counted(made.advantages, made.mask) == pytest.approx([each - mean for each in all_to_go])


def test_rank_whose_responses_have_scores_alone_agrees_with_one_that_pays_tokens():
    whole = paid_rollout()
    last = whole.mask & (whole.mask.flip(1).cumsum(1).flip(1) == 1)
    whole.paid[3:] = torch.where(last, whole.scores[:, None], 0.0)[3:]
    shards = []
    for rows in (torch.arange(3), torch.arange(3, 6)):
        own = {name: tensor[rows] for name, tensor in whole.tensors().items()}
        shards.append((dataclasses.replace(whole, **own),))
    shards[1][0].paid = None
    options = {"normalize_rewards": True, "whiten_rewards": True}
    results = oracles.on_ranks(lambda made, all_reduce: estimated(made, all_reduce, **options), *shards)
    advantages, _, measured = estimated(whole, **options)
    torch.testing.assert_close(torch.cat([rank[0] for rank in results]), advantages, **oracles.FLOAT64)
    assert [rank[2] for rank in results] == [pytest.approx(measured)] * 2
