"""End a command with one sentence instead of a traceback, where this package raised the error."""

from collections.abc import Iterator
from contextlib import contextmanager


PACKAGE = __name__.split(".")[0]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within the context, an error that this package raises ends the command with its text, without a traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:  # an extra that is not installed is one, too
        if package_of(error) != PACKAGE:
            raise
        raise SystemExit(f"error: {error}") from error


def package_of(error: BaseException) -> str:
    """Return the name of the package that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
