"""The terms of the PPO loss, each a function, and `PPOTerms`, which holds them and their total.

Symbols: B sequences, T response tokens, V vocabulary; `mask` is (B, T) bool, True = counts. A term is one number per
token until one reduction: the sum over the tokens that count, divided by `num_tokens`, the count of the whole
optimizer batch (all micro-batches, all ranks). Neither the loss nor its gradient then depends on how that batch is
cut.

Signs: what is maximised (`clip_objective`, `entropy`) is subtracted from the total, what is minimised is added. S0
writes L^CLIP − αL^KL + βL^VF and S1 L_POLICY + c1·L_VF + c2·L_ENTROPY; both mix the two.

A new term is a function, a field of `PPOCoefficients`, one of `PPOTerms`, a line in `COEFFICIENT_OF` and one in
`ppo_terms`; its option is `<coefficient>_coef`. The total, the log and the report follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masked import masked_sum, require_shape, zero_masked
from .kl import old_policy_kl


# Terms of the total beside the clipped objective, and what weighs each: fields of `PPOTerms` and of `PPOCoefficients`.
COEFFICIENT_OF = {
    "kl": "kl",
    "value_loss": "vf",
    "entropy": "entropy",
    "old_kl": "old_kl",
    "aux_loss": "aux",
}
MAXIMISED = ("clip_objective", "entropy")
# The option of a coefficient is `<name>_coef`, but for these.
OPTION_OF = {"entropy": "ent_coef", "aux": "router_aux_loss_coef"}


def policy_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """How much likelier a token has become since it was sampled (S0, "PPO 的目标函数"; S1 §2.10).

    ratio = π_θ / π_old = exp(logps − old_logps), (B, T), no unit
    """
    return (logps - old_logps).exp()


def clip_objective(ratio: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """PPO's pessimistic bound on the improvement of the policy, to be maximised (S0; Schulman 2017, eq. 7).

    min(ratio · A, clip(ratio, 1 − cliprange, 1 + cliprange) · A), (B, T), in the unit of the advantages
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)


def clipped_tokens(ratio: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """Where the minimum takes the clipped, constant branch, so that the token has no policy gradient.

    A > 0 and ratio > 1 + cliprange, or A < 0 and ratio < 1 − cliprange, (B, T) bool
    """
    return ((advantages > 0) & (ratio > 1 + cliprange)) | ((advantages < 0) & (ratio < 1 - cliprange))


def reinforce_objective(logps: Tensor, advantages: Tensor) -> Tensor:
    """The policy gradient as an objective, to be maximised (S1 §2.5 and §2.6, with t inside its sum).

    logps · A, (B, T). Its gradient is that of `clip_objective` at ratio 1; its value means nothing.
    """
    return logps * advantages


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Squared error of the critic, to be minimised (S1 §2.10 and §4.2.2).

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
    """Where the maximum takes the clipped, constant branch, so that the critic has no gradient. (B, T) bool."""
    clipped = _clip_around(values, old_values, cliprange_value)
    return value_loss(clipped, returns) > value_loss(values, returns)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, a bonus, to be maximised (S1 §2.10, L_ENTROPY).

    −Σ_v p_v log p_v, (..., V) to (...), nats per token. Finite logits; divide them by the temperature first.
    """
    logps = torch.log_softmax(logits, dim=-1)
    return -(logps.exp() * logps).sum(-1)


@dataclass(frozen=True)
class PPOCoefficients:
    """The weights of the terms, none of them negative; the clipped objective has weight 1.

    `kl` is α and `vf` β in S0 (c1 in S1), `entropy` c2 and `old_kl` the β of S1 §4.2.3; `aux` weighs the model's own
    auxiliary loss, such as load balancing of experts.
    """

    kl: float = 0.0
    vf: float = 0.5
    entropy: float = 0.0
    old_kl: float = 0.0
    aux: float = 0.0

    def of(self, term: str) -> float:
        """Return what a term of `COEFFICIENT_OF` is multiplied by in the total: negative if it is maximised."""
        return sign(term) * getattr(self, COEFFICIENT_OF[term])


def sign(term: str) -> int:
    """−1 for a term that is maximised, so that it is subtracted from the total, 1 for one that is minimised."""
    return -1 if term in MAXIMISED else 1


def option_of(coefficient: str) -> str:
    """The option of `PPOConfigX` that sets a field of `PPOCoefficients`."""
    return OPTION_OF.get(coefficient, f"{coefficient}_coef")


@dataclass(frozen=True)
class PPOTerms:
    """The loss of one micro-batch and the terms it is made of.

    total = −clip_objective + coef.kl·kl + coef.vf·value_loss − coef.entropy·entropy
            + coef.old_kl·old_kl + coef.aux·aux_loss

    All are scalars. `total` keeps its graph, the others are detached. Each is a sum over this micro-batch's tokens
    divided by `num_tokens` of the whole optimizer batch, so that adding over micro-batches and ranks gives the mean
    per token. Two differ: `ratio_max` is a maximum, to be combined by a maximum (−inf without tokens); `aux_loss` is
    already multiplied by its weight, and adds up to its mean. `kl` and `old_kl` are in nats per token, fractions are
    of tokens.
    """

    total: Tensor
    clip_objective: Tensor
    kl: Tensor | None
    value_loss: Tensor
    entropy: Tensor
    old_kl: Tensor
    aux_loss: Tensor | None
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
    cliprange_value: float | None = None,
    kl: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    aux_loss: Tensor | None = None,
    aux_weight: float | Tensor = 1.0,
) -> PPOTerms:
    """The PPO loss of one micro-batch, every term named; see `PPOTerms` for the formula.

    - `logps`, `old_logps`, `advantages`, `entropy`, `values`, `old_values`, `returns`, `kl`: (B, T), one number per
      token. `kl` is an estimate of KL(π_θ ‖ π_ref) made with the same mask (`estimate_kl(..., mask)`), or None.
    - `num_tokens`: tokens that count in the whole optimizer batch. If it is 0, so are all terms.
    - `cliprange_value`: None for the plain `value_loss`.
    - `importance_sampling_ratio`: (B, T) or (B, 1), multiplies the clipped objective; corrects for an inference engine
      whose probabilities differ from the trainer's, as in GRPO.
    - `aux_loss`: scalar. `aux_weight` is this micro-batch's share of the optimizer batch.
    """
    per_token = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "entropy": entropy}
    per_token |= {"values": values, "old_values": old_values, "returns": returns}
    require_shape(mask, **per_token, **({} if kl is None else {"kl": kl}))
    # Masked first: an exponential that overflows gives a nan gradient even if it is masked afterwards.
    logps, old_logps, advantages, values, old_values, returns = (
        zero_masked(tensor, mask) for tensor in (logps, old_logps, advantages, values, old_values, returns)
    )
    ratio = policy_ratio(logps, old_logps)
    objective = clip_objective(ratio, advantages, cliprange)
    if importance_sampling_ratio is not None:
        objective = objective * zero_masked(importance_sampling_ratio.expand_as(mask), mask)
    value_error, value_clipped = _value_terms(values, old_values, returns, cliprange_value)

    divisor = torch.as_tensor(num_tokens, device=mask.device).clamp(min=1)

    def mean(term: Tensor) -> Tensor:
        return masked_sum(term, mask) / divisor

    weighted = {
        "value_loss": mean(value_error),
        "entropy": mean(entropy),
        "old_kl": mean(old_policy_kl(logps, old_logps)),
        "kl": None if kl is None else mean(kl),
        "aux_loss": None if aux_loss is None else aux_loss * aux_weight,
    }
    objective_mean, ratio = mean(objective), ratio.detach()
    detached: dict[str, Any] = {name: None if term is None else term.detach() for name, term in weighted.items()}
    return PPOTerms(
        **detached,
        total=_total(objective_mean, weighted, coef),
        clip_objective=objective_mean.detach(),
        ratio_mean=mean(ratio),
        ratio_max=torch.where(mask, ratio, -torch.inf).max(),
        clip_fraction=mean(clipped_tokens(ratio, advantages, cliprange)),
        value_clip_fraction=mean(value_clipped),
    )


def _total(objective: Tensor, terms: Mapping[str, Tensor | None], coef: PPOCoefficients) -> Tensor:
    """Return what the optimizer minimises; a term that is None is not part of it."""
    total = -objective
    for name, term in terms.items():
        total = total if term is None else total + coef.of(name) * term
    return total


def _value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor]:
    """The critic's error per token, and where its clip is active (nowhere if there is no range)."""
    if cliprange_value is None:
        return value_loss(values, returns), torch.zeros_like(values, dtype=torch.bool)
    arguments = (values, old_values, returns, cliprange_value)
    return clipped_value_loss(*arguments), clipped_values(*arguments)


def _clip_around(values: Tensor, old_values: Tensor, cliprange_value: float) -> Tensor:
    """V, moved to the edge of V_old ± cliprange_value if it is outside."""
    return values.clamp(old_values - cliprange_value, old_values + cliprange_value)
