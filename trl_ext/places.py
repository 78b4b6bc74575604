"""Files in a run's folder that several read, and paths as they are shown to people."""

from pathlib import Path
from typing import Any


FACTS = "run.json"  # written when a run begins, by `ReportCallback`


def without_place(value: Any) -> Any:
    """Of an absolute path only the last part, also within lists and dicts."""
    if isinstance(value, dict):
        return {key: without_place(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_place(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
