"""By which metric the best checkpoint is chosen where there are several held-out sets."""

from typing import Any


def check_metric_of_sets(args: Any, held_out: Any, example: str) -> None:
    """
    Raises `ValueError` for a metric that names none of several held-out sets: the first evaluation would end the run.

    Args:
        args: training arguments, of which `metric_for_best_model` is set wherever it is read.
        held_out: one set, or several by name.
        example: a metric, without a prefix.
    """
    metric = args.metric_for_best_model
    if metric is None or not isinstance(held_out, dict):
        return
    whole = metric if metric.startswith("eval_") else f"eval_{metric}"
    if not any(whole.startswith(f"eval_{name}_") for name in held_out):
        choices = " or ".join(repr(f"eval_{name}_{example}") for name in held_out)
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, and the metrics of the {len(held_out)} held-out sets bear their "
            f"names. Set it to that of one set, such as {choices}."
        )
