"""kl.py: every claim about an expectation is checked by summing over a small vocabulary, so that nothing is random."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import oracles
from trl_ext.ppo import kl
from trl_ext.ppo.losses import policy_ratio


ESTIMATORS = ("k1", "k2", "k3")
VOCABULARY = 5


def three_policies():
    """Log-probabilities (V,) of π_θ (with its logits, a leaf), π_old and π_ref, all different."""
    logits, old, ref = torch.randn(3, VOCABULARY, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), old.log_softmax(-1), ref.log_softmax(-1)


def divergence(logps, other):
    return kl_divergence(Categorical(logits=logps), Categorical(logits=other))


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def expected(per_token, sampler):
    """E[per_token] over tokens drawn from `sampler`, which as a sampler has no gradient."""
    return (sampler.detach().exp() * per_token).sum()


# Values


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_kl_equals_its_formula(estimator):
    b = oracles.batch()
    formulas = {
        "k1": lambda x: -math.log(x),
        "k2": lambda x: math.log(x) ** 2 / 2,
        "k3": lambda x: x - 1 - math.log(x),
    }
    result = kl.estimate_kl(estimator, b.logps, b.ref_logps)
    ratios = (b.ref_logps.exp() / b.logps.exp()).flatten().tolist()  # π_ref / π_θ
    formula = torch.tensor([formulas[estimator](x) for x in ratios]).double().view_as(result)
    torch.testing.assert_close(result, formula, **oracles.FLOAT32)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    _, logps, _, ref = three_policies()
    estimate = expected(kl.estimate_kl(estimator, logps, ref), logps)
    torch.testing.assert_close(estimate, divergence(logps, ref), **oracles.FLOAT64)


def test_k2_is_biased():
    _, logps, _, ref = three_policies()
    assert (expected(kl.k2(logps, ref), logps) - divergence(logps, ref)).abs() > 0.01


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_k1_is(estimator):
    b = oracles.batch()
    assert kl.estimate_kl(estimator, b.logps, b.ref_logps).min() >= 0
    assert kl.k1(b.logps, b.ref_logps).min() < 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_is_0_for_equal_policies(estimator):
    b = oracles.batch()
    assert not kl.estimate_kl(estimator, b.logps, b.logps).any()


def test_k3_keeps_its_digits_in_float32():
    """exp(x) − 1 − x in float32 is all rounding error at x = 1e-3."""
    logps, ref = torch.tensor([-1e-3]), torch.tensor([0.0])
    assert kl.k3(logps, ref).item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


# Gradients on policy, in expectation


def test_gradient_of_k1_is_zero():
    logits, logps, _, ref = three_policies()
    torch.testing.assert_close(
        gradient(expected(kl.k1(logps, ref), logps), logits), torch.zeros_like(logits), **oracles.FLOAT64
    )


def test_gradient_of_k2_is_that_of_kl_from_the_policy():
    logits, logps, _, ref = three_policies()
    torch.testing.assert_close(
        gradient(expected(kl.k2(logps, ref), logps), logits),
        gradient(divergence(logps, ref), logits),
        **oracles.FLOAT64,
    )


def test_gradient_of_k3_is_that_of_kl_from_the_reference():
    logits, logps, _, ref = three_policies()
    result = gradient(expected(kl.k3(logps, ref), logps), logits)
    torch.testing.assert_close(result, gradient(divergence(ref, logps), logits), **oracles.FLOAT64)
    assert (result - gradient(divergence(logps, ref), logits)).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_k1_and_k3_weighted_by_the_ratio_have_the_value_and_gradient_of_kl_from_the_policy(estimator, on_policy):
    logits, logps, old, ref = three_policies()
    old = logps.detach() if on_policy else old
    estimate = expected(policy_ratio(logps, old) * kl.estimate_kl(estimator, logps, ref), old)
    exact = divergence(logps, ref)
    torch.testing.assert_close(estimate, exact, **oracles.FLOAT64)
    torch.testing.assert_close(gradient(estimate, logits), gradient(exact, logits), **oracles.FLOAT64)


def test_old_policy_kl_is_unbiased_and_so_is_its_gradient():
    logits, logps, old, _ = three_policies()
    estimate, exact = expected(kl.old_policy_kl(logps, old), old), divergence(old, logps)
    torch.testing.assert_close(estimate, exact, **oracles.FLOAT64)
    torch.testing.assert_close(gradient(estimate, logits), gradient(exact, logits), **oracles.FLOAT64)


# Masks and names


@pytest.mark.parametrize("garbage", oracles.GARBAGE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_mask_keeps_garbage_out_of_values_and_gradients(estimator, garbage):
    b = oracles.batch()
    clean, dirty = (oracles.with_garbage(b.logps, b.mask, x).requires_grad_() for x in (0.0, garbage))
    results = [kl.estimate_kl(estimator, logps, b.ref_logps, b.mask) for logps in (clean, dirty)]
    assert torch.equal(*results)
    for result in results:
        result.sum().backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert not dirty.grad[~b.mask].any()


def test_an_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'k4'; choose one of k1, k2, k3"):
        kl.estimate_kl("k4", torch.zeros(1, 1), torch.zeros(1, 1))


# The whole vocabulary


def two_heads(tokens=10, width=4, ref_width=3, vocabulary=11):
    """Hidden states and heads of a policy and of a narrower reference."""
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    ref_hidden = torch.randn(tokens, ref_width, dtype=torch.float64, requires_grad=True)
    heads = [torch.nn.Linear(size, vocabulary, dtype=torch.float64) for size in (width, ref_width)]
    return hidden, heads[0], ref_hidden, heads[1]


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 1024])
def test_full_kl_and_its_gradients_equal_the_dense_sum_for_any_chunk_size(chunk_size):
    hidden, head, ref_hidden, ref_head = two_heads()
    trained = [hidden, *head.parameters()]
    weights = torch.randn(10, dtype=torch.float64)
    chunked = kl.full_kl(hidden, head, ref_hidden, ref_head, chunk_size=chunk_size)
    dense = divergence(head(hidden), ref_head(ref_hidden).detach())
    torch.testing.assert_close(chunked, dense, **oracles.FLOAT64)
    gradients = (torch.autograd.grad((weights * x).sum(), trained) for x in (chunked, dense))
    for result, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(result, exact, **oracles.FLOAT64)


def test_full_kl_never_reaches_the_reference():
    hidden, head, ref_hidden, ref_head = two_heads()
    kl.full_kl(hidden, head, ref_hidden, ref_head, chunk_size=4).sum().backward()
    assert hidden.grad is not None
    assert ref_hidden.grad is None
    assert all(parameter.grad is None for parameter in ref_head.parameters())


def test_full_kl_is_0_against_itself_even_with_one_head_for_both():
    hidden, head, _, _ = two_heads()
    result = kl.full_kl(hidden, head, hidden, head)
    torch.testing.assert_close(result, torch.zeros_like(result), **oracles.FLOAT64)


def test_full_kl_keeps_nothing_of_vocabulary_size_for_the_backward_pass():
    saved, seen = [], []
    hidden, head, ref_hidden, ref_head = two_heads(vocabulary=11)
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        kl.full_kl(hidden, head, ref_hidden, ref_head, chunk_size=4)
    assert seen == [4, 4, 2]
    assert not [shape for shape in saved if 11 in shape]


def test_full_kl_of_half_precision_logits_is_computed_in_float32():
    hidden, head, ref_hidden, ref_head = (part.to(torch.bfloat16) for part in two_heads())
    result = kl.full_kl(hidden, head, ref_hidden, ref_head)
    logits = [h(x).detach().float() for h, x in ((head, hidden), (ref_head, ref_hidden))]
    torch.testing.assert_close(result, divergence(*logits), **oracles.FLOAT32)


def test_full_kl_refuses_chunks_of_nothing_and_unequal_tokens():
    hidden, head, ref_hidden, ref_head = two_heads()
    with pytest.raises(ValueError, match="chunk_size is 0; at least 1"):
        kl.full_kl(hidden, head, ref_hidden, ref_head, chunk_size=0)
    with pytest.raises(ValueError, match="hidden has 10 tokens and ref_hidden 9"):
        kl.full_kl(hidden, head, ref_hidden[:9], ref_head)
