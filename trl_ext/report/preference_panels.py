"""The panels of a model that learns from pairs: DPO, and reward models."""

from ..runs.log import is_tie, series
from .chart import Chart, Curve
from .machine_panels import MEMORY, PAIR_THROUGHPUT
from .panel import LEARNING, Panel, Runs, lines, spread


def accuracy(runs: Runs) -> Chart:
    """Show shares of pairs, each with its 95% interval if one is logged."""
    curves = []
    for run in runs:
        shade, keys = run.colour or "blue", ("preference/accuracy", "rewards/accuracies", "accuracy")
        key = next((key for key in keys if key in run.keys), keys[0])
        # Before the first step no pair is right or wrong.
        log = [x for x in run.log if not (is_tie(x) or (x.get("step") == 0 and x.get(f"eval_{key}") == 0))]
        curves.append(Curve("training", series(log, key), shade, run.name))
        points = series(log, f"eval_{key}")
        low, high = (dict(zip(*series(log, f"eval_{key}_{end}"), strict=True)) for end in ("low", "high"))
        ends = [[end.get(step, value) for step, value in zip(*points, strict=True)] for end in (low, high)]
        label = "held out, 95% interval" if low else "held out"
        curves.append(Curve(label, points, shade, run.name, "held out", *(ends if low else ())))
        if len(runs) == 1:
            alone = series(run.log, "preference/ranking_accuracy")
            curves.append(Curve("without the reference", alone, "purple", run.name, dashed=True))
    return Chart("share of pairs in the right order", curves, level=(0.5, "chance"), bottom=0, top=1)


PREFERENCE = (
    Panel(
        "Loss",
        (lines(("loss", "training"), ylabel="loss, nats", level=(0.6931, "log 2: no preference")),),
        ("loss",),
        "Healthy: below log 2 and falling. Held out, it turns where overfitting begins.",
    ),
    Panel(
        "Preference accuracy",
        (accuracy,),
        ("preference/accuracy", "rewards/accuracies", "accuracy"),
        "Healthy: above 75% on held-out pairs. Far above that in training only is overfitting.",
    ),
    Panel(
        "Implicit rewards",
        (lines(("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ylabel="implicit reward, β · nats"),),
        ("rewards/chosen",),
        "Healthy: chosen near or above 0, rejected falling. If both fall, only the difference is learnt.",
    ),
    Panel(
        "Margin between chosen and rejected",
        (
            spread(
                ("rewards/margins", "margin"),
                ("{}_p10", "{}_p90"),
                "reward of chosen − rejected",
                "10% to 90% of pairs",
                "green",
            ),
        ),
        ("rewards/margins", "margin"),
        "Healthy: rising from 0. A mean far above the median is carried by a few pairs.",
    ),
    Panel(
        "Drift of the log-probabilities",
        (
            lines(
                ("logps/chosen_drift", "chosen"),
                ("logps/rejected_drift", "rejected"),
                ylabel="log π_θ − log π_ref, nats per sequence",
            ),
        ),
        ("logps/chosen_drift",),
        "Healthy: chosen near 0. A steady fall of the chosen side is DPO's known weakness.",
    ),
    Panel(
        "Calibration, and the pull of length",
        (
            lines(("preference/calibration_error", "training"), ylabel="Bradley-Terry calibration error"),
            lines(
                ("preference/length_correlation", "training"),
                ylabel="correlation of margin and length",
                level=(0.0, ""),
            ),
        ),
        ("preference/calibration_error",),
        "Healthy: a calibration error below 0.1 on held-out pairs, a correlation within ±0.3.",
    ),
    Panel(
        "KL to the reference, estimated on the pairs",
        (lines(("kl/ref", "training"), ylabel="½ (log π_θ − log π_ref)², nats"),),
        ("kl/ref",),
        "Healthy: no jumps; a jump is too large a step. It grows with the square of the drift.",
    ),
    Panel(
        "Gradient weight",
        (lines(("preference/gradient_weight", "training"), ylabel="σ(r_rejected − r_chosen)"),),
        ("preference/gradient_weight",),
        "Healthy: 0.5 at first, then falling slowly. Near 0 nothing more is learnt.",
    ),
    PAIR_THROUGHPUT,
    MEMORY,
    LEARNING,
)
