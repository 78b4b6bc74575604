"""rewards.py against one sequence at a time, and the running moments against all scores at once."""

import math

import pytest
import torch

import oracles
from trl_ext.ppo import rewards


SCORES = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0, 11.0], dtype=torch.float64)


def expected_rewards(scores, kl, kl_coef, mask):
    rows = [
        oracles.per_sequence(
            lambda x, score=score: oracles.token_rewards(score, x, kl_coef), keep[None], penalty[None]
        )
        for score, keep, penalty in zip(scores.tolist(), mask, kl, strict=True)
    ]
    return torch.cat(rows)


def test_weighted_scores_sum_the_sources_that_apply():
    nan = math.nan
    said = torch.tensor([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan]])
    result = rewards.weighted_scores(said, torch.tensor([3.0, -0.5]))
    torch.testing.assert_close(result, torch.tensor([3.0 - 1.0, -1.0, 3.0, nan]), equal_nan=True)


def test_token_rewards_pay_the_score_last_and_the_kl_everywhere():
    b = oracles.batch()
    kl = b.logps - b.ref_logps
    result = rewards.token_rewards(SCORES, b.mask, kl, 0.05)
    torch.testing.assert_close(result, expected_rewards(SCORES, kl, 0.05, b.mask), **oracles.FLOAT64)


def test_token_rewards_without_kl_are_the_scores_alone():
    b = oracles.batch()
    result = rewards.token_rewards(SCORES, b.mask)
    torch.testing.assert_close(result, expected_rewards(SCORES, 0 * b.logps, 0.0, b.mask), **oracles.FLOAT64)
    assert result.sum(1).tolist() == [*SCORES.tolist()[:5], 0.0]


def test_token_rewards_add_what_is_paid_at_tokens():
    b = oracles.batch()
    kl = b.logps - b.ref_logps
    result = rewards.token_rewards(SCORES, b.mask, kl, 0.05, paid=b.rewards)
    expected = expected_rewards(SCORES, kl, 0.05, b.mask) + b.rewards.masked_fill(~b.mask, 0)
    torch.testing.assert_close(result, expected, **oracles.FLOAT64)
    with pytest.raises(ValueError, match=r"paid has shape \(6, 1\)"):
        rewards.token_rewards(SCORES, b.mask, paid=torch.zeros(6, 1))


def test_rewards_are_paid_at_the_nearest_token_that_counts():
    """The last before it, else the first; against one reward at a time."""
    b = oracles.batch()
    expected = torch.zeros_like(b.rewards)
    for row, counts in enumerate(b.mask.tolist()):
        for t, reward in enumerate(b.rewards[row].tolist()):
            before = [k for k in range(t + 1) if counts[k]]
            after = [k for k in range(t, 7) if counts[k]]
            for place in before[-1:] or after[:1]:
                expected[row, place] += reward
    result = rewards.paid_where_it_counts(b.rewards, b.mask)
    torch.testing.assert_close(result, expected, **oracles.FLOAT64)
    torch.testing.assert_close(result.sum(1), b.rewards.sum(1).where(b.mask.any(1), torch.tensor(0.0)))


def test_sources_pay_tokens_and_scores_by_their_weights():
    nan = math.nan
    said = torch.tensor([[6.0, 1.0], [nan, 2.0], [nan, nan]])  # the first source's 6 is the sum of its tokens
    by_token = {0: [[1.0, 2.0, 3.0], None, None]}
    result = rewards.weighted_tokens(said, by_token, torch.tensor([3, 1, 2]), torch.tensor([10.0, -1.0]))
    assert result.tolist() == [[10.0, 20.0, 29.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_last_token_is_the_last_that_counts():
    positions = [max((t for t, keep in enumerate(row) if keep), default=None) for row in oracles.MASK.tolist()]
    assert positions == [6, 2, 5, 6, 3, None]
    expected = [[t == position for t in range(7)] for position in positions]
    assert rewards.last_token(oracles.MASK).tolist() == expected


@pytest.mark.parametrize("garbage", oracles.GARBAGE)
def test_padding_changes_no_reward(garbage):
    b = oracles.batch()
    kl = (b.logps - b.ref_logps).masked_fill(~b.mask, garbage)
    result = rewards.token_rewards(SCORES, b.mask, kl, 0.05)
    assert torch.equal(result, rewards.token_rewards(SCORES, b.mask, kl.masked_fill(~b.mask, 0), 0.05))
    assert not result[~b.mask].any()


def test_kl_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"kl has shape \(6, 1\)"):
        rewards.token_rewards(SCORES, oracles.MASK, torch.zeros(6, 1), 0.05)


def test_missing_eos_lowers_only_unfinished_responses():
    has_eos = torch.tensor([True, False, True, False, True, True])
    assert rewards.missing_eos(SCORES, has_eos, 1.5).tolist() == [1.0, -3.5, 3.0, -1.0, 7.0, 11.0]


def test_scores_are_clipped_on_both_sides():
    assert rewards.clip_scores(SCORES - 3, 2.5).tolist() == [-2.0, -2.5, 0.0, -2.5, 2.5, 2.5]


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_clip_limit_of_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=f"limit is {limit}.*set it above 0"):
        rewards.clip_scores(SCORES, limit)


def as_tuple(moments):
    return moments.count, moments.mean, moments.variance


def test_running_moments_equal_those_of_all_scores():
    moments, seen = rewards.RunningMoments(), []
    for size in (1, 4, 2, 16):
        scores = 5 + 3 * torch.randn(size, dtype=torch.float64)
        seen += scores.tolist()
        moments.update(scores)
        assert as_tuple(moments) == pytest.approx(oracles.moments(seen))


def test_running_moments_leave_out_samples_without_a_score():
    moments = rewards.RunningMoments()
    scored = torch.tensor([True, False, True, True, True, True])
    moments.update(SCORES.masked_fill(~scored, math.nan), scored)
    assert as_tuple(moments) == pytest.approx(oracles.moments(SCORES[scored].tolist()))


def test_running_moments_of_nothing_stay_at_the_start():
    moments = rewards.RunningMoments()
    moments.update(SCORES * math.nan, torch.zeros(6).bool())
    assert as_tuple(moments) == (0, 0, 0)


def test_running_moments_on_two_ranks_equal_those_on_one():
    def run(parts, all_reduce):
        moments = rewards.RunningMoments()
        for part in parts:
            moments.update(part, all_reduce=all_reduce)
        return as_tuple(moments)

    first, second = torch.randn(2, 8, dtype=torch.float64) + torch.tensor([[0.0], [5.0]])
    shards = [([first[:3], second[:3]],), ([first[3:], second[3:]],)]
    expected = oracles.moments([*first.tolist(), *second.tolist()])
    for rank in oracles.on_ranks(run, *shards):
        assert rank == pytest.approx(expected)


def test_normalized_scores_have_variance_1_and_keep_their_mean():
    moments = rewards.RunningMoments()
    moments.update(SCORES)
    _, mean, variance = oracles.moments(SCORES.tolist())
    after = oracles.moments(rewards.normalize_scores(SCORES, moments).tolist())
    assert after[1:] == pytest.approx((mean / variance**0.5, 1))


@pytest.mark.parametrize("seen", [[], [3.0], [3.0, 3.0]])
def test_scores_are_not_normalised_before_they_vary(seen):
    moments = rewards.RunningMoments()
    moments.update(torch.tensor(seen, dtype=torch.float64))
    assert torch.equal(rewards.normalize_scores(SCORES, moments), SCORES)
