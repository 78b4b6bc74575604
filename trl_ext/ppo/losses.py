"""The mathematics of the PPO loss (Schulman 2017, arXiv:1707.06347): ratio, clipped objective, value loss, per token.

Symbols: B sequences, T response tokens. `ppo/terms.py` reduces and adds them; the entropy comes with the
log-probabilities, from the scoring head.
"""

import torch
from torch import Tensor


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
