"""The controllers of a KL coefficient: fixed, proportional (Ziegler 2019), band and Schulman's. Pure."""

import math
from dataclasses import dataclass
from typing import Protocol


class KLController(Protocol):
    """A coefficient that moves once per rollout."""

    coef: float

    def update(self, kl: float, episodes: int) -> None:
        """Move `coef` after a rollout of `episodes` sequences whose measured KL was `kl`."""


@dataclass
class FixedController:
    """A coefficient that stays the same. 0 switches the term off."""

    coef: float

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.coef) and self.coef >= 0, f"coef is {self.coef}; it must be finite and at least 0."
        )

    def update(self, kl: float, episodes: int) -> None:
        """Check that the KL is finite, and change nothing."""
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
    """Keep the KL inside a band: halve the coefficient below it, double it above (docs/theory.md §6: 0.5 to 2).

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
    """The adaptive β of PPO's penalty form (Schulman 2017, arXiv:1707.06347, eq. 8).

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
    """Return the factor ½ below `low`, 2 above `high`, 1 between them."""
    return 0.5 if kl < low else 2.0 if kl > high else 1.0


def _require_can_move(coef: float) -> None:
    _require(
        math.isfinite(coef) and coef > 0,
        f"coef is {coef}; an adaptive controller multiplies it, so it must start above 0: use FixedController for 0.",
    )


def _require_finite(kl: float) -> None:
    _require(
        math.isfinite(kl),
        f"The measured KL is {kl}; a finite number is needed. Training has diverged: lower the learning rate, or "
        "start again from the last good checkpoint.",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
