"""Where a run writes: not over another one unasked, and without what that one has left; folders beside it."""

import shlex
from itertools import count
from pathlib import Path

from ..runs.folder import FACTS, STATE
from .options import Options


# Of an adapter, and of a critic that was pretrained on a policy.
OF_ONE_RUN = ("adapter_config.json", "adapter_model.safetensors", "base_model.json", "policy.json")


def require_free(given: Options) -> None:
    """Raise `ValueError` if `--output_dir` holds a run, unless it is resumed or `--overwrite` is given."""
    folder = Path(given.output_dir or "trainer_output")
    if given.overwrite or _resumes(given.resume_from_checkpoint, folder) or not holds_run(folder):
        return
    free = next(path for n in count(2) if not Path(path := beside(folder, str(n))).exists())
    has_checkpoint = any(folder.glob(f"checkpoint-*/{STATE}"))
    resume = "; or go on from its last checkpoint with `--resume_from_checkpoint True`" if has_checkpoint else ""
    raise ValueError(
        f"{str(folder)!r} holds a run already. Give another folder, such as `--output_dir {shlex.quote(free)}`, or "
        f"write over it with `--overwrite`{resume}."
    )


def _resumes(checkpoint: str | None, folder: Path) -> bool:
    """Return whether a run goes on from a checkpoint in its own folder."""
    named = str(checkpoint or "")
    return named.lower() == "true" or (named != "" and Path(named).resolve().parent == folder.resolve())


def holds_run(folder: Path) -> bool:
    """Return whether a run has written to a folder: its facts, its log or a checkpoint."""
    return any((folder / name).is_file() for name in (FACTS, STATE)) or any(folder.glob(f"checkpoint-*/{STATE}"))


def beside(folder: str | Path, suffix: str) -> str:
    """Return the folder `NAME-suffix` beside a folder, also of `out/` and of `.`."""
    path = Path(folder)
    return f"{path if path.name not in ('', '..') else path.resolve()}-{suffix}"


def remove_older_adapters(folder: Path, begun: float) -> None:
    """
    Remove adapters of an earlier run, of actor and critic, and the policy of an earlier critic, from the folder of a
    run that began at `begun`: whoever loads the folder would take them for this run's.
    """
    for file in (place / name for place in (folder, folder / "critic") for name in OF_ONE_RUN):
        if file.is_file() and file.stat().st_mtime < begun:
            file.unlink()
