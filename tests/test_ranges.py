"""The ranges of options."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from trl_ext import PPOConfigX, ranges
from trl_ext.ppo import options


@dataclass
class Toy:
    share: Annotated[float, ranges.FRACTION] = 0.5
    size: Annotated[int | None, ranges.POSITIVE_OR_UNSET] = None
    free: float = -1.0


@dataclass
class LargerToy(Toy):
    kind: Annotated[str, ranges.one_of("a", "b")] = "a"
    share: Annotated[float, ranges.POSITIVE] = 2.0


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        (ranges.COUNT, [1, 7], [0, -1, 1.5, 2.0, True, math.nan, math.inf, None, "1", [1]]),
        (ranges.SWITCH, [True, False], [0, 1, None, "False", "no"]),
        (ranges.COUNT_OR_UNSET, [None, 1], [0, 1.5, "a"]),
        (ranges.FRACTION, [0, 0.3, 1], [-0.1, 1.1, math.nan, None, "0.5"]),
        (ranges.FRACTION_OR_UNSET, [None, 0.3], [1.1, "a"]),
        (ranges.POSITIVE, [1e-9, 5], [0, -1, math.nan, None, "a", {}]),
        (ranges.POSITIVE_OR_UNSET, [None, 0.1], [0, -1, "a"]),
        (ranges.NOT_NEGATIVE, [0, 3.5], [-0.1, math.inf, math.nan, None, "a"]),
        (ranges.NOT_NEGATIVE_OR_UNSET, [None, 0, 3.5], [-0.1, "a"]),
        (ranges.NUMBER_OR_UNSET, [None, -2, 0.5], [math.nan, "1", [1.0]]),
        (ranges.one_of(None, "x"), [None, "x"], ["y", "", ["x"]]),
    ],
)
def test_range_holds_its_values_and_no_others(allowed, inside, outside):
    assert [allowed.holds(value) for value in inside] == [True] * len(inside)
    assert [allowed.holds(value) for value in outside] == [False] * len(outside)


def test_option_outside_its_range_is_named_with_its_value():
    ranges.check_ranges(Toy())
    with pytest.raises(ValueError, match=r"`share` is 1\.5; it must be from 0 to 1\."):
        ranges.check_ranges(Toy(share=1.5))
    with pytest.raises(ValueError, match=r"`size` is 0; it must be above 0, or unset\."):
        ranges.check_ranges(Toy(size=0))


def test_class_that_inherits_options_checks_them_and_may_replace_a_range():
    ranges.check_ranges(LargerToy(share=1.5))
    for wrong, message in (({"size": -1}, "`size` is -1"), ({"kind": "c"}, "one of"), ({"share": 0.0}, "above 0")):
        with pytest.raises(ValueError, match=message):
            ranges.check_ranges(LargerToy(**wrong))


def test_option_that_a_user_adds_to_the_config_has_its_range_too():
    @dataclass
    class Mine(PPOConfigX):
        weight: Annotated[float, ranges.NOT_NEGATIVE] = 0.0

    assert Mine(output_dir="unused", report_to="none", weight=1.0).weight == 1.0
    with pytest.raises(ValueError, match="`weight` is -1"):
        Mine(output_dir="unused", report_to="none", weight=-1.0)


def test_every_topic_of_options_has_a_title():
    """The command line's help groups the options by topic."""
    topics = [part for part in PPOConfigX.__mro__ if part.__module__ == options.__name__]
    assert len(topics) == 11
    for topic in topics:
        assert 5 < len(vars(topic)["TOPIC"]) < 50
        assert not topic.TOPIC.endswith(".")
