"""Find what in a log deserves a look, and what to do about it: docs/metrics.md's "healthy" column as rules. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..statistics import wilson_interval
from .convergence import first_not_finite, mean
from .log import Log, algorithm, held_out_accuracy, is_tie, keys_of, reference_kl, series


LATELY = 5  # values of a key that are averaged
SEVERAL = 3  # log lines, after which a reward source that has not moved is an alarm
FEW = 100  # pairs, of which fewer make a calibration error that says little


@dataclass(frozen=True)
class Alarm:
    """The log key, what it shows, and what to change."""

    key: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"`{self.key}` {self.text}: {self.advice}"


@dataclass(frozen=True)
class Rule:
    """Raises an alarm when the mean of the last few values of `key` is above, or below, a limit."""

    key: str
    limit: float
    advice: str
    below: bool = False
    after: int = 1  # values that must be logged first: what is normal at the start is no alarm

    def __call__(self, log: Log) -> Alarm | None:
        values = series(log, self.key)[1]
        if len(values) < self.after:
            return None
        value = mean(values[-LATELY:])
        if (value >= self.limit) if self.below else (value <= self.limit):
            return None
        side = "below" if self.below else "above"
        return Alarm(self.key, f"is {value:.3g} lately, {side} {self.limit:g}", self.advice)


RULES: dict[str, Sequence[Rule]] = {
    "ppo": (
        Rule("policy/clip_fraction", 0.3, "lower the learning rate or `num_ppo_epochs`"),
        Rule("policy/ratio_max", 100.0, "one step moved a token a hundredfold; lower the learning rate"),
        Rule("policy/approx_kl", 0.1, "lower the learning rate, or set `target_kl`"),
        Rule(
            "value/explained_variance",
            0.0,
            "the critic is worse than a constant; raise `critic_learning_rate`, or set `critic_warmup_until`",
            below=True,
            after=10,
        ),
        Rule("value/clip_fraction", 0.5, "`cliprange_value` is too small for the size of the scores"),
        Rule("advantage/std", 1e-6, "all responses are worth the same, so nothing is learnt", below=True, after=2),
    ),
    "grpo": (
        Rule("clip_ratio/region_mean", 0.3, "lower the learning rate or `num_iterations`"),
        Rule("frac_reward_zero_std", 0.8, "in most groups all rewards are equal, so that nothing is learnt there"),
    ),
    "dpo": (
        Rule("preference/gradient_weight", 0.02, "hardly a pair still pulls; nothing more is learnt", below=True),
        Rule("eval_preference/calibration_error", 0.1, "overconfident; raise β, train less or smooth the labels"),
        Rule("eval_rewards/chosen_below_zero", 0.9, "both sides fall; lower the learning rate, or add the SFT loss"),
    ),
    "reward": (),
}
FOR_ALL = (
    Rule("completions/clipped_ratio", 0.9, "hardly a response ends; raise its length, or penalise a missing end"),
    Rule("sampling/sampling_logp_difference/mean", 0.05, "vLLM and the trainer disagree on the probabilities"),
)


def alarms(log: Log, kl_high: float = 2.0) -> list[Alarm]:
    """Return the alarms of a run so far, the worst first; a KL above `kl_high` nats per sequence is one."""
    kind = algorithm(log)
    checks: list[Callable[[Log], Alarm | None]] = [_not_finite]
    if kind in ("ppo", "grpo"):
        checks += [lambda log: _far_from_the_reference(log, kl_high), _constant_source, _collapsed, _lengths_drift]
        checks.append(_past_its_best)
    if kind in ("dpo", "reward"):
        checks += [_overfitted, _worse_than_chance, _learns_length]
    checks += [*RULES.get(kind or "", ()), *FOR_ALL]
    if kind == "dpo":  # before the first step all pairs are ties, which say nothing
        lines = [dict(line) for line in log if not is_tie(line)]
        for line in lines:
            if line.get("eval_preference/pairs", FEW) < FEW:  # then it is about 1 / (2√pairs) by chance
                line.pop("eval_preference/calibration_error", None)
        log = lines
    return [alarm for alarm in (check(log) for check in checks) if alarm is not None]


def _not_finite(log: Log) -> Alarm | None:
    broken = first_not_finite(log)
    if broken is None:
        return None
    return Alarm(broken[1], f"is not finite at step {broken[0]}", "start again from the last good checkpoint")


def _far_from_the_reference(log: Log, high: float) -> Alarm | None:
    values = reference_kl(log)[1][-LATELY:]
    if not values or mean(values) <= high:
        return None
    advice = "raise its coefficient or let a controller do so; read samples, as a high reward may now be hacked"
    return Alarm("kl/ref", f"is {mean(values):.3g} nats per sequence lately, above {high:g}", advice)


def _constant_source(log: Log) -> Alarm | None:
    """Alarm if a reward source has given all responses of several log lines one reward."""
    for key in sorted(key for key in keys_of(log) if key.startswith("rewards/") and key.endswith("/std")):
        values = series(log, key)[1][-LATELY:]
        means = series(log, key.removesuffix("std") + "mean")[1][-LATELY:]
        size = max(1.0, *map(abs, means)) if means else 1.0
        if len(values) >= SEVERAL and all(value <= 1e-6 * size for value in values):
            advice = (
                "this source tells no response from another. Where prompts are conversations, a completion is a list "
                "of messages, whose text is `completion[-1]['content']`"
            )
            return Alarm(key, f"is 0 in the last {len(values)} log lines", advice)
    return None


def _collapsed(log: Log) -> Alarm | None:
    key = "terms/entropy" if any("terms/entropy" in line for line in log) else "entropy"
    values = series(log, key)[1]
    if len(values) < 2 or not 0 <= mean(values[-LATELY:]) < values[0] / 10:
        return None
    text = f"has fallen from {values[0]:.3g} to {mean(values[-LATELY:]):.3g} nats per token"
    return Alarm(key, text, "the policy says one thing only; raise the entropy bonus or the KL coefficient")


def _lengths_drift(log: Log) -> Alarm | None:
    values = series(log, "completions/mean_length")[1]
    if len(values) < 2 * LATELY:
        return None
    first, last = mean(values[:LATELY]), mean(values[-LATELY:])
    if first <= 0 or 0.5 <= last / first <= 2:
        return None
    text = f"has gone from {first:.3g} to {last:.3g} tokens"
    return Alarm("completions/mean_length", text, "see whether the reward pays for length")


def _past_its_best(log: Log) -> Alarm | None:
    """Alarm if the held-out score has fallen from its best by more than its interval."""
    key = "eval_reward/score" if any("eval_reward/score" in line for line in log) else "eval_reward"
    values = series(log, key)[1]
    widths = series(log, f"{key}_ci95")[1]
    if len(values) < 3 or not widths or max(values) - values[-1] <= widths[-1]:
        return None
    text = f"has fallen from its best, {max(values):.3g}, to {values[-1]:.3g}"
    return Alarm(key, text, "stop here, and keep the best checkpoint (`metric_for_best_model`)")


def _overfitted(log: Log) -> Alarm | None:
    """Alarm if the held-out loss rises again while the training loss falls."""
    held_out, training = series(log, "eval_loss")[1], series(log, "loss")[1]
    if len(held_out) < 3 or not training or not all(map(math.isfinite, held_out)):
        return None
    if held_out[-1] <= 1.05 * min(held_out) or mean(training[-LATELY:]) >= held_out[-1]:
        return None
    text = f"has risen from its best, {min(held_out):.3f}, to {held_out[-1]:.3f}"
    return Alarm("eval_loss", text, "the pairs are learnt by heart; train for fewer steps, or raise β")


def _worse_than_chance(log: Log) -> Alarm | None:
    """Alarm if more held-out pairs, of all or of a source, are in the wrong order than chance explains at 95%."""
    key = held_out_accuracy(log)
    if key is None:
        return None
    line = next(line for line in reversed(log) if line.get(key) is not None)
    if line.get(f"{key}_high", 1.0) < 0.5:
        advice = "look whether chosen and rejected are swapped in the data"
        return Alarm(key, f"is {line[key]:.1%}, below chance beyond its interval", advice)
    worst: tuple[float, str] | None = None
    for name in (name.removeprefix(f"{key}/") for name in line if name.startswith(f"{key}/")):
        pairs, share = line.get(f"eval_preference/pairs/{name}"), line[f"{key}/{name}"]
        if pairs and wilson_interval(share * pairs, int(pairs))[1] < 0.5:
            worst = min(worst or (share, name), (share, name))
    if worst is None:
        return None
    text = f"is {worst[0]:.1%}, below chance beyond its interval"
    advice = "look whether this source has chosen and rejected swapped, or contradicts the others"
    return Alarm(f"{key}/{worst[1]}", text, advice)


def _learns_length(log: Log) -> Alarm | None:
    """Alarm if margins follow lengths on held-out pairs, else on those that are trained on."""
    held_out, training = (f"{prefix}preference/length_correlation" for prefix in ("eval_", ""))
    key = held_out if series(log, held_out)[1] else training
    values = series(log, key)[1][-LATELY:]
    if not values or abs(mean(values)) <= 0.5:
        return None
    text = f"is {mean(values):+.2f} lately, beyond ±0.5"
    return Alarm(key, text, "the margin follows the length; balance the pairs' lengths")
