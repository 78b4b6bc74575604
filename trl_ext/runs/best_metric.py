"""Check the metric by which the best checkpoint is chosen."""

import difflib
from collections.abc import Callable
from typing import Any


def evaluated(evaluate: Callable[..., Any], metric: str | None, *given: Any, **options: Any) -> dict[str, float]:
    """Evaluate within a training; `ValueError` for a `metric_for_best_model` that the evaluation does not have."""
    try:
        metrics = evaluate(*given, **options)
    except KeyError as error:  # of a schedule that follows the metric
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(str(error.args[0])) from error
    if metric is not None and metric not in metrics and f"eval_{metric}" not in metrics:
        near = difflib.get_close_matches(metric, metrics, n=1)
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, and an evaluation has {', '.join(sorted(metrics))}. Set it to "
            f"one of these{f', such as {near[0]}' if near else ''}."
        )
    return metrics


def check_metric_of_sets(metric: str | None, held_out: Any, example: str) -> None:
    """Raise `ValueError` for a `metric_for_best_model` that names none of several sets; `example` is a metric."""
    if metric is None or not isinstance(held_out, dict):
        return
    whole = metric if metric.startswith("eval_") else f"eval_{metric}"
    if not any(whole.startswith(f"eval_{name}_") for name in held_out):
        choices = " or ".join(repr(f"eval_{name}_{example}") for name in held_out)
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, and the metrics of the {len(held_out)} held-out sets bear their "
            f"names. Set it to that of one set, such as {choices}."
        )
