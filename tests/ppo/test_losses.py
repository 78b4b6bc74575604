"""losses.py: every loss per token against an oracle, and the identities."""

import pytest
import torch

import oracles
from trl_ext.ppo import losses


CLIPRANGE, CLIPRANGE_VALUE = 0.2, 0.3
RANGES = [(CLIPRANGE,), (CLIPRANGE, 0.5), (CLIPRANGE, None, 1.3), (CLIPRANGE, 0.3, 2.0)]


def with_leaves(b):
    for name in ("logps", "values"):
        getattr(b, name).requires_grad_()
    return b


def elementwise(oracle, *tensors):
    rows = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    return torch.tensor([oracle(*row) for row in rows]).view_as(tensors[0])


def ratios():
    """Ratios and advantages on every side: below, inside and above the range, for both signs and zero."""
    ratio, advantages = torch.meshgrid(
        torch.tensor([0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 1.4, 3.0], dtype=torch.float64),
        torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64),
        indexing="ij",
    )
    return ratio, advantages


def test_ratio_is_the_quotient_of_the_probabilities():
    b = oracles.batch()
    quotient = b.logps.exp() / b.old_logps.exp()
    torch.testing.assert_close(losses.policy_ratio(b.logps, b.old_logps), quotient, **oracles.FLOAT64)


@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_clip_objective_equals_the_bound_by_sign(ranges):
    ratio, advantages = ratios()
    of_token = [*ranges, None, None][:3]
    bound = elementwise(
        lambda r, a: oracles.clip_objective(r, a, *of_token[:2], of_token[2] or float("inf")), ratio, advantages
    )
    torch.testing.assert_close(losses.clip_objective(ratio, advantages, *ranges), bound.double(), **oracles.FLOAT32)


@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_clipped_tokens_are_those_without_a_gradient(ranges):
    ratio, advantages = ratios()
    ratio.requires_grad_()
    losses.clip_objective(ratio, advantages, *ranges).sum().backward()
    flat = (ratio.grad == 0) & (advantages != 0)
    assert torch.equal(losses.clipped_tokens(ratio, advantages, *ranges), flat)
    assert flat.any()
    assert not flat.all()


@pytest.mark.parametrize("ranges", [(0.2,), (0.2, 0.5), (0.8, 3.0)], ids=str)
def test_mask_objective_is_the_ratio_within_the_range_and_nothing_outside(ranges):
    """With its gradient, token by token, for either sign of the advantage."""
    ratio, advantages = ratios()
    ratio.requires_grad_()
    low, high = 1 - ranges[0], 1 + ranges[-1]
    inside = torch.tensor([low <= r <= high for r in ratio.flatten().tolist()]).view_as(ratio)
    old_logps = torch.full_like(ratio, -0.5)
    objective = losses.mask_objective(ratio.log() + old_logps, old_logps, advantages, *ranges)
    objective.sum().backward()
    expected = elementwise(lambda r, a: r * a if low <= r <= high else 0.0, ratio, advantages).double()
    torch.testing.assert_close(objective, expected, **oracles.FLOAT32)
    torch.testing.assert_close(ratio.grad, advantages * inside, **oracles.FLOAT64)
    assert torch.equal(losses.masked_tokens(ratio, *ranges), ~inside)


def test_ratio_that_overflows_is_masked_without_harm():
    logps = torch.tensor([-0.1, -0.1], requires_grad=True)
    sampled_by, advantages = torch.tensor([-95.0, -0.1]), torch.tensor([1.0, 2.0])
    assert losses.policy_ratio(logps, sampled_by)[0] == torch.inf
    losses.mask_objective(logps, sampled_by, advantages, 0.8, 3.0).sum().backward()
    assert logps.grad.tolist() == [0.0, 2.0]


def test_gradient_at_ratio_1_is_the_policy_gradient():
    b = with_leaves(oracles.batch())
    ratio = losses.policy_ratio(b.logps, b.logps.detach())
    surrogate = losses.clip_objective(ratio, b.advantages, CLIPRANGE)
    (from_ratio,) = torch.autograd.grad(surrogate.sum(), b.logps)
    torch.testing.assert_close(from_ratio, b.advantages, **oracles.FLOAT64)  # that of logps · A


def test_value_loss_is_half_the_squared_error():
    b = oracles.batch()
    half_square = elementwise(lambda v, r: (v - r) ** 2 / 2, b.values, b.returns).double()
    torch.testing.assert_close(losses.value_loss(b.values, b.returns), half_square, **oracles.FLOAT32)


def test_clipped_value_loss_equals_the_worse_error():
    b = oracles.batch()
    worse = elementwise(
        lambda v, old, r: oracles.clipped_value_loss(v, old, r, CLIPRANGE_VALUE), b.values, b.old_values, b.returns
    ).double()
    result = losses.clipped_value_loss(b.values, b.old_values, b.returns, CLIPRANGE_VALUE)
    torch.testing.assert_close(result, worse, **oracles.FLOAT32)


def test_clipped_values_are_those_without_a_gradient():
    b = with_leaves(oracles.batch())
    losses.clipped_value_loss(b.values, b.old_values, b.returns, CLIPRANGE_VALUE).sum().backward()
    flat = b.values.grad == 0
    assert torch.equal(losses.clipped_values(b.values, b.old_values, b.returns, CLIPRANGE_VALUE), flat)
    assert flat.any()
    assert not flat.all()
