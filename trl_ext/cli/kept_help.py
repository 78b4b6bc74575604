"""
Print the help text of a command: the one that comes with the package, or one from the cache, where it is kept once it
is made.
"""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..data.cache import cache_dir
from .shipped import shipped


SHIPPED_FLAGS = ("-h", "--help")
FLAGS = (*SHIPPED_FLAGS, "--help_all", "--help-all")
SHOWN_BY = ("trl", "transformers", "torch")  # packages whose options a help text shows


def print_help(command: str, flag: str, run: Callable[[list[str]], None]) -> None:
    """
    Print what `run` prints for the flag alone: what comes with the package, if it shows the options that are
    installed; else from the cache, if neither code nor packages have changed since.
    """
    text = shipped(command) if flag in SHIPPED_FLAGS else None
    print(_from_cache(command, flag, run) if text is None else text, end="")


def _from_cache(command: str, flag: str, run: Callable[[list[str]], None]) -> str:
    kept = cache_dir() / "help" / f"{command}-{flag.strip('-').replace('-', '_')}-{stamp()}.txt"
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8")
    text = printed_by(run, flag)
    with contextlib.suppress(OSError):  # a home that cannot be written makes it slow, not wrong
        _keep(kept, text)
    return text


def printed_by(run: Callable[[list[str]], None], flag: str) -> str:
    """Return what a command prints for a flag that ends it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            run([flag])
        except SystemExit as end:  # argparse's after a help text
            if end.code:
                raise
    return printed.getvalue()


def stamp() -> str:
    """Return what changes whenever this package, the packages whose options it has, or Python change."""
    root = Path(__file__).resolve().parents[1]
    files = ((path, path.stat()) for path in sorted(root.rglob("*.py")))
    facts = [f"{path} {stat.st_mtime_ns} {stat.st_size}" for path, stat in files]
    facts += [sys.version, *map(version, SHOWN_BY)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _keep(path: Path, text: str) -> None:
    """Write the text in place of an older one of the same command and flag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for older in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.txt"):
        older.unlink(missing_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
