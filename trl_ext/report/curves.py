"""
PNGs of a run's curves, from the `log_history` of its Trainer alone (also from a `trainer_state.json`).

matplotlib is an extra: `pip install 'trl-ext[report]'`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState


Log = Sequence[dict[str, Any]]

# Contribution to the loss -> the log keys it is the product of, its sign, its colour.
CONTRIBUTIONS = {
    "−clip_objective": (("terms/clip_objective",), -1, "tab:blue"),
    "kl_coef · kl": (("coef/kl", "terms/kl"), 1, "tab:red"),
    "vf_coef · value_loss": (("coef/vf", "terms/value_loss"), 1, "tab:green"),
    "−ent_coef · entropy": (("coef/entropy", "terms/entropy"), -1, "tab:purple"),
    "old_kl_coef · old_kl": (("coef/old_kl", "terms/old_kl"), 1, "tab:brown"),
}
TIE = 1e-4  # in β · nats; what rounding makes of two equal models is smaller
# Completion of a pair -> its colour.
SIDES = {"chosen": "tab:blue", "rejected": "tab:red"}


def read_log(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The log of a run from its `trainer_state.json`, or from the folder that holds one."""
    path = Path(checkpoint)
    return TrainerState.load_from_json(str(path / "trainer_state.json" if path.is_dir() else path)).log_history


def series(log: Log, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a log key, from the lines that have it; of several lines at one step, the last."""
    values = {int(line["step"]): float(line[key]) for line in log if line.get(key) is not None}
    return list(values), list(values.values())


def contributions(log: Log) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each signed, weighted term of the PPO loss, which add up to `loss`. None that stays 0."""
    curves = {}
    for name, (keys, sign, _) in CONTRIBUTIONS.items():
        lines = [line for line in log if all(line.get(key) is not None for key in keys)]
        values = []
        for line in lines:
            product = float(sign)
            for key in keys:
                product *= line[key]
            values.append(product)
        if any(values):
            curves[name] = ([int(line["step"]) for line in lines], values)
    return curves


def is_tie(metrics: Mapping[str, Any]) -> bool:
    """Whether a log line of DPO says that all margins are 0, up to rounding: the policy is the reference."""
    ends = [metrics.get(f"{prefix}rewards/margins_{end}") for prefix in ("", "eval_") for end in ("p10", "p90")]
    known = [abs(margin) for margin in ends if margin is not None]
    return bool(known) and max(known) < TIE


def ppo_curves(log: Log, path: str | Path, title: str = "", kl_band: Sequence[float] | None = (0.5, 2.0)) -> Path:
    """
    Three panels over optimizer steps: reward (rollouts, and held out with its 95% interval), KL to the reference in
    nats per sequence with its band and its coefficient, and what each term contributes to the loss.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 9.5), sharex=True, layout="constrained")
    _reward_panel(axes[0], log)
    _kl_panel(axes[1], log, kl_band)
    _loss_panel(axes[2], log)
    axes[2].set_xlabel("optimizer step")
    return _save(figure, path, title)


def reward_curves(log: Log, path: str | Path, title: str = "") -> Path:
    """Two panels of a reward model's training: Bradley-Terry loss and pair accuracy, training and held out."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for axis, key, label, chance in ((axes[0], "loss", "loss (nats)", 0.6931), (axes[1], "accuracy", "accuracy", 0.5)):
        axis.plot(*series(log, key), color="tab:blue", marker=".", label="training pairs")
        axis.plot(*series(log, f"eval_{key}"), color="black", marker="D", linestyle="none", label="held-out pairs")
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle="--", label="chance")
        axis.set_ylabel(label)
        _finish(axis)
    axes[1].set_ylim(top=1.02)
    axes[1].set_xlabel("optimizer step")
    return _save(figure, path, title)


def dpo_curves(log: Log, path: str | Path, title: str = "") -> Path:
    """
    Five panels over optimizer steps, training and held out: loss; preference accuracy with its 95% interval; implicit
    rewards of chosen and rejected; their margin with its quantiles; how far both log-probabilities have moved.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(5, 1, figsize=(8, 14), sharex=True, layout="constrained")
    _both(axes[0], log, "loss", "tab:blue", "training", "held out")
    axes[0].axhline(0.6931, color="grey", linewidth=0.8, linestyle="--", label="log 2: policy = reference")
    axes[0].set_ylabel("loss (nats)")
    _accuracy_panel(axes[1], log)
    for name, colour in SIDES.items():
        _both(axes[2], log, f"rewards/{name}", colour, name, f"{name}, held out")
        _both(axes[4], log, f"logps/{name}_drift", colour, name, f"{name}, held out")
    axes[2].set_ylabel("implicit reward\n(β · nats)")
    _margin_panel(axes[3], log)
    axes[4].set_ylabel("log π_θ − log π_ref\n(nats per sequence)")
    axes[4].set_xlabel("optimizer step")
    for axis in axes[2:]:
        axis.axhline(0, color="grey", linewidth=0.8)
    for axis in axes:
        _finish(axis)
    return _save(figure, path, title)


def _both(axis: Any, log: Log, key: str, colour: str, training: str, held_out: str) -> None:
    """A metric of the training batches as a line, of the held-out pairs as diamonds; with a label for each."""
    axis.plot(*series(log, key), color=colour, alpha=0.8, marker=".", label=training)
    style = {"marker": "D", "markeredgecolor": "black", "linestyle": ":"}
    axis.plot(*series(log, f"eval_{key}"), color=colour, label=held_out, **style)


def _accuracy_panel(axis: Any, log: Log) -> None:
    log = [line for line in log if not is_tie(line)]  # before the first step no pair is right or wrong
    for prefix, colour, label in (("", "tab:blue", "training"), ("eval_", "black", "held out")):
        steps, accuracy = series(log, f"{prefix}preference/accuracy")
        ends = [series(log, f"{prefix}preference/accuracy_{end}")[1] for end in ("low", "high")]
        if prefix:
            below = [a - low for a, low in zip(accuracy, ends[0], strict=True)]
            above = [high - a for a, high in zip(accuracy, ends[1], strict=True)]
            style = {"marker": "D", "capsize": 5, "linestyle": ":"}
            axis.errorbar(steps, accuracy, yerr=[below, above], color=colour, label=f"{label}, 95%", **style)
        else:
            axis.plot(steps, accuracy, color=colour, marker=".", label=f"{label}, 95%")
            axis.fill_between(steps, *ends, color=colour, alpha=0.15)
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--", label="chance")
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel("preference accuracy")


def _margin_panel(axis: Any, log: Log) -> None:
    _both(axis, log, "rewards/margins", "tab:green", "mean", "mean, held out")
    steps, median = series(log, "rewards/margins_p50")
    axis.plot(steps, median, color="tab:olive", linewidth=1, label="median")
    ends = [series(log, f"rewards/margins_{name}")[1] for name in ("p10", "p90")]
    axis.fill_between(steps, *ends, color="tab:green", alpha=0.15, label="10% to 90% of pairs")
    axis.set_ylabel("margin, chosen − rejected\n(β · nats)")


def _reward_panel(axis: Any, log: Log) -> None:
    axis.plot(*series(log, "reward/score"), color="tab:blue", alpha=0.8, marker=".", label="rollouts")
    steps, means = series(log, "eval_reward/score")
    half_widths = dict(zip(*series(log, "eval_reward/score_ci95"), strict=True))
    errors = [half_widths.get(step, 0.0) for step in steps]
    label = "held-out prompts, 95% interval"
    axis.errorbar(steps, means, yerr=errors, color="black", marker="D", capsize=5, label=label)
    axis.set_ylabel("reward-model score")
    _finish(axis)


def _kl_panel(axis: Any, log: Log, kl_band: Sequence[float] | None) -> None:
    if kl_band is not None:
        axis.axhspan(*kl_band, color="tab:green", alpha=0.12, label=f"band {kl_band[0]:g} to {kl_band[1]:g}")
    axis.plot(*series(log, "kl/ref"), color="tab:red", marker=".", label="KL, rollouts")
    axis.plot(*series(log, "eval_kl/ref"), color="black", marker="D", linestyle="none", label="KL, held-out prompts")
    axis.set_ylabel("KL to the reference\n(nats per sequence)")
    coefficient = axis.twinx()
    coefficient.plot(*series(log, "coef/kl"), color="tab:orange", drawstyle="steps-post", label="kl_coef (right)")
    coefficient.set_ylabel("kl_coef", color="tab:orange")
    coefficient.tick_params(axis="y", labelcolor="tab:orange")
    coefficient.set_ylim(bottom=0)
    coefficient.spines["top"].set_visible(False)
    handles = [a.get_legend_handles_labels() for a in (axis, coefficient)]
    _finish(axis, handles[0][0] + handles[1][0], handles[0][1] + handles[1][1])


def _loss_panel(axis: Any, log: Log) -> None:
    for name, (steps, values) in contributions(log).items():
        axis.plot(steps, values, color=CONTRIBUTIONS[name][2], marker=".", label=name)
    axis.plot(*series(log, "loss"), color="black", linewidth=2, label="loss (their sum)")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_ylabel("contribution to the loss")
    _finish(axis)


def _finish(axis: Any, *legend: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines["top"].set_visible(False)
    if legend or axis.get_legend_handles_labels()[0]:
        axis.legend(*legend, fontsize="small", framealpha=0.9)


def _save(figure: Any, path: str | Path, title: str) -> Path:
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    figure.clear()
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Curves need matplotlib, which is not installed. Install it with `pip install 'trl-ext[report]'`."
        ) from error
    matplotlib.use("Agg")  # a file, not a window: training machines have no display
    from matplotlib import pyplot

    return pyplot
