"""The PPO loss (Schulman 2017, arXiv:1707.06347): its terms per token, then their means and total.

Symbols: B sequences, T response tokens; `mask` is (B, T) bool, True = counts. A term is one number per token until one
reduction: the sum over the tokens that count, divided by `num_tokens`, the count of the whole optimizer batch (all
micro-batches, all ranks). Neither the loss nor its gradient then depends on how that batch is cut. The entropy comes
with the log-probabilities, from the scoring head; `ppo/terms.py` has the table of the terms, with their signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masked import masked_sum, require_shape, zero_masked
from .kl import old_policy_kl
from .terms import TERMS, PPOCoefficients


def policy_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Factor by which a token has become likelier since it was sampled (Schulman 2017, §3).

    ratio = π_θ / π_old = exp(logps − old_logps), (B, T), no unit
    """
    return (logps - old_logps).exp()


def clip_objective(
    ratio: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's pessimistic bound on the improvement of the policy, to be maximised (Schulman 2017, eq. 7).

    min(ratio · A, clip(ratio, 1 − cliprange, 1 + cliprange) · A), (B, T), in the unit of the advantages

    `cliprange_high` takes the place of the upper `cliprange` (clip-higher: DAPO, arXiv:2503.14476). Where A < 0, the
    bound is at least dual_clip · A, however likely the token has become (Ye 2020, arXiv:1912.09729, eq. 5).
    """
    high = cliprange if cliprange_high is None else cliprange_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + high) * advantages)
    if dual_clip is None:
        return objective
    return torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)


def clipped_tokens(
    ratio: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """True where `clip_objective` is on a clipped, constant branch, so that the token has no policy gradient.

    A > 0 and ratio > 1 + cliprange_high, or A < 0 and ratio < 1 − cliprange or > dual_clip, (B, T) bool
    """
    high = cliprange if cliprange_high is None else cliprange_high
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - cliprange))
    return clipped if dual_clip is None else clipped | ((advantages < 0) & (ratio > dual_clip))


def mask_objective(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float, cliprange_high: float | None = None
) -> Tensor:
    """The double-sided mask of SAO (arXiv:2607.07508, eq. 3), to be maximised: no bound, but a trusted range.

    ratio · A where 1 − cliprange ≤ ratio ≤ 1 + cliprange_high, else 0 and without gradient, for either sign of A;
    (B, T), in the unit of the advantages. ratio is `policy_ratio`. `cliprange_high` unset is `cliprange`.
    """
    outside = masked_tokens(policy_ratio(logps, old_logps).detach(), cliprange, cliprange_high)
    # Before the exponential: one that overflows gives a nan gradient even if it is masked afterwards.
    ratio = (logps - old_logps).masked_fill(outside, 0).exp()
    return (ratio * advantages).masked_fill(outside, 0)


def masked_tokens(ratio: Tensor, cliprange: float, cliprange_high: float | None = None) -> Tensor:
    """True where `mask_objective` is 0, since the ratio is outside the trusted range. (B, T) bool."""
    high = cliprange if cliprange_high is None else cliprange_high
    return (ratio < 1 - cliprange) | (ratio > 1 + high)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Squared error of the critic, to be minimised (L^VF of Schulman 2017, eq. 9, halved).

    ½ (V − R)², (B, T), in squared units of the score
    """
    return 0.5 * (values - returns).square()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:
    """`value_loss` that pays nothing for moving V further than `cliprange_value` from where it was (OpenAI baselines).

    ½ max((V − R)², (clip(V, V_old − cliprange_value, V_old + cliprange_value) − R)²), (B, T)
    """
    clipped = _clip_around(values, old_values, cliprange_value)
    return torch.maximum(value_loss(values, returns), value_loss(clipped, returns))


def clipped_values(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:
    """True where the maximum is on the clipped, constant branch, so that the critic has no gradient. (B, T) bool."""
    clipped = _clip_around(values, old_values, cliprange_value)
    return value_loss(clipped, returns) > value_loss(values, returns)


def _clip_around(values: Tensor, old_values: Tensor, cliprange_value: float) -> Tensor:
    """Return V, moved to the edge of V_old ± cliprange_value if it is outside."""
    return values.clamp(old_values - cliprange_value, old_values + cliprange_value)


# ---- Means and total ----


@dataclass(frozen=True)
class PPOTerms:
    """The loss of one micro-batch and the terms it is made of.

    total = −clip_objective + coef.kl·kl + coef.vf·value_loss − coef.entropy·entropy
            + coef.old_kl·old_kl + coef.aux·aux_loss
            + coef.positive_nll·positive_nll

    All are scalars. `total` keeps its graph, the others are detached. Each is a sum over this micro-batch's tokens
    divided by `num_tokens` of the whole optimizer batch, so that adding over micro-batches and ranks gives the mean
    per token. Three differ: `ratio_max` is a maximum, to be combined by a maximum (−inf without tokens); `aux_loss` is
    already multiplied by its weight, and adds up to its mean; `positive_nll` is divided by `num_positive`. `kl` and
    `old_kl` are in nats per token, fractions are of tokens.
    """

    total: Tensor
    clip_objective: Tensor
    kl: Tensor | None
    value_loss: Tensor
    entropy: Tensor
    old_kl: Tensor
    aux_loss: Tensor | None
    positive_nll: Tensor | None
    ratio_mean: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor
    value_clip_fraction: Tensor


def ppo_terms(
    *,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    num_tokens: float | Tensor,
    coef: PPOCoefficients,
    cliprange: float,
    entropy: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    policy_objective: str = "clip",
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    cliprange_value: float | None = None,
    sampling_logps: Tensor | None = None,
    kl: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    aux_loss: Tensor | None = None,
    aux_weight: float | Tensor = 1.0,
    positive: Tensor | None = None,
    num_positive: float | Tensor = 0.0,
) -> PPOTerms:
    """Return the PPO loss of one micro-batch with its terms; see `PPOTerms` for the formula.

    - `logps`, `old_logps`, `advantages`, `entropy`, `values`, `old_values`, `returns`, `kl`: (B, T), one number per
      token. `kl` is an estimate of KL(π_θ ‖ π_ref) made with the same mask (`estimate_kl(..., mask)`), or None.
    - `num_tokens`: tokens that count in the whole optimizer batch. If it is 0, so are all terms.
    - `policy_objective`: "clip" for `clip_objective`, "mask" for `mask_objective`, which explain `cliprange_high` and
      `dual_clip`.
    - `cliprange_value`: None for the plain `value_loss`.
    - `sampling_logps`: (B, T), in the ratio's denominator in place of `old_logps`.
    - `importance_sampling_ratio`: (B, T) or (B, 1), multiplies the clipped objective; corrects for an inference engine
      whose probabilities differ from the trainer's, as in GRPO.
    - `aux_loss`: scalar. `aux_weight` is this micro-batch's share of the optimizer batch.
    - `positive`: (B,) bool, the responses to imitate, with `num_positive` tokens that count in the whole optimizer
      batch.
    """
    per_token = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "entropy": entropy}
    per_token |= {"values": values, "old_values": old_values, "returns": returns}
    given = {"kl": kl, "sampling_logps": sampling_logps}
    require_shape(mask, **per_token, **{name: tensor for name, tensor in given.items() if tensor is not None})
    # Masked first: an exponential that overflows gives a nan gradient even if it is masked afterwards.
    logps, old_logps, advantages, values, old_values, returns = (
        zero_masked(tensor, mask) for tensor in (logps, old_logps, advantages, values, old_values, returns)
    )
    sampled_by = old_logps if sampling_logps is None else zero_masked(sampling_logps, mask)
    ratio = policy_ratio(logps, sampled_by)
    if policy_objective == "mask":
        objective = mask_objective(logps, sampled_by, advantages, cliprange, cliprange_high)
        without_gradient = masked_tokens(ratio, cliprange, cliprange_high)
    elif policy_objective == "clip":
        objective = clip_objective(ratio, advantages, cliprange, cliprange_high, dual_clip)
        without_gradient = clipped_tokens(ratio, advantages, cliprange, cliprange_high, dual_clip)
    else:
        raise ValueError(f"policy_objective is {policy_objective!r}; it must be 'clip' or 'mask'.")
    if importance_sampling_ratio is not None:
        objective = objective * zero_masked(importance_sampling_ratio.expand_as(mask), mask)
    value_error, value_clipped = value_errors(values, old_values, returns, cliprange_value)

    divisor = torch.as_tensor(num_tokens, device=mask.device).clamp(min=1)

    def mean(term: Tensor) -> Tensor:
        return masked_sum(term, mask) / divisor

    means: dict[str, Tensor | None] = {
        "clip_objective": mean(objective),
        "value_loss": mean(value_error),
        "entropy": mean(entropy),
        "old_kl": mean(old_policy_kl(logps, old_logps)),
        "kl": None if kl is None else mean(kl),
        "aux_loss": None if aux_loss is None else aux_loss * aux_weight,
        "positive_nll": None,
    }
    if positive is not None:
        of_positive = torch.as_tensor(num_positive, device=mask.device).clamp(min=1)
        means["positive_nll"] = masked_sum(-logps, mask & positive.unsqueeze(1)) / of_positive
    ratio = ratio.detach()
    detached: dict[str, Any] = {name: None if term is None else term.detach() for name, term in means.items()}
    return PPOTerms(
        **detached,
        total=_total(means, coef),
        ratio_mean=mean(ratio),
        ratio_max=torch.where(mask, ratio, -torch.inf).max(),
        clip_fraction=mean(without_gradient),
        value_clip_fraction=mean(value_clipped),
    )


def value_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor]:
    """Return the value loss of each token, (B, T), and where it is clipped, (B, T) bool."""
    if cliprange_value is None:
        return value_loss(values, returns), torch.zeros_like(values, dtype=torch.bool)
    clipped = clipped_values(values, old_values, returns, cliprange_value)
    return clipped_value_loss(values, old_values, returns, cliprange_value), clipped


def _total(means: Mapping[str, Tensor | None], coef: PPOCoefficients) -> Tensor:
    """Return what the optimizer minimises; a term that is None is not part of it."""
    return sum(coef.of(term) * mean for term in TERMS if (mean := means[term.name]) is not None)  # type: ignore[return-value]
