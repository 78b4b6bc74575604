"""Keep the help text of a command in the cache: to make it, torch, transformers and TRL are imported, for seconds."""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..data.cache import cache_dir


FLAGS = ("-h", "--help", "--help_all", "--help-all")
SHOWN_BY = ("trl", "transformers", "torch")  # packages whose options a help text shows


def print_help(command: str, flag: str, run: Callable[[list[str]], None]) -> None:
    """Print what `run` prints for the flag alone, from the cache if neither code nor packages have changed since."""
    kept = cache_dir() / "help" / f"{command}-{flag.strip('-').replace('-', '_')}-{stamp()}.txt"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                run([flag])
            except SystemExit as end:  # argparse's after a help text
                if end.code:
                    raise
        text = printed.getvalue()
        with contextlib.suppress(OSError):  # a home that cannot be written makes it slow, not wrong
            _keep(kept, text)
    print(text, end="")


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
