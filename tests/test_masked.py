"""masked.py against the standard library's statistics, on one rank and on two."""

import math

import pytest
import torch

import oracles
from trl_ext import masked


def test_sum_and_mean_count_only_the_mask():
    b = oracles.batch()
    numbers = oracles.counted(b.values, b.mask)
    torch.testing.assert_close(masked.masked_sum(b.values, b.mask).item(), sum(numbers), **oracles.FLOAT64)
    torch.testing.assert_close(
        masked.masked_mean(b.values, b.mask).item(), sum(numbers) / len(numbers), **oracles.FLOAT64
    )


def test_sum_and_mean_along_a_dimension_equal_those_of_each_row():
    b = oracles.batch()
    for row, (values, mask) in enumerate(zip(b.values, b.mask, strict=True)):
        numbers = oracles.counted(values[None], mask[None])
        assert masked.masked_sum(b.values, b.mask, dim=1)[row].item() == pytest.approx(sum(numbers))
        assert masked.masked_mean(b.values, b.mask, dim=1)[row].item() == pytest.approx(
            sum(numbers) / max(len(numbers), 1)
        )


def test_sum_of_half_precision_is_taken_in_float32():
    ones = torch.ones(1, 5000, dtype=torch.bfloat16)
    assert masked.masked_sum(ones, ones.bool()).item() == 5000  # bfloat16 has no 5000


def test_moments_equal_the_statistics_module():
    b = oracles.batch()
    moments = torch.stack(masked.masked_moments(b.values, b.mask)).tolist()
    torch.testing.assert_close(
        moments, list(map(float, oracles.moments(oracles.counted(b.values, b.mask)))), **oracles.FLOAT64
    )


def test_moments_survive_a_large_mean():
    """In float32, Σ x² / n − mean² is all rounding error here."""
    values = (1e4 + torch.randn(1, 4000)).float()
    _, mean, variance = oracles.moments(values[0].tolist())
    moments = masked.masked_moments(values, torch.ones_like(values, dtype=torch.bool))
    assert moments[1].item() == pytest.approx(mean, rel=1e-7)
    assert moments[2].item() == pytest.approx(variance, rel=1e-4)


def test_moments_of_nothing_are_zero():
    assert torch.stack(masked.masked_moments(torch.ones(2, 3), torch.zeros(2, 3).bool())).tolist() == [0, 0, 0]


def test_moments_on_two_ranks_equal_those_on_one():
    b = oracles.batch()
    whole = torch.stack(masked.masked_moments(b.values, b.mask))
    shards = [(b.values[rows], b.mask[rows]) for rows in (slice(0, 1), slice(1, None))]
    for rank in oracles.on_ranks(masked.masked_moments, *shards):
        torch.testing.assert_close(torch.stack(rank), whole, **oracles.FLOAT64)


def test_whitened_values_have_mean_0_and_variance_1():
    b = oracles.batch()
    _, mean, variance = oracles.moments(oracles.counted(masked.masked_whiten(b.values, b.mask), b.mask))
    assert mean == pytest.approx(0, abs=1e-9)
    assert variance == pytest.approx(1, abs=1e-7)  # the floor of 1e-8 under the variance


def test_whitening_can_keep_the_mean():
    b = oracles.batch()
    before = oracles.moments(oracles.counted(b.values, b.mask))
    after = oracles.moments(oracles.counted(masked.masked_whiten(b.values, b.mask, shift_mean=False), b.mask))
    assert after[1] == pytest.approx(before[1])
    assert after[2] == pytest.approx(1, abs=1e-7)


def test_whitening_gives_0_where_nothing_counts():
    b = oracles.batch()
    assert not masked.masked_whiten(b.values, b.mask)[~b.mask].any()
    assert not masked.masked_whiten(b.values, b.mask, shift_mean=False)[~b.mask].any()


def test_whitening_on_two_ranks_equals_one():
    """Per-rank moments would give each rank's shard mean 0: here the shards' means differ by 3."""
    b = oracles.batch()
    values = b.values + 3 * torch.arange(6).ge(2)[:, None]
    shards = [(values[rows], b.mask[rows], True) for rows in (slice(0, 2), slice(2, None))]
    whole = masked.masked_whiten(values, b.mask)
    torch.testing.assert_close(torch.cat(oracles.on_ranks(masked.masked_whiten, *shards)), whole, **oracles.FLOAT64)


@pytest.mark.parametrize("values", [[[2.5]], [[0.1] * 1000]], ids=["one token", "a constant"])
def test_whitening_without_spread_centres_or_changes_nothing(values):
    values = torch.tensor(values)
    mask = torch.ones_like(values, dtype=torch.bool)
    torch.testing.assert_close(masked.masked_whiten(values, mask), torch.zeros_like(values), rtol=0, atol=1e-3)
    torch.testing.assert_close(masked.masked_whiten(values, mask, shift_mean=False), values, rtol=0, atol=1e-3)


def test_explained_variance_equals_its_definition():
    b = oracles.batch()
    expected = oracles.explained_variance(oracles.counted(b.values, b.mask), oracles.counted(b.returns, b.mask))
    assert masked.explained_variance(b.values, b.returns, b.mask).item() == pytest.approx(expected)


def test_explained_variance_of_a_perfect_critic_is_1_and_of_a_constant_0():
    b = oracles.batch()
    assert masked.explained_variance(b.returns + 7, b.returns, b.mask).item() == pytest.approx(1)
    assert masked.explained_variance(torch.full_like(b.returns, 7), b.returns, b.mask).item() == pytest.approx(0)


def test_explained_variance_is_nan_if_the_returns_do_not_vary():
    b = oracles.batch()
    assert math.isnan(masked.explained_variance(b.values, torch.ones_like(b.returns), b.mask).item())


def test_explained_variance_on_two_ranks_equals_one():
    b = oracles.batch()
    shards = [(b.values[rows], b.returns[rows], b.mask[rows]) for rows in (slice(0, 3), slice(3, None))]
    whole = masked.explained_variance(b.values, b.returns, b.mask)
    for rank in oracles.on_ranks(masked.explained_variance, *shards):
        torch.testing.assert_close(rank, whole, **oracles.FLOAT64)


@pytest.mark.parametrize("garbage", [*oracles.GARBAGE, math.nan])
def test_padding_changes_no_result_and_has_no_gradient(garbage):
    b = oracles.batch()
    for function in (
        lambda x: masked.masked_mean(x, b.mask),
        lambda x: masked.masked_moments(x, b.mask)[2],
        lambda x: masked.masked_whiten(x, b.mask).square().sum(),
        lambda x: masked.masked_whiten(x, b.mask, shift_mean=False)[b.mask][:3].sum(),
        lambda x: masked.explained_variance(x, b.returns, b.mask),
    ):
        clean, dirty = oracles.with_garbage(b.values, b.mask, 0.0), oracles.with_garbage(b.values, b.mask, garbage)
        results = function(clean), function(dirty)
        torch.testing.assert_close(*results, **oracles.FLOAT64)
        for result in results:
            result.backward()
        torch.testing.assert_close(dirty.grad, clean.grad, **oracles.FLOAT64)
        assert not dirty.grad[~b.mask].any()


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"mask has dtype torch\.int64.*pass mask\.bool\(\)"):
        masked.masked_whiten(torch.ones(2, 3), torch.ones(2, 3).long())


def test_a_shape_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"values has shape \(2, 1\) and mask has shape \(2, 3\)"):
        masked.masked_whiten(torch.ones(2, 1), torch.ones(2, 3).bool())
