"""The last lines of a run: where everything is, and what to do with it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def program(command: str) -> str:
    """How the command was called: `trl-ext dpo`, or `python scripts/dpo.py`."""
    called = Path(sys.argv[0])
    return f"python {sys.argv[0]}" if called.name == f"{command}.py" else f"trl-ext {command}"


def closing_lines(command: str, output: str | Path, argv: Sequence[str] | None = None, **others: str) -> str:
    """
    Args:
        command: that has run.
        output: the run's folder.
        argv: its flags, for one that can be resumed from its last checkpoint.
        others: what else can be done, and how.

    Returns:
        The last lines of a run: where everything is, and the commands to look at it, to resume it, to talk to it.
    """
    page, quoted = Path(output) / "report.html", shlex.quote(str(output))
    lines = {"look": f"open {shlex.quote(str(page))}" if page.is_file() else f"trl-ext report {quoted}"}
    checkpoint = None if argv is None else get_last_checkpoint(str(output))
    if argv is not None and checkpoint is not None:
        flags = _without(argv, "--resume_from_checkpoint")
        lines["resume"] = f"{program(command)} {shlex.join([*flags, '--resume_from_checkpoint', checkpoint])}"
    lines |= others
    return "\n".join([f"Everything is in {output}", *(f"  {name:7} {text}" for name, text in lines.items())])


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith(f"{flag}="):
            skip = False
        elif word == flag:
            skip = True
        else:
            kept.append(word)
    return kept
