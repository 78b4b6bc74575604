"""Write the last lines of a run: where everything is, and what to do with it."""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import Any

from transformers import TrainerCallback

from .. import ReportCallback
from ..runs.checkpoints import fault_of, numbered
from ..runs.failures import RunError
from ..runs.folder import is_of_this_run
from ..runs.signals import SignalWatch, StoppedBySignal, ended_by_signals
from ..runs.steps_left import has_steps_left
from .errors import is_debugging, usage_errors
from .options import Options


def program(command: str) -> str:
    """Return how the command was called: `trl-ext dpo`, or `python scripts/dpo.py`."""
    called = Path(sys.argv[0])
    return f"python {shlex.quote(sys.argv[0])}" if called.name == f"{command}.py" else f"trl-ext {command}"


def closing_lines(command: str, output: str | Path, argv: Sequence[str], **others: str) -> str:
    """Return where everything is, and the commands to look at it, to resume a run that stopped early, and `others`."""
    page, quoted = Path(output) / "report.html", shlex.quote(str(output))
    lines = {"look": f"open {shlex.quote(str(page))}" if page.is_file() else f"trl-ext report {quoted}"}
    again = resuming(command, output, argv) if has_steps_left(output) else None
    lines |= ({"resume": again} if again else {}) | others
    return "\n".join([f"Everything is in {quoted}", *(f"  {name:7} {text}" for name, text in lines.items())])


@contextmanager
def preparing(output_dir: str | None) -> Iterator[None]:
    """
    Within the context, which makes a run ready, SIGTERM or Ctrl-C ends the command in one line. An output folder that
    it has made, and that is empty, goes.
    """
    folder = Path(output_dir or "trainer_output")
    is_new = not folder.exists()
    received: list[int] = []
    try:
        with ended_by_signals() as received:
            yield
    except BaseException:  # an interrupted library may raise what it likes
        if not received or is_debugging():
            raise
        if is_new:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"Stopped by {Signals(received[0]).name} before the run had begun: start it again.", file=sys.stderr)
        raise SystemExit(128 + received[0]) from None


@contextmanager
def running(command: str, given: Options, args: Any) -> Iterator[None]:
    """
    Within the context, a wrong option or a failure from outside ends the training in a few sentences; a run cut short
    says how to go on.
    """
    begun = time.time()
    try:
        with usage_errors(given.wording):
            yield
    except StoppedBySignal as stop:
        if args.process_index == 0:
            print(f"{stop} {_how_to_go_on(command, given, args, stop)}", file=sys.stderr)
        raise
    except SystemExit as end:
        # A wrong option; but after a checkpoint of this run, such as an answer of a reward function.
        can_go_on = end.__cause__ is not None and args.process_index == 0 and not args.save_only_model
        last = last_checkpoint(args.output_dir) if can_go_on else None
        if last is None or last.stat().st_mtime < begun or not has_steps_left(last):
            raise
        said = [str(end.code), *getattr(end.__cause__, "__notes__", [])]
        said.append(f"To go on from the last checkpoint: {_command_from(last, command, given.argv)}")
        raise SystemExit("\n".join(said)) from end.__cause__
    except BaseException as error:
        can_go_on = args.process_index == 0 and not args.save_only_model
        again = resuming(command, args.output_dir, given.argv) if can_go_on else None
        in_words = isinstance(error, RunError) and not is_debugging()
        if in_words:
            print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        if again:
            print(f"To go on from the last checkpoint: {again}", file=sys.stderr)
        if in_words:
            raise SystemExit(1) from error
        raise


@contextmanager
def saving_last(args: Any) -> Iterator[None]:
    """Within the context, which saves the trained model, a signal waits until that is done, and then ends the run."""
    if not args.save_on_signal:
        yield
        return
    with SignalWatch(speaks=args.process_index == 0, then="the run ends as soon as its model is saved") as watch:
        yield
    if watch.received:
        if args.process_index == 0:
            print(f"The run was done. The model is in {args.output_dir}; it was not evaluated.", file=sys.stderr)
        raise SystemExit(128 + watch.received)


def resuming(command: str, output: str | Path, argv: Sequence[str]) -> str | None:
    """Return the command that goes on from the run's last checkpoint; `None` without one, or if the run is done."""
    last = last_checkpoint(output)
    return _command_from(last, command, argv) if last is not None and has_steps_left(last) else None


def last_checkpoint(output: str | Path) -> Path | None:
    """Return the last complete checkpoint of the last run in a folder."""
    steps = {Path(output) / name: step for name, step in numbered(Path(output)).items()}
    newest_first = sorted(steps, key=lambda path: steps[path], reverse=True)
    return next((path for path in newest_first if is_of_this_run(path, output) and fault_of(path) is None), None)


def _how_to_go_on(command: str, given: Options, args: Any, stop: StoppedBySignal) -> str:
    if stop.checkpoint is None:
        return "Nothing was learned yet: start it again, with `--overwrite`."
    if args.save_only_model:
        return f"The model is in {stop.checkpoint}; with `save_only_model` no run goes on from it."
    # It may lie in another run's folder, from which this one was resumed, while this one has left its log in its own.
    is_own = stop.checkpoint.resolve().parent == Path(args.output_dir).resolve()
    argv = given.argv if is_own else [*without(given.argv, "overwrite"), "--overwrite"]
    return f"To go on from there: {_command_from(stop.checkpoint, command, argv)}"


def _command_from(checkpoint: Path, command: str, argv: Sequence[str]) -> str:
    flag = ["--resume_from_checkpoint", str(checkpoint)]
    own_launch = any(word.replace("-", "_").startswith(("__nproc", "__accelerate_config")) for word in argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not own_launch:
        return f"the same launch, with {shlex.join(flag)}"
    return f"{program(command)} {shlex.join([*without(argv, 'resume_from_checkpoint'), *flag])}"


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


def report_callbacks(facts: dict[str, str]) -> list[TrainerCallback]:
    """Return the callback that writes a report with `facts`; none, and a note, without the extra that draws it."""
    try:
        return [ReportCallback(facts=facts)]
    except ImportError as error:
        print(f"There will be no report: {error}", file=sys.stderr)
        return []
