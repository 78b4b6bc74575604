"""Draw the panels of a model that learns from pairs: DPO, and reward models."""

from typing import Any

from ..runs.log import is_tie, series
from .drawing import curve, finish, held_out, level
from .machine_panels import MEMORY, PAIR_THROUGHPUT
from .panel import LEARNING, Panel, Runs, colour, lines, name, spread, two_rows


def accuracy(figure: Any, runs: Runs) -> None:
    """Draw shares of pairs, each with its 95% interval if one is logged."""
    axis = figure.subplots()
    for run in runs:
        shade, keys = colour(runs, run), ("preference/accuracy", "rewards/accuracies", "accuracy")
        key = next((key for key in keys if any(key in line or f"eval_{key}" in line for line in run.log)), keys[0])
        # Before the first step no pair is right or wrong.
        log = [x for x in run.log if not (is_tie(x) or (x.get("step") == 0 and x.get(f"eval_{key}") == 0))]
        curve(axis, series(log, key), shade, name(runs, run, "training"))
        ends = [series(log, f"eval_{key}_{end}") for end in ("low", "high")]
        label = "held out, 95% interval" if ends[0][1] else "held out"
        held_out(axis, series(log, f"eval_{key}"), shade, name(runs, run, label), (ends[0], ends[1]))
        if len(runs) == 1:
            curve(axis, series(run.log, "preference/ranking_accuracy"), "purple", "without the reference", dashed=True)
    level(axis, 0.75, "75%, asked for by the documents")
    axis.set_ylim(-0.02, 1.02)
    finish(axis, "share of pairs")


PREFERENCE = (
    Panel(
        "Loss",
        lines(("loss", "training"), ylabel="loss, nats", at=0.6931, at_label="log 2: no preference"),
        ("loss",),
        "Below log 2 and falling; held out, it turns where overfitting begins.",
    ),
    Panel(
        "Preference accuracy",
        accuracy,
        ("preference/accuracy", "rewards/accuracies", "accuracy"),
        "Above 75% on held-out pairs; far above that in training only is overfitting.",
    ),
    Panel(
        "Implicit rewards",
        lines(("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ylabel="β · nats"),
        ("rewards/chosen",),
        "Chosen near or above 0, rejected falling. Both falling: only the difference is learnt.",
    ),
    Panel(
        "Margin between chosen and rejected",
        spread(
            ("rewards/margins", "margin"), ("{}_p10", "{}_p90"), "chosen − rejected", "10% to 90% of pairs", "green", 0
        ),
        ("rewards/margins", "margin"),
        "Rising from 0. A mean far above the median is carried by a few pairs.",
    ),
    Panel(
        "Drift of the log-probabilities",
        lines(("logps/chosen_drift", "chosen"), ("logps/rejected_drift", "rejected"), ylabel="nats per sequence"),
        ("logps/chosen_drift",),
        "log π_θ − log π_ref. A steady fall of the chosen side is DPO's known weakness.",
    ),
    Panel(
        "Calibration, and the pull of length",
        two_rows(
            lines(("preference/calibration_error", "training"), ylabel="calibration error"),
            lines(("preference/length_correlation", "training"), ylabel="correlation", at=0),
        ),
        ("preference/calibration_error",),
        "Bradley-Terry calibration error below 0.1 on held-out pairs; margin and length correlated within ±0.3.",
        height=5.2,
    ),
    Panel(
        "KL to the reference, estimated on the pairs",
        lines(("kl/ref", "training"), ylabel="½ (log π_θ − log π_ref)², nats"),
        ("kl/ref",),
        "Grows with the square of the drift; a jump is too large a step.",
    ),
    Panel(
        "Gradient weight",
        lines(("preference/gradient_weight", "training"), ylabel="σ(r_rejected − r_chosen)"),
        ("preference/gradient_weight",),
        "0.5 at first, falling slowly. Near 0 nothing more is learnt.",
    ),
    PAIR_THROUGHPUT,
    MEMORY,
    LEARNING,
)
