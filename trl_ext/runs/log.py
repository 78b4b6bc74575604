"""Read what a Trainer has logged (`state.log_history`) as series. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any


Log = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]
"""Steps and values, in the order of the log."""

TIE = 1e-4  # in β · nats; what rounding makes of two equal models is smaller

# Algorithm -> keys of which its log lines, of training or of evaluations, have one. The first that fits is taken.
SIGNS = {
    "ppo": ("terms/clip_objective", "reward/score"),
    "dpo": ("preference/accuracy", "rewards/accuracies"),
    "grpo": ("reward", "reward_std"),  # also RLOO, which logs the same keys
    "reward": ("accuracy",),
    "critic": ("value/explained_variance_mc",),  # the pretraining of PPO's
}


def series(log: Log, key: str) -> Series:
    """Return steps and values of a log key, from the lines that have it; of several lines at one step, the last."""
    values = {int(line["step"]): float(value) for line in log if (value := line.get(key)) is not None}
    return list(values), list(values.values())


def keys_of(log: Log) -> set[str]:
    """Return every key of a log."""
    return set().union(*log)


def algorithm(log: Log) -> str | None:
    """Return which of `SIGNS` has written a log; `None` for another trainer, or if nothing is logged yet."""
    keys = {key.removeprefix("eval_") for key in keys_of(log)}
    return next((name for name, signs in SIGNS.items() if keys.intersection(signs)), None)


def scores(log: Log) -> Series:
    """Return the mean score of the completions sampled in training, in reward units, of PPO, GRPO or RLOO."""
    return series(log, "reward/score" if any("reward/score" in line for line in log) else "reward")


def reference_kl(log: Log) -> Series:
    """
    Return KL(π_θ ‖ π_ref) of the sampled completions, in nats per sequence. GRPO and RLOO log it per token, as `kl`;
    it is multiplied by the mean length of the last rollout.
    """
    if any("kl/ref" in line for line in log):
        return series(log, "kl/ref")
    length, values = None, {}
    for line in log:
        length = line.get("completions/mean_length", length)
        if line.get("kl") is not None and length is not None:
            values[int(line["step"])] = float(line["kl"]) * float(length)
    return list(values), list(values.values())


def memory(log: Log) -> Series:
    """Return the peak memory of any phase, in GiB, from the lines that have it."""
    keys = [key for key in keys_of(log) if key.startswith("memory/")]
    lines = [(int(line["step"]), [line[key] for key in keys if key in line]) for line in log]
    values = {step: float(max(peaks)) for step, peaks in lines if peaks}
    return list(values), list(values.values())


def held_out_accuracy(log: Log) -> str | None:
    """Return the key of the held-out accuracy: `DPOTrainerX`'s, else `DPOTrainer`'s, else `RewardTrainer`'s."""
    names = ("eval_preference/accuracy", "eval_rewards/accuracies", "eval_accuracy")
    return next((name for name in names if any(line.get(name) is not None for line in log)), None)


def is_tie(metrics: Mapping[str, Any]) -> bool:
    """Return whether a log line of DPO says that all margins are 0, up to rounding: the policy is the reference."""
    ends = [metrics.get(f"{prefix}rewards/margins_{end}") for prefix in ("", "eval_") for end in ("p10", "p90")]
    known = [abs(margin) for margin in ends if margin is not None]
    return bool(known) and max(known) < TIE


def tokens(log: Log) -> Series:
    """Return how many tokens had been processed by a step, since the run began, over all ranks."""
    return series(log, "num_tokens")


def hours(log: Log) -> Series:
    """Return how many hours had passed by a step, of runs with `ReportCallback`; between stop and resume none does."""
    steps, seconds = series(log, "time/elapsed")
    return steps, [value / 3600 for value in seconds]
