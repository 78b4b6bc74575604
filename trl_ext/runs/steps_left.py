"""Tell a run that has a step left to take after its checkpoint from a finished one."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .folder import STATE
from .tables import counted


class StepsLeft(TrainerCallback):
    """
    Refuses to resume from a checkpoint that has all optimizer steps of the run: the Trainer would take one more and
    overwrite the finished run. Here the number of steps is known even if epochs set it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise ValueError(_nothing_left("The run that is resumed", state.global_step, state.max_steps))


def refuse_finished_checkpoints(trainer: Any) -> None:
    """Give a trainer a [`StepsLeft`], before the callbacks that begin a log or a report."""
    trainer.callback_handler.callbacks.insert(0, StepsLeft())


def require_steps_left(checkpoint: Path | None, max_steps: int) -> None:
    """Raise `ValueError` for a checkpoint that has taken all `max_steps`; below 1, they are not known yet."""
    if checkpoint is not None and 0 < max_steps <= (taken := steps_of(checkpoint)[0]):
        raise ValueError(_nothing_left(f"The run saved in {checkpoint}", taken, max_steps))


def has_steps_left(folder: str | Path) -> bool:
    """Return whether the run or the checkpoint in a folder had steps left to take when its state was written."""
    if not (Path(folder) / STATE).is_file():
        return False
    taken, all_steps = steps_of(folder)
    return taken < all_steps


def steps_of(folder: str | Path) -> tuple[int, int]:
    """Return the optimizer steps that the run in a folder had taken, and those of the whole run."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state["global_step"], state["max_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it was cut off. Resume from another checkpoint."
        ) from None


def _nothing_left(what: str, taken: int, all_steps: int) -> str:
    return (
        f"{what} has taken {counted(taken, 'optimizer step')}, and this one ends after {all_steps}. To train "
        "for longer, raise `max_steps` or `num_train_epochs`, in PPO `total_episodes`."
    )
