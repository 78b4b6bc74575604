"""That the last steps of a run are logged too, whatever `logging_steps` is, and the loss of the whole run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback


class LastLine(TrainerCallback):
    """
    Asks the Trainer for a log line after the last optimizer step, unless `logging_strategy="no"`. By itself it logs
    every `logging_steps` steps, and what came after the last of those lines is lost. It logs no step twice.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log |= args.logging_strategy != "no"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:  # before the last step: a callback has ended the run
            control.should_log |= args.logging_strategy != "no"


@contextmanager
def in_mode_of(logs: Mapping[str, Any], model: nn.Module) -> Iterator[None]:
    """
    TRL's trainers put the metrics of training into a line if the model is in training mode. A line of training, with
    a `loss`, that comes after an evaluation finds it in evaluation mode; here it is in the other one for that long.
    """
    was_training = model.training
    model.training = was_training or "loss" in logs
    try:
        yield
    finally:
        model.training = was_training


def whole_run_loss(lines: Sequence[Mapping[str, Any]], resumed_at: int) -> float | None:
    """
    The mean loss over the steps of a run that went on from a checkpoint, from its lines; `None` without a line. The
    Trainer's `train_loss` is that of the steps after the checkpoint.

    Args:
        lines: the state's `log_history`.
        resumed_at: step of the checkpoint. The Trainer loses what had not been logged then.
    """
    total, steps, last = 0.0, 0, 0
    for line in lines:
        if "loss" in line:
            since = resumed_at if last < resumed_at < line["step"] else last
            total, steps, last = (
                total + line["loss"] * (line["step"] - since),
                steps + line["step"] - since,
                line["step"],
            )
    return total / steps if steps else None
