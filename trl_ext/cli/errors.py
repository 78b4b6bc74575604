"""End a command with one sentence instead of a traceback, where this package raised the error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


PACKAGE = __name__.split(".")[0]
DEBUG = "TRL_EXT_DEBUG"  # set by `--debug`, also for the processes that a command starts


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within the context, an error that this package raises ends the command with its text, without a traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:  # an extra that is not installed is one, too
        if package_of(error) != PACKAGE or is_debugging():
            raise
        raise SystemExit(f"error: {error}") from error


def take_debug(words: list[str]) -> list[str]:
    """Return the words without `--debug`, which sets `DEBUG`; with a value it is an option of transformers."""
    following = [*words[1:], "-"]
    left = [words[i] for i in range(len(words)) if words[i] != "--debug" or not following[i].startswith("-")]
    if len(left) < len(words):
        os.environ[DEBUG] = "1"
    return left


def is_debugging() -> bool:
    """Return whether errors are shown with their traceback."""
    return bool(os.environ.get(DEBUG))


def package_of(error: BaseException) -> str:
    """Return the name of the package that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
