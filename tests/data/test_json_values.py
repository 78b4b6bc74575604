"""Values that JSON does not have, in keys, rows and files."""

import datetime
import decimal
import enum
import json
import math
from pathlib import Path

import numpy
import pandas
import pytest
import torch

from trl_ext.data.json_values import key_of, plain, plain_file, plain_line


WHEN = datetime.datetime(2025, 1, 2, 3, 4, 5)
UTC = datetime.UTC


class Colour(enum.StrEnum):
    RED = "red"


class Label(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (WHEN, '"2025-01-02T03:04:05"'),
        (WHEN.replace(tzinfo=UTC), '"2025-01-02T03:04:05+00:00"'),
        (WHEN.date(), '"2025-01-02"'),
        (WHEN.time(), '"03:04:05"'),
        (datetime.timedelta(seconds=3), '"0:00:03"'),
        (pandas.Timestamp(WHEN), '"2025-01-02T03:04:05"'),
        (pandas.NaT, "null"),
        (numpy.datetime64("2025-01-02T03:04:05.123456789"), '"2025-01-02T03:04:05.123456789"'),
        (b"caf\xc3\xa9", '"café"'),
        (b"\xff\x00", '"/wA="'),
        (decimal.Decimal("1.10"), '"1.10"'),
        (math.nan, "null"),
        (-math.inf, "null"),
        (numpy.float32(0.5), "0.5"),
        (numpy.int64(3), "3"),
        (numpy.bool_(True), "true"),
        (numpy.array([[1.0, math.nan]]), "[[1.0, null]]"),
        (torch.tensor([1, 2]), "[1, 2]"),
        (torch.tensor(2.5), "2.5"),
        ({3, 1, 2}, "[1, 2, 3]"),
        (frozenset({"b", "a"}), '["a", "b"]'),
        ((1, (2,)), "[1, [2]]"),
        (range(0), '"range(0, 0)"'),
        ({1: "a", (1, 2): "c", "d": WHEN}, None),
        (Path("a/b"), '"a/b"'),
        (Colour.RED, '"red"'),
        (Label.ONE, "1"),
        ([None, True, 2, "x", 0.25], '[null, true, 2, "x", 0.25]'),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, frozenset) else value),  # the same in every process
)
def test_every_value_has_a_form_in_json(value, text):
    line = plain_line(value)
    assert line.endswith("\n")
    if text is not None:
        assert line.rstrip("\n") == text
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    nested = json.loads(plain_file({"a": [{"b": value}]}))
    assert nested == {"a": [{"b": json.loads(line)}]}


def test_keys_of_equal_values_are_equal_and_of_others_are_not():
    assert key_of({"a": WHEN, "b": {1, 2}}) == key_of({"b": {2, 1}, "a": WHEN})
    values = [WHEN, WHEN.replace(tzinfo=UTC), None, math.nan, math.inf, 1, 1.5, "1", [1], {"a": 1}, True]
    assert len({key_of([value]) for value in values}) == len(values)


def test_numbers_that_are_not_finite_may_be_kept_as_words():
    assert plain({"a": [math.inf, math.nan, 1.0]}, not_finite=str) == {"a": ["inf", "nan", 1.0]}
