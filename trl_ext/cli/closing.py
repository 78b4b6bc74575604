"""Write the last lines of a run: where everything is, and what to do with it."""

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
from .errors import usage_errors
from .options import Options


def program(command: str) -> str:
    """Return how the command was called: `trl-ext dpo`, or `python scripts/dpo.py`."""
    called = Path(sys.argv[0])
    return f"python {sys.argv[0]}" if called.name == f"{command}.py" else f"trl-ext {command}"


def closing_lines(command: str, output: str | Path, argv: Sequence[str], **others: str) -> str:
    """Return where everything is, and the commands to look at it, to resume a run that stopped early, and `others`."""
    page, quoted = Path(output) / "report.html", shlex.quote(str(output))
    lines = {"look": f"open {shlex.quote(str(page))}" if page.is_file() else f"trl-ext report {quoted}"}
    again = resuming(command, output, argv) if has_steps_left(output) else None
    lines |= ({"resume": again} if again else {}) | others
    return "\n".join([f"Everything is in {output}", *(f"  {name:7} {text}" for name, text in lines.items())])


@contextmanager
def running(command: str, given: Options, args: Any) -> Iterator[None]:
    """Within the context, a wrong option ends the training in one sentence; a run cut short says how to go on."""
    try:
        with usage_errors():
            yield
    except SystemExit:  # an option is wrong, and no checkpoint would help
        raise
    except BaseException:
        again = resuming(command, args.output_dir, given.argv) if args.process_index == 0 else None
        if again:
            print(f"To go on from the last checkpoint: {again}", file=sys.stderr)
        raise


def resuming(command: str, output: str | Path, argv: Sequence[str]) -> str | None:
    """Return the command that goes on from the run's last checkpoint; `None` without one, or if the run is done."""
    paths = [path.parent for path in Path(output).glob(f"checkpoint-*/{STATE}")]
    steps = {path: path.name.removeprefix("checkpoint-") for path in paths if is_of_this_run(path, output)}
    last = max((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]), default=None)
    if last is None or not has_steps_left(last):
        return None
    flags = [*without(argv, "resume_from_checkpoint"), "--resume_from_checkpoint", str(last)]
    return f"{program(command)} {shlex.join(flags)}"


def without(argv: Sequence[str], *options: str) -> list[str]:
    """Return the words without these options and their values."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            skip = name.replace("-", "_") in options
        if not skip:
            kept.append(word)
    return kept


def report_callbacks(data: str) -> list[TrainerCallback]:
    """Return the callback that writes the report; none, and a note, without the extra that draws it."""
    try:
        return [ReportCallback(facts={"data": data})]
    except ImportError as error:
        print(f"There will be no report: {error}", file=sys.stderr)
        return []
