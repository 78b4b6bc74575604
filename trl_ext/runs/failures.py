"""Say why a run ended from outside: a disk that takes no more, memory that is out, a reward function that fails."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
LIMITED = (errno.EFBIG,)
# How torch's and safetensors' own writers speak of a file that they could not write; only the last names an error
# number. Torch's second is of a disk that is full.
_NO_FOLDER = r"Parent directory .* does not exist"
_WRITERS = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|file write failed|iostream error|os error (\d+)|"
    + _NO_FOLDER,
    re.IGNORECASE,
)


class RunError(RuntimeError):
    """
    Something outside the run has ended it. The text says what failed and what to do; the original error is its
    `__cause__`. The last checkpoint is complete in any case.
    """


# ---- Disk ----


def is_of_the_disk(error: BaseException) -> bool:
    """Return whether a file could not be written."""
    return isinstance(error, OSError) or _WRITERS.search(str(error)) is not None


def about_the_disk(error: BaseException, folder: Path, needed: int) -> str:
    """
    Return what an error of writing says, and what to do.

    Args:
        folder: where was written.
        needed: about how many bytes were still to be written; 0 if that is not known.
    """
    number = _number(error)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    said = os.strerror(number) if number else str(error).splitlines()[0]
    file = getattr(error, "filename", None)
    what = f"{type(error).__name__}, {said}" + (f": {file}" if file else "")
    has_free = f"{there} has {free / GIB:.2f} GiB free"
    if number in FULL or free < needed:
        cure = has_free + (f", of about {needed / GIB:.2f} that are needed" if needed else "") + ": free some"
    elif number in REFUSED:
        cure = f"See that this user may write to {folder}, and that it is not mounted read-only"
    elif number in LIMITED:
        cure = "The system limits the size of a file: raise the limit (`ulimit -f`)"
    elif number in GONE:
        cure = f"See that {folder} is there, such as a disk that is no longer mounted"
    else:
        cure = f"See that {folder} can be written ({has_free})"
    return f"{what}. {cure}, or give another `output_dir`."


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Within the context, an error of the disk is a `RunError`: what was not written, why, and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not is_of_the_disk(error):
            raise
        raise RunError(f"{what} was not written: {about_the_disk(error, folder, 0)}") from error


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if re.search(_NO_FOLDER, str(error)):
        return errno.ENOENT
    found = _WRITERS.search(str(error))
    return int(found[1]) if found and found[1] else None


# ---- Memory ----


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host had no memory left."""
    if isinstance(error, RunError):  # which may say what another program has said
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


WHILE = {
    "generate": "while it generated",
    "score": "while it scored a rollout",
    "learn": "while it learned",
    "evaluate": "during an evaluation",
    "reference": "while the reference scored the data",
}


def about_memory(error: BaseException, phase: str | None, step: int, cure: str) -> str:
    """
    Return what an error of memory says, in which phase, and what to do.

    Args:
        phase: one of `WHILE`; `None` between phases, such as while weights are loaded or saved.
        cure: what needs less memory in this phase, as the end of a sentence.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = WHILE.get(phase or "", "between two phases")
    return f"The run was out of memory {where}, at step {step}: {said:.300}. To need less there: {cure}."


# ---- What no run ends for ----


@contextmanager
def in_spite_of_errors(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Within the context, an error is a warning: a full disk or an odd log line must not end a run of days."""
    try:
        yield
    except kind as error:
        logger.warning("%s was not written, and training goes on: %s: %s", what, type(error).__name__, error)
