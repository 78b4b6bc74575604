"""Refuse to write over another run."""

from itertools import count
from pathlib import Path

from ..runs.folder import FACTS, STATE
from .options import Options


def require_free(given: Options) -> None:
    """Raise `ValueError` if `--output_dir` holds a run, unless it is resumed or `--overwrite` is given."""
    folder = Path(given.output_dir or "trainer_output")
    if given.overwrite or given.resume_from_checkpoint or not holds_run(folder):
        return
    free = next(path for n in count(2) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    resume = "" if not any(folder.glob(f"checkpoint-*/{STATE}")) else ", or go on from its last checkpoint with "
    resume += "`--resume_from_checkpoint True`" if resume else ""
    raise ValueError(
        f"{folder} holds a run already. Give another folder, such as `--output_dir {free}`, write over it with "
        f"`--overwrite`{resume}."
    )


def holds_run(folder: Path) -> bool:
    """Return whether a run has written to a folder: its facts, its log or a checkpoint."""
    return any((folder / name).is_file() for name in (FACTS, STATE)) or any(folder.glob(f"checkpoint-*/{STATE}"))
