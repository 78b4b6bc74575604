"""Log the last steps of a run, whatever `logging_steps` is, and the loss of the whole run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback


class LastLine(TrainerCallback):
    """
    Asks the Trainer for a log line after the last optimizer step, unless `logging_strategy="no"`. By itself it logs
    every `logging_steps` steps, and the steps after the last of those lines are lost.
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
    Within the context, the model is in training mode if the line has a `loss`: TRL's trainers put the metrics of
    training only into a line that is logged in that mode, and after an evaluation the model is in the other one.
    """
    was_training = model.training
    model.training = was_training or "loss" in logs
    try:
        yield
    finally:
        model.training = was_training


def whole_run_loss(lines: Sequence[Mapping[str, Any]], resumed_at: int) -> float | None:
    """
    Return the mean loss over all steps of a run resumed at a step, from its lines; `None` without a line. The
    Trainer's `train_loss` covers the steps after the checkpoint, and it loses what had not been logged then.
    """
    total, steps, last = 0.0, 0, 0
    for line in lines:
        if "loss" in line:
            since = resumed_at if last < resumed_at < line["step"] else last
            total += line["loss"] * (line["step"] - since)
            steps += line["step"] - since
            last = line["step"]
    return total / steps if steps else None
