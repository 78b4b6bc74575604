"""The checkpoint that a command goes on from."""

from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint


def checkpoint_of(args: Any) -> str | None:
    """
    The folder of `resume_from_checkpoint`; `None` for a run that begins. What else is in it, the trainer checks.

    Raises:
        ValueError: when there is no such checkpoint.
    """
    given = args.resume_from_checkpoint
    if not given:
        return None
    if given in (True, "True", "true"):
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is None:
            raise ValueError(f"There is no checkpoint to resume from in {args.output_dir}.")
        given = last
    if not (Path(given) / TRAINER_STATE_NAME).is_file():
        why = f"it has no {TRAINER_STATE_NAME}" if Path(given).is_dir() else "there is no such folder"
        raise ValueError(
            f"`--resume_from_checkpoint` is {given}, and {why}. Give a folder checkpoint-N of an earlier run, or True "
            "for the last one in `--output_dir`."
        )
    return str(given)
