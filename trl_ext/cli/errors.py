"""End a command with one sentence instead of a traceback, where this package raised the error or knows the cure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


PACKAGE = __name__.split(".")[0]
DEBUG = "TRL_EXT_DEBUG"  # set by `--debug`, also for the processes that a command starts


# What other packages say of options that a user has given -> what to do.
KNOWN = {
    "No module named 'mpi4py'": "`deepspeed` needs processes that a launcher has started: add `--nproc`, the number "
    "of GPUs, also for one.",
    "only works in distributed training": "`fsdp` needs several processes: add `--nproc`, the number of GPUs.",
    "`args.metric_for_best_model` must be provided": "`save_strategy=best` needs `--metric_for_best_model`, such as "
    "eval_loss.",
}


@contextmanager
def usage_errors() -> Iterator[None]:
    """
    Within the context, an error that this package raises ends the command with its text, without a traceback, and so
    does one of another package whose cure is `KNOWN`.
    """
    try:
        yield
    except (ValueError, ImportError) as error:  # an extra that is not installed is one, too
        cure = next((cure for said, cure in KNOWN.items() if said in str(error)), None)
        if package_of(error) == PACKAGE:
            cure = str(error)
        if cure is None or is_debugging():
            raise
        raise SystemExit(f"error: {cure}") from error


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
