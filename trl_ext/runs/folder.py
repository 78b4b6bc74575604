"""Find the files in a run's folder that belong to its last run, and show paths without their place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


FACTS = "run.json"  # written when a run begins, by `ReportCallback`
BEAT = 15.0  # seconds after which a run that lives touches it again
STATE = "trainer_state.json"  # the Trainer's log
# Suffixes of files with rows -> what `datasets` reads them with.
DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Return what `run.json` says of the last run in a folder; `{}` without one."""
    path = Path(folder) / FACTS
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}). Remove it; the run's log is shown without it.") from None


def is_local(path: str) -> bool:
    """Return whether a name is a folder's rather than the hub's, which is "name" or "owner/name"."""
    return Path(path).exists() or path.startswith((".", "/", "outputs/")) or path.count("/") > 1


def begun_at(folder: str | Path) -> float | None:
    """Return when the last run in a folder began, in seconds since the epoch; `None` without a `run.json`."""
    path = Path(folder) / FACTS
    if not path.is_file():
        return None
    # A copied file has another time than the run, so the time inside the file comes first.
    return float(read_facts(folder).get("begun") or path.stat().st_mtime)


def is_of_this_run(path: str | Path, folder: str | Path | None = None) -> bool:
    """Return whether a file exists and is no older than the run in `folder`, by default the one that it lies in."""
    path = Path(path)
    if not path.exists():
        return False
    begun = begun_at(path.parent if folder is None else folder)
    return begun is None or path.stat().st_mtime >= begun


def newest(paths: list[Path]) -> list[Path]:
    """Return paths by the time of their last change, the newest first; of equal times, the last in the alphabet."""
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: another process may be reading it."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def without_place(value: Any) -> Any:
    """Return only the last part of an absolute path, also within lists and dicts; any other value as it is."""
    if isinstance(value, dict):
        return {key: without_place(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_place(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
