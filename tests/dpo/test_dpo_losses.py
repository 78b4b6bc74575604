"""The mathematics of DPO against closed forms, slow loops and autograd, in float64."""

import math

import pytest
import torch

import oracles
from trl_ext.dpo import losses


MARGINS = torch.tensor([-800.0, -3.0, -0.4, 0.0, 1e-3, 2.0, 30.0, 800.0], dtype=torch.float64)
LOGRATIOS = torch.tensor([-6.0, -1.3, -1e-3, 0.0, 0.4, 2.5, 7.0], dtype=torch.float64)


def rewards(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 64, generator=generator, dtype=torch.float64) * 3


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **oracles.FLOAT64)


def test_implicit_reward_is_beta_times_the_log_of_the_quotient():
    policy, reference = [0.5, 0.01, 0.2], [0.25, 0.02, 0.2]
    logps, ref_logps = (torch.tensor(p, dtype=torch.float64).log() for p in (policy, reference))
    expected = [0.3 * math.log(p / q) for p, q in zip(policy, reference, strict=True)]
    close(losses.implicit_reward(logps, ref_logps, 0.3), expected)


def test_preference_probability_is_the_share_of_two_strengths():
    """Bradley-Terry as it was written first: e^r_w / (e^r_w + e^r_l)."""
    chosen, rejected = rewards()
    expected = [
        math.exp(good) / (math.exp(good) + math.exp(bad))
        for good, bad in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    close(losses.preference_probability(chosen, rejected), expected)


def test_preference_probabilities_of_both_orders_sum_to_1_and_ignore_a_constant():
    chosen, rejected = rewards()
    forward = losses.preference_probability(chosen, rejected)
    close(forward + losses.preference_probability(rejected, chosen), torch.ones_like(chosen))
    close(losses.preference_probability(chosen + 5, rejected + 5), forward)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.45])
def test_dpo_loss_is_the_cross_entropy_of_smoothed_labels(label_smoothing):
    chosen, rejected = rewards()
    expected = []
    for good, bad in zip(chosen.tolist(), rejected.tolist(), strict=True):
        p = oracles.sigmoid(good - bad)
        expected.append(-(1 - label_smoothing) * math.log(p) - label_smoothing * math.log(1 - p))
    close(losses.dpo_loss(chosen, rejected, label_smoothing), expected)


def test_dpo_loss_is_log_2_at_the_reference_whatever_the_smoothing():
    zero = torch.zeros(3, dtype=torch.float64)
    for label_smoothing in (0.0, 0.3):
        close(losses.dpo_loss(zero, zero, label_smoothing), [math.log(2)] * 3)


def test_dpo_loss_of_both_orders_differs_by_the_margin():
    """log σ(m) − log σ(−m) = m; with ε, (1 − 2ε) m."""
    chosen, rejected = rewards()
    for label_smoothing in (0.0, 0.2):
        apart = losses.dpo_loss(rejected, chosen, label_smoothing) - losses.dpo_loss(chosen, rejected, label_smoothing)
        close(apart, (1 - 2 * label_smoothing) * (chosen - rejected))


def test_dpo_loss_with_smoothing_is_least_where_the_margin_says_the_share_of_right_labels():
    """At σ(m) = 1 − ε: a wider margin costs again."""
    label_smoothing = 0.1
    best = math.log((1 - label_smoothing) / label_smoothing)
    margins = torch.tensor([best - 0.01, best, best + 0.01], dtype=torch.float64)
    at = losses.dpo_loss(margins, torch.zeros_like(margins), label_smoothing)
    assert at[1] < at[0]
    assert at[1] < at[2]


def test_dpo_loss_and_weight_stay_finite_for_margins_that_exp_cannot_hold():
    zero = torch.zeros_like(MARGINS)
    loss = losses.dpo_loss(MARGINS, zero)
    assert torch.isfinite(loss).all()
    assert loss[0] == 800
    assert torch.isfinite(losses.gradient_weight(MARGINS, zero)).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.45])
def test_gradient_weight_is_minus_the_derivative_by_the_margin(label_smoothing):
    margins = MARGINS.clone().requires_grad_()
    losses.dpo_loss(margins, torch.zeros_like(MARGINS), label_smoothing).sum().backward()
    close(losses.gradient_weight(MARGINS, torch.zeros_like(MARGINS), label_smoothing), -margins.grad)


def test_gradient_weight_times_beta_scales_the_gradient_of_the_log_probabilities():
    """∂loss/∂log π(y_w) = −β · weight, ∂loss/∂log π(y_l) = β · weight (Rafailov 2023 §4)."""
    logps, ref_logps = rewards(1).requires_grad_(), rewards(2)
    chosen, rejected = losses.implicit_reward(logps, ref_logps, 0.3)
    losses.dpo_loss(chosen, rejected).sum().backward()
    weight = losses.gradient_weight(chosen, rejected).detach()
    close(logps.grad, torch.stack([-0.3 * weight, 0.3 * weight]))


# f-divergences: f of each, from its definition; its derivative must be the score.

F_DIVERGENCES = {
    ("reverse_kl", 0.5): lambda u: u * u.log(),
    ("forward_kl", 0.5): lambda u: -u.log() + u,
    # JS: u log u − (u + 1) log((u + 1)/2)
    ("js_divergence", 0.5): lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    ("alpha_divergence", 0.5): lambda u: (u.pow(0.5) - 0.5 * u - 0.5) / (0.5 * -0.5),
    ("alpha_divergence", 2.0): lambda u: (u.pow(2.0) - 2.0 * u + 1.0) / 2.0,
    ("alpha_divergence", 1.0): lambda u: u * u.log(),
}


@pytest.mark.parametrize("name, alpha", F_DIVERGENCES)
def test_divergence_score_is_the_derivative_of_the_divergence(name, alpha):
    """f'(π_θ/π_ref) up to a constant, which cancels in a pair."""
    ratio = LOGRATIOS.exp().requires_grad_()
    F_DIVERGENCES[name, alpha](ratio).sum().backward()
    score = losses.divergence_score(LOGRATIOS, name, alpha)
    close(score - score[3], ratio.grad - ratio.grad[3])


@pytest.mark.parametrize("name, alpha", F_DIVERGENCES)
def test_divergence_score_has_the_constants_of_trl(name, alpha):
    """TRL's formulas, written for a ratio t: 1 − 1/t, log(2t/(t + 1)), (t^(α−1) − 1)/(α − 1), log t."""
    expected = []
    for x in LOGRATIOS.tolist():
        t = math.exp(x)
        if name == "forward_kl":
            expected.append(1 - 1 / t)
        elif name == "js_divergence":
            expected.append(math.log(2 * t / (t + 1)))
        elif name == "alpha_divergence" and alpha != 1:
            expected.append((t ** (alpha - 1) - 1) / (alpha - 1))
        else:
            expected.append(math.log(t))
    close(losses.divergence_score(LOGRATIOS, name, alpha), expected)


def test_alpha_divergence_tends_to_the_log_ratio_and_at_0_to_the_forward_kl():
    torch.testing.assert_close(
        losses.divergence_score(LOGRATIOS, "alpha_divergence", 1 + 1e-5), LOGRATIOS, rtol=1e-4, atol=1e-5
    )
    forward = losses.divergence_score(LOGRATIOS, "forward_kl")
    close(losses.divergence_score(LOGRATIOS, "alpha_divergence", 0.0), forward)


def test_divergence_score_stays_finite_where_exp_would_not():
    score = losses.divergence_score(torch.tensor([200.0]), "alpha_divergence", 2.0)
    assert torch.isfinite(score).all()
