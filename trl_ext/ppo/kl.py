"""KL divergences: estimators per token, the exact sum over the vocabulary, and the controllers of a KL coefficient.

Symbols: B sequences, T response tokens, N any tokens, V vocabulary, H hidden size; `logps`, `ref_logps`, `old_logps`
are the (B, T) log-probabilities of the sampled tokens under the policy, the reference and the policy that sampled
them. Everything is in nats. KL(π_θ ‖ π_ref) is the leash to the reference; KL[π_old ‖ π_θ] measures one update: two
quantities, two coefficients.

What an estimator does depends on where it stands. In the reward its value counts: k1 and k3 are unbiased, k2 is not.
In the loss its gradient counts, in expectation over tokens sampled from π_θ: k1 gives 0, k2 gives ∇KL(π_θ ‖ π_ref), k3
gives ∇KL(π_ref ‖ π_θ); multiplied by the ratio π_θ / π_old, k1 and k3 give ∇KL(π_θ ‖ π_ref), from samples of π_old
too.

A new estimator is a function and a line in `IN_THE_LOSS`, `IN_THE_REWARD` or both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..masked import zero_masked


LMHead = Callable[[Tensor], Tensor]
"""(n, H) hidden states to (n, V) logits, already divided by the sampling temperature."""


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio estimate of KL(π_θ ‖ π_ref): unbiased, of either sign (Schulman 2020, "Approximating KL Divergence").

    logps − ref_logps, (B, T), nats per token. Its gradient is zero in expectation: it belongs in the reward.
    """
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Squared log-ratio estimate of KL(π_θ ‖ π_ref): biased, small and never negative (Schulman 2020).

    ½ (logps − ref_logps)², (B, T), nats per token. Its expected gradient is that of KL(π_θ ‖ π_ref): the choice for
    the loss.
    """
    return 0.5 * (logps - ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Bregman estimate of KL(π_θ ‖ π_ref): unbiased and never negative (Schulman 2020; GRPO, arXiv:2402.03300, eq. 4).

    exp(ref_logps − logps) − 1 − (ref_logps − logps), (B, T), nats per token. Its expected gradient is that of the
    reverse direction, KL(π_ref ‖ π_θ).
    """
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


# The estimators by where they may stand; `full_kl` may stand in the loss, too.
IN_THE_LOSS = {"k2": k2, "k3": k3}
IN_THE_REWARD = {"k1": k1, "k2": k2, "k3": k3}


def estimate_kl(estimator: str, logps: Tensor, ref_logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(π_θ ‖ π_ref) per token by the estimator of that name, such as "k1". (B, T), nats.

    With `mask` (bool, True = counts) the other positions give 0 and no gradient. Without it k3 may overflow at a
    padded position, and an infinite value gives a nan gradient even where it is masked afterwards.
    """
    estimators = IN_THE_REWARD | IN_THE_LOSS
    if estimator not in estimators:
        raise ValueError(f"The KL estimator is {estimator!r}; choose one of {', '.join(estimators)}.")
    if mask is not None:
        logps, ref_logps = zero_masked(logps, mask), zero_masked(ref_logps, mask)
    return estimators[estimator](logps, ref_logps)


def old_policy_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """How far an update has moved the policy: KL[π_old ‖ π_θ] (S1 §4.2.3; Schulman 2017, arXiv:1707.06347, §4).

    (ratio − 1) − log ratio, with ratio = exp(logps − old_logps), (B, T), nats per token. Tokens come from π_old, so
    this is unbiased, and so is its gradient. It is k3 with the roles of the two policies exchanged.
    """
    return k3(old_logps, logps)


def full_kl(
    hidden: Tensor, lm_head: LMHead, ref_hidden: Tensor, ref_lm_head: LMHead, chunk_size: int = 1024
) -> Tensor:
    """KL(π_θ ‖ π_ref) at each token, summed over the whole vocabulary instead of estimated from the sampled token.

    Σ_v p_v (log p_v − log ref_p_v), (N,), nats per token

    `hidden` is (N, H) and `ref_hidden` (N, H'): the two models may differ in width. Logits are finite. Only
    `chunk_size` tokens have logits at a time: each chunk is computed again in the backward pass. The gradient reaches
    `hidden` and the parameters of `lm_head`, never the reference.
    """
    _require(chunk_size >= 1, f"chunk_size is {chunk_size}; at least 1 token per chunk is needed.")
    _require(
        len(hidden) == len(ref_hidden),
        f"hidden has {len(hidden)} tokens and ref_hidden {len(ref_hidden)}; both need one row for each token.",
    )

    def chunk_kl(states: Tensor, ref_states: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = _log_softmax(ref_lm_head(ref_states))
        logps = _log_softmax(lm_head(states))
        return (logps.exp() * (logps - ref_logps)).sum(-1)

    chunks = zip(hidden.split(chunk_size), ref_hidden.detach().split(chunk_size), strict=True)
    return torch.cat([checkpoint(chunk_kl, *chunk, use_reentrant=False) for chunk in chunks])


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class KLController(Protocol):
    """What the trainer asks of a controller: a coefficient, moved once per rollout."""

    coef: float

    def update(self, kl: float, episodes: int) -> None:
        """Move `coef` after a rollout of `episodes` sequences whose measured KL was `kl`."""


@dataclass
class FixedController:
    """A coefficient that stays as it is. 0 switches the term off."""

    coef: float

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.coef) and self.coef >= 0, f"coef is {self.coef}; it must be finite and at least 0."
        )

    def update(self, kl: float, episodes: int) -> None:
        """Only check that the KL is a number."""
        _require_finite(kl)


@dataclass
class ProportionalController:
    """Steer the KL to a target in proportion to the relative error (Ziegler 2019, arXiv:1909.08593, §2.2).

    coef ← coef · (1 + clip(kl / target − 1, −0.2, 0.2) · episodes / horizon), once per rollout

    `target` is in the unit of the KL that is passed, nats per sequence in the paper; `horizon` is in episodes: a KL
    that is 20% too large doubles the coefficient in about 3.5 horizons.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _require_can_move(self.coef)
        _require(self.target > 0, f"target is {self.target}; a KL above 0 is needed to steer to.")
        _require(self.horizon > 0, f"horizon is {self.horizon}; a number of episodes above 0 is needed.")

    def update(self, kl: float, episodes: int) -> None:
        """Multiply `coef` by a factor near 1."""
        _require_finite(kl)
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        factor = 1 + error * episodes / self.horizon
        _require(
            factor > 0,
            f"A rollout of {episodes} episodes with horizon {self.horizon} multiplies coef by {factor:.3g}; "
            f"it must stay positive: set horizon above {0.2 * episodes:g}.",
        )
        self.coef *= factor


@dataclass
class BandController:
    """Keep the KL inside a band: halve the coefficient below it, double it above (S1 §6.2: 0.5 to 2).

    coef ← coef / 2 if kl < low;  coef · 2 if kl > high;  else unchanged. KL(π_θ ‖ π_ref) in nats per sequence.
    """

    coef: float
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        _require_can_move(self.coef)
        _require(self.low < self.high, f"low is {self.low} and high is {self.high}; low must be below high.")

    def update(self, kl: float, episodes: int) -> None:
        """Halve, double or leave `coef`."""
        _require_finite(kl)
        self.coef *= _halve_or_double(kl, self.low, self.high)


@dataclass
class SchulmanController:
    """The adaptive β of PPO's penalty form (S1 §4.2.3; Schulman 2017, arXiv:1707.06347, §4).

    coef ← coef / 2 if kl < target / 1.5;  coef · 2 if kl > target · 1.5;  else unchanged. KL[π_old ‖ π_θ] in nats per
    token.
    """

    coef: float
    target: float

    def __post_init__(self) -> None:
        _require_can_move(self.coef)
        _require(self.target > 0, f"target is {self.target}; a KL above 0 is needed to steer to.")

    def update(self, kl: float, episodes: int) -> None:
        """Halve, double or leave `coef`."""
        _require_finite(kl)
        self.coef *= _halve_or_double(kl, self.target / 1.5, self.target * 1.5)


def _halve_or_double(kl: float, low: float, high: float) -> float:
    """The factor ½ below `low`, 2 above `high`, 1 between them."""
    return 0.5 if kl < low else 2.0 if kl > high else 1.0


def _require_can_move(coef: float) -> None:
    """Raise for a coefficient that no factor can change."""
    _require(
        math.isfinite(coef) and coef > 0,
        f"coef is {coef}; an adaptive controller multiplies it, so it must start above 0: use FixedController for 0.",
    )


def _require_finite(kl: float) -> None:
    """Raise for a KL that cannot steer anything."""
    _require(
        math.isfinite(kl),
        f"The measured KL is {kl}; a finite number is needed. Training has diverged: lower the learning rate, or "
        "start again from the last good checkpoint.",
    )


def _require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(message)
