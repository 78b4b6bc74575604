"""The last lines of a run: where everything is, and what to do with it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from .. import ReportCallback
from ..places import is_of_this_run


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
    checkpoints = [] if argv is None else checkpoints_of(Path(output))
    if argv is not None and checkpoints:
        flags = [*without(argv, "resume_from_checkpoint"), "--resume_from_checkpoint", str(checkpoints[-1])]
        lines["resume"] = f"{program(command)} {shlex.join(flags)}"
    lines |= others
    return "\n".join([f"Everything is in {output}", *(f"  {name:7} {text}" for name, text in lines.items())])


def checkpoints_of(output: Path) -> list[Path]:
    """Those of the last run in the folder, by step."""
    paths = [path for path in output.glob("checkpoint-*") if is_of_this_run(path, output)]
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


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
