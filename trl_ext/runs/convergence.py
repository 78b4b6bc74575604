"""
Tell whether a run has converged, is diverging, or neither yet: a pure function of what it has logged.

The criteria are those of Zhang 2025 §6.2 (docs/theory.md): for PPO a KL to the reference of 0.5 to 2 nats per
sequence, with a reward that no longer rises; for DPO more than 75% of held-out pairs in the right order. Added here:
the whole 95% interval of that share lies above 75%, so a handful of pairs shows nothing; and a curve is rising or
falling if the slope of a straight line through the last `window` points differs from 0 at 95%, and flat if not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import Z, wilson_interval
from .log import Log, algorithm, held_out_accuracy, is_tie, reference_kl, scores, series


CONVERGED, DIVERGING, NOT_YET = "converged", "diverging", "not yet"
KL_BAND = (0.5, 2.0)  # nats per sequence
MIN_ACCURACY = 0.75
WINDOW = 20  # log lines with a reward: rollouts, if `logging_steps` averages none of them


@dataclass(frozen=True)
class Verdict:
    """A status, and a sentence that gives its figures."""

    status: str
    reason: str

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


@dataclass(frozen=True)
class Trend:
    """How far values have risen, and the half-width of the 95% interval of that."""

    rise: float
    half_width: float

    @property
    def is_up(self) -> bool:
        """Return whether they have risen by more than the interval."""
        return self.rise > self.half_width

    @property
    def is_down(self) -> bool:
        """Return whether they have fallen by more than the interval."""
        return self.rise < -self.half_width


def verdict(
    log: Log, kl_band: Sequence[float] = KL_BAND, window: int = WINDOW, min_accuracy: float = MIN_ACCURACY
) -> Verdict:
    """
    Return what a log says about its run.

    Args:
        log: `state.log_history` of PPOTrainerX, GRPOTrainer, RLOOTrainer, DPOTrainerX, DPOTrainer or RewardTrainer.
        kl_band: KL(π_θ ‖ π_ref) in nats per sequence between which a policy has learnt and is still held.
        window: log lines over which KL is averaged and the reward must be flat. At least 4.
        min_accuracy: share of held-out pairs in the right order above which the 95% interval must lie, where a count
            of pairs or an interval is logged; otherwise the share alone.

    Raises:
        ValueError: for arguments outside their ranges.
    """
    check_criteria(kl_band, window, min_accuracy)
    broken = first_not_finite(log)
    if broken is not None:
        step, key = broken
        return Verdict(DIVERGING, f"`{key}` is not finite at step {step}")
    kind = algorithm(log)
    if kind in ("ppo", "grpo"):
        return policy_verdict(log, kl_band, window)
    if kind in ("dpo", "reward"):
        return preference_verdict(log, min_accuracy)
    return Verdict(NOT_YET, "nothing is logged that says it: neither a reward nor a preference accuracy")


def check_criteria(kl_band: Sequence[float], window: int, min_accuracy: float) -> None:
    """Raise `ValueError` for criteria that no run can meet, or that every run meets."""
    if len(kl_band) != 2 or not 0 <= kl_band[0] < kl_band[1]:
        raise ValueError(f"`kl_band` is {kl_band!r}; it must be two numbers of nats per sequence, 0 <= low < high.")
    if window < 4:
        raise ValueError(f"`window` is {window}; a trend needs at least 4 log lines to be told from noise.")
    if not 0.5 <= min_accuracy < 1:
        raise ValueError(f"`min_accuracy` is {min_accuracy}; it must be from 0.5, which is chance, to below 1.")


def policy_verdict(log: Log, kl_band: Sequence[float] = KL_BAND, window: int = WINDOW) -> Verdict:
    """Judge PPO, GRPO, RLOO: the KL to the reference must be in its band, the reward must have risen and be flat."""
    rewards, kls = scores(log)[1], reference_kl(log)[1]
    low, high = kl_band
    if not kls:
        return Verdict(NOT_YET, "no KL to the reference is logged, so nothing says how far the policy has gone")
    kl, drift = mean(kls[-window:]), trend(kls[-window:])
    if len(kls) >= window and kl > high and drift.is_up:
        return Verdict(DIVERGING, f"the KL is {kl:.3g} nats, above {high:g}, and grows")
    if len(rewards) < 2 * window:
        lines = "1 log line has" if len(rewards) == 1 else f"{len(rewards)} log lines have"
        return Verdict(NOT_YET, f"{lines} a reward; convergence takes {2 * window} to be seen")
    gain, reward = difference(rewards[:window], rewards[-window:]), trend(rewards[-window:])
    if gain.rise < -2 * gain.half_width:  # looked at after every log line, so a rare chance is not rare enough
        return Verdict(DIVERGING, f"the reward is {-gain.rise:.3g} below that of the first {window} log lines")
    outside = "above" if kl > high else "below" if kl < low else ""
    if outside:
        return Verdict(NOT_YET, f"the KL is {kl:.3g} nats, {outside} the band of {low:g} to {high:g}")
    if reward.is_down:
        return Verdict(NOT_YET, f"the reward falls, by {-reward.rise:.3g} over the last {window} log lines")
    if reward.is_up:
        return Verdict(NOT_YET, f"the reward still rises, by {reward.rise:.3g} over the last {window} log lines")
    if not gain.is_up:
        return Verdict(NOT_YET, "the reward is where it began: no rise can be told from noise")
    return Verdict(
        CONVERGED,
        f"the KL is {kl:.3g} nats, within {low:g} to {high:g}, and the reward, up by {gain.rise:.3g}, is flat over "
        f"the last {window} log lines",
    )


def preference_verdict(log: Log, min_accuracy: float = MIN_ACCURACY) -> Verdict:
    """Judge DPO and reward models by the share of held-out pairs in the right order, at the last evaluation."""
    key = held_out_accuracy(log)
    evaluations = [line for line in log if key is not None and line.get(key) is not None]
    if key is None or is_tie(evaluations[-1]):
        return Verdict(NOT_YET, "no held-out preference accuracy is logged since training began")
    last = evaluations[-1]
    accuracy = float(last[key])
    low, high = accuracy_interval(last, accuracy)
    interval = f" (95% interval {low:.1%} to {high:.1%})" if low < high else ""
    share = f"{accuracy:.1%}{interval} of held-out pairs are in the right order"
    if high < 0.5 and low < high:  # of how many pairs is known
        return Verdict(DIVERGING, f"{share}: worse than chance")
    if low > min_accuracy:
        return Verdict(CONVERGED, f"{share}, above {min_accuracy:.0%}")
    if accuracy > min_accuracy:
        return Verdict(NOT_YET, f"{share}; of more pairs the interval may lie above {min_accuracy:.0%}")
    losses = series(log, "eval_loss")[1]
    if len(losses) > 1 and losses[-1] > losses[0]:
        return Verdict(DIVERGING, f"{share}, and the held-out loss has risen from {losses[0]:.3f} to {losses[-1]:.3f}")
    return Verdict(NOT_YET, f"{share}; more than {min_accuracy:.0%} would be a success")


def accuracy_interval(line: Mapping[str, Any], accuracy: float) -> tuple[float, float]:
    """Return the 95% interval: as logged, else Wilson's for the pairs evaluated, else the accuracy as both ends."""
    low, high = (line.get(f"eval_preference/accuracy_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        return float(low), float(high)
    pairs = round(line.get("eval_runtime", 0.0) * line.get("eval_samples_per_second", 0.0))
    return wilson_interval(accuracy * pairs, pairs) if pairs > 0 else (accuracy, accuracy)


def first_not_finite(log: Log) -> tuple[int, str] | None:
    """Return step and key of the first loss, reward, KL or gradient norm that is not finite."""
    watched = ("loss", "eval_loss", "grad_norm", "reward", "reward/score", "kl", "kl/ref")
    for line in log:
        for key in watched:
            value: Any = line.get(key)
            if value is not None and not math.isfinite(value):
                return int(line.get("step", 0)), key
    return None


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    """Return the unbiased variance, over n − 1."""
    center = mean(values)
    return sum((value - center) ** 2 for value in values) / (len(values) - 1)


def difference(before: Sequence[float], after: Sequence[float]) -> Trend:
    """Return the mean of `after` minus that of `before`, with 1.96 standard errors (Welch)."""
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return Trend(mean(after) - mean(before), Z * error)


def trend(values: Sequence[float]) -> Trend:
    """Fit a least-squares line to at least 4 equally spaced values: rise = slope · (n − 1), with 1.96 errors."""
    n = len(values)
    if n < 4:
        return Trend(0.0, math.inf)
    times = [i - (n - 1) / 2 for i in range(n)]
    spread = sum(t * t for t in times)
    slope = sum(t * value for t, value in zip(times, values, strict=True)) / spread
    center = mean(values)
    residual = sum((value - center - slope * t) ** 2 for t, value in zip(times, values, strict=True))
    error = math.sqrt(residual / (n - 2) / spread)
    return Trend(slope * (n - 1), Z * error * (n - 1))
