"""Ranges of options, written beside each: `lam: Annotated[float, FRACTION] = field(default=0.95)`; and their check."""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints


class Range(NamedTuple):
    """Values that an option may have; `needed` completes "it must be …"."""

    needed: str
    condition: Callable[[Any], bool]
    choices: tuple[Any, ...] = ()  # the values, where they are few

    def holds(self, value: Any) -> bool:
        """Return whether the range has a value; it has none of another type."""
        try:
            return bool(self.condition(value))
        except (TypeError, ValueError, OverflowError):  # a text that is compared with a number, int(NaN), int(inf)
            return False


COUNT = Range("an integer of at least 1", lambda value: type(value) is int and value >= 1)
SWITCH = Range("True or False", lambda value: isinstance(value, bool))
COUNT_OR_UNSET = Range("an integer of at least 1, or unset", lambda value: value is None or COUNT.holds(value))
FRACTION = Range("from 0 to 1", lambda value: 0 <= value <= 1)
FRACTION_OR_UNSET = Range("from 0 to 1, or unset", lambda value: value is None or 0 <= value <= 1)
POSITIVE = Range("above 0", lambda value: value > 0)
POSITIVE_OR_UNSET = Range("above 0, or unset", lambda value: value is None or value > 0)
NOT_NEGATIVE = Range("0 or above, and finite", lambda value: 0 <= value < math.inf)
SHARE_OR_UNSET = Range("above 0 and at most 1, or unset", lambda value: value is None or 0 < value <= 1)
NOT_NEGATIVE_OR_UNSET = Range("0 or above and finite, or unset", lambda value: value is None or 0 <= value < math.inf)
NUMBER_OR_UNSET = Range("a number, or unset", lambda value: value is None or value == float(value))


def one_of(*choices: Any) -> Range:
    """Return the range of an option that is one of a few values."""
    return Range(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices, choices)


def check_ranges(options: Any) -> None:
    """Raise `ValueError` for the first option of a config that is outside the range in its annotation."""
    config_class: Any = type(options)
    for name, allowed in _ranges(config_class):
        require(options, name, allowed.holds(getattr(options, name)), allowed.needed, allowed.choices)


def require(options: Any, name: str, holds: bool, needed: str, choices: tuple[Any, ...] = ()) -> None:
    """Raise `ValueError`, with the value of the option `name` and the nearest of the choices, unless `holds`."""
    if holds:
        return
    value = getattr(options, name)
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    meant = f" Did you mean `{name}={near[0]!r}`?" if near else ""
    raise ValueError(f"`{name}` is {value!r}; it must be {needed}.{meant}")


def default_of(config_class: type, name: str) -> Any:
    """Return the default of a dataclass field."""
    declared = next(f for f in fields(config_class) if f.name == name)
    return declared.default_factory() if callable(declared.default_factory) else declared.default


@functools.cache  # the planner makes thousands of layouts
def _ranges(config_class: type) -> list[tuple[str, Range]]:
    hints = get_type_hints(config_class, include_extras=True).items()
    return [(name, x) for name, hint in hints for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range)]
