"""The last lines of a run: where everything is, and what to do with it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .. import ReportCallback
from ..runs.folder import STATE, is_of_this_run
from ..runs.steps_left import has_steps_left
from .options import Options, usage_errors


def program(command: str) -> str:
    """How the command was called: `trl-ext dpo`, or `python scripts/dpo.py`."""
    called = Path(sys.argv[0])
    return f"python {sys.argv[0]}" if called.name == f"{command}.py" else f"trl-ext {command}"


def closing_lines(command: str, output: str | Path, argv: Sequence[str] | None = None, **others: str) -> str:
    """
    Args:
        command: that has run.
        output: the run's folder.
        argv: its flags, for one that can be resumed from its last checkpoint, as it has stopped before its end.
        others: what else can be done, and how.

    Returns:
        The last lines of a run: where everything is, and the commands to look at it, to resume it, to talk to it.
    """
    page, quoted = Path(output) / "report.html", shlex.quote(str(output))
    lines = {"look": f"open {shlex.quote(str(page))}" if page.is_file() else f"trl-ext report {quoted}"}
    again = resuming(command, output, argv) if argv is not None and has_steps_left(output) else None
    lines |= {"resume": again} if again else {}
    lines |= others
    return "\n".join([f"Everything is in {output}", *(f"  {name:7} {text}" for name, text in lines.items())])


@contextmanager
def running(command: str, given: Options, args: Any) -> Iterator[None]:
    """
    Around the training: an error about what was given ends it in one sentence, and a run that is cut short, by Ctrl-C
    or by any error, says how to go on from its last checkpoint.

    Args:
        command: that runs.
        given: its options.
        args: the trainer's config.
    """
    try:
        with usage_errors():
            yield
    except SystemExit:  # what was given cannot be trained with, and no checkpoint would help
        raise
    except BaseException:
        again = resuming(command, args.output_dir, given.argv) if args.process_index == 0 else None
        if again:
            print(f"To go on from the last checkpoint: {again}", file=sys.stderr)
        raise


def resuming(command: str, output: str | Path, argv: Sequence[str]) -> str | None:
    """The command that goes on from the run's last checkpoint; `None` where it has none, or one of a finished run."""
    checkpoints = checkpoints_of(Path(output))
    if not checkpoints or not has_steps_left(checkpoints[-1]):
        return None
    flags = [*without(argv, "resume_from_checkpoint"), "--resume_from_checkpoint", str(checkpoints[-1])]
    return f"{program(command)} {shlex.join(flags)}"


def checkpoints_of(output: Path) -> list[Path]:
    """Those of the last run in the folder that were saved whole, by step."""
    paths = [path.parent for path in output.glob(f"checkpoint-*/{STATE}") if is_of_this_run(path.parent, output)]
    steps = {path: path.name.removeprefix("checkpoint-") for path in paths}
    return sorted((path for path in paths if steps[path].isdigit()), key=lambda path: int(steps[path]))


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
