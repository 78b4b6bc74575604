"""The last lines of a run: where everything is, and what to do with it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .. import ReportCallback


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
        flags = without(argv, "resume_from_checkpoint")
        lines["resume"] = f"{program(command)} {shlex.join([*flags, '--resume_from_checkpoint', checkpoint])}"
    lines |= others
    return "\n".join([f"Everything is in {output}", *(f"  {name:7} {text}" for name, text in lines.items())])


def without(argv: Sequence[str], *options: str) -> list[str]:
    """The words without these options and their values."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            skip = name.replace("-", "_") in options
            if skip:
                continue
        elif skip:
            continue
        kept.append(word)
    return kept


def report_callbacks(data: str) -> list[TrainerCallback]:
    """The report of a run; without the extra that draws it, a word about that, and none."""
    try:
        return [ReportCallback(facts={"data": data})]
    except ImportError as error:
        print(f"There will be no report: {error}", file=sys.stderr)
        return []
