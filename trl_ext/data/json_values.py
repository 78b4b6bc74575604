"""Write any value as JSON can hold it, for files that others read and for telling rows apart."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, time
from enum import Enum
from typing import Any


def plain(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """
    Turn a value into what JSON has, within lists and mappings too: dates and times into ISO 8601, bytes into their
    text or else base64, arrays and tensors into lists, sets into sorted lists, anything else into its `str`; nan and
    ±inf, which JSON does not have, into `not_finite` of them, by default null.
    """
    if isinstance(value, Enum):
        return plain(value.value, not_finite)
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else not_finite(value)
    if isinstance(value, Mapping):
        return {_key(key): plain(each, not_finite) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(each, not_finite) for each in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(each, not_finite) for each in value]
    if hasattr(value, "tolist"):  # of an array, a tensor, a scalar of numpy
        # A list of numpy's times has nanoseconds as integers.
        is_of_time = getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")
        listed = (value.astype(str) if is_of_time else value).tolist()
        return str(value) if type(listed) is type(value) else plain(listed, not_finite)
    return _text(value)


def plain_line(row: Any) -> str:
    """Return a row as a line of a JSON Lines file."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def plain_file(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> str:
    """Return the text of a JSON file."""
    return json.dumps(plain(value, not_finite), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def key_of(value: Any) -> str:
    """Return a text that tells values apart as far as JSON does: a date is as its text, a tuple as a list."""
    return json.dumps(plain(value, str), sort_keys=True)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key) if isinstance(key, bool | int) else str(key)


def _text(value: Any) -> Any:
    if isinstance(value, date | time):  # a datetime is a date
        return None if value != value else value.isoformat()  # pandas' NaT
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return base64.b64encode(bytes(value)).decode()
    return str(value)
