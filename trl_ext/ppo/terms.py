"""The terms of the PPO loss: one table of them, their coefficients, and their means and total over a micro-batch.

Symbols: B sequences, T response tokens; `mask` is (B, T) bool, True = counts. A term is one number per token until one
reduction: the sum over the tokens that count, divided by `num_tokens`, the count of the whole optimizer batch (all
micro-batches, all ranks). Neither the loss nor its gradient then depends on how that batch is cut.

Signs: what is maximised (`clip_objective`, `entropy`) is subtracted from the total, what is minimised is added.
Schulman 2017 (arXiv:1707.06347, eq. 9) writes the negative of this total: L^CLIP − c1·L^VF + c2·S.

A new term is a function of `ppo/losses.py`, a line in `TERMS`, a field of `PPOCoefficients`, one of `PPOTerms`, and a
line in `ppo_terms`. The total, the log, the model card, the report and the option's help follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masked import masked_sum, require_shape, zero_masked
from .kl import old_policy_kl
from .losses import (
    clip_objective,
    clipped_tokens,
    clipped_value_loss,
    clipped_values,
    mask_objective,
    masked_tokens,
    policy_ratio,
    value_loss,
)


@dataclass(frozen=True)
class Term:
    """
    One term of the loss.

    Args:
        name: its field of `PPOTerms`; logged as `terms/<name>`.
        formula: in the notation of docs/ppo.md.
        unit: of its mean.
        coefficient: its field of `PPOCoefficients`, logged as `coef/<coefficient>`; empty for the one of weight 1.
        option: of `PPOConfigX`, or of the model's config, that sets the coefficient.
        maximised: whether it is subtracted from the total.
        optional: whether only runs that use it log it and its coefficient.
    """

    name: str
    formula: str
    unit: str
    coefficient: str = ""
    option: str = ""
    maximised: bool = False
    optional: bool = False

    @property
    def sign(self) -> int:
        """Its sign in the total."""
        return -1 if self.maximised else 1

    @property
    def contribution(self) -> str:
        """Its contribution to the total, such as "−ent_coef · entropy"."""
        return f"{'−' if self.maximised else ''}{f'{self.option} · ' if self.option else ''}{self.name}"


TERMS = (
    Term("clip_objective", "min(ratio · Â, clip(ratio, 1 ± ε) · Â)", "unit of Â", maximised=True),
    Term("kl", "KL(π_θ ‖ π_ref)", "nats per token", "kl", "kl_coef"),
    Term("value_loss", "½ (V − R)²", "squared unit of the score", "vf", "vf_coef"),
    Term("entropy", "−Σ p log p", "nats per token", "entropy", "ent_coef", maximised=True),
    Term("old_kl", "KL[π_old ‖ π_θ]", "nats per token", "old_kl", "old_kl_coef"),
    Term(
        "aux_loss", "load balance of the experts", "as the model has it", "aux", "router_aux_loss_coef", optional=True
    ),
    Term(
        "positive_nll",
        "−log π of good responses",
        "nats per token",
        "positive_nll",
        "positive_nll_coef",
        optional=True,
    ),
)
WEIGHTED = tuple(term for term in TERMS if term.coefficient)
# Option -> what it is the coefficient of, for help texts.
WEIGHED_BY = {term.option: f"{term.formula}, {term.unit}" for term in WEIGHTED}


def total_in_words(terms: Sequence[Term] = TERMS) -> str:
    """Return the total as a formula: "−clip_objective + kl_coef·kl + …"."""
    parts = [
        f"{'−' if term.maximised else '+'} {f'{term.option}·' if term.option else ''}{term.name}" for term in terms
    ]
    return " ".join(parts).replace("− ", "−", 1)


@dataclass(frozen=True)
class PPOCoefficients:
    """The weights of the terms, none of them negative; the clipped objective has weight 1.

    `vf` is c1 and `entropy` c2 of Schulman 2017 eq. 9, `old_kl` the β of its eq. 8 (arXiv:1707.06347); `kl` weighs the
    distance to π_ref; `aux` weighs the model's own
    auxiliary loss, such as load balancing of experts, and `positive_nll` is VAPO's μ.
    """

    kl: float = 0.0
    vf: float = 0.5
    entropy: float = 0.0
    old_kl: float = 0.0
    aux: float = 0.0
    positive_nll: float = 0.0

    def of(self, term: Term) -> float:
        """Return a term's factor in the total, negative if it is maximised."""
        return term.sign * (getattr(self, term.coefficient) if term.coefficient else 1.0)


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
