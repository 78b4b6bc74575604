"""`Chart`: what a panel shows, as data; the page's script draws it to be explored, matplotlib draws it for the PNG."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


Points = tuple[Sequence[float], Sequence[float]]
"""Places on the horizontal axis, and values."""

MOST_POINTS = 400  # of a curve; more than a panel has pixels for

Kind = Literal["line", "steps", "held out", "area", "spread", "dots"]
"""
line: a metric of the training. steps: one that changes at once. held out: diamonds, with the interval from `low` to
`high`. area: a share of a stack, from `low` to `high`. spread: all that lies between `low` and `high`. dots: points
whose horizontal place is not a step, later ones stronger.
"""


@dataclass(frozen=True)
class Curve:
    """
    One series of a chart.

    Attributes:
        label: what it is, such as "training"; empty if the chart has only one such curve.
        points: places and values. Places are optimizer steps, but for dots.
        colour: a name of `COLOURS`.
        run: the name of the run.
        low, high: ends of areas or of intervals; of a line that was thinned, the smallest and largest of each part.
        smooth: whether it may be shown as a running mean.
        steps: of points whose places are not steps, the optimizer step of each.
    """

    label: str
    points: Points
    colour: str
    run: str = ""
    kind: Kind = "line"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    smooth: bool = True
    dashed: bool = False
    steps: Sequence[int] | None = None

    def thinned(self, most: int = MOST_POINTS) -> "Curve":
        """Return at most `most` points: the mean of each part of the curve, at its last step, and its extremes."""
        places, values = self.points
        share = -(-len(values) // most)
        if share <= 1:
            return self
        parts = [slice(i, i + share) for i in range(0, len(values), share)]
        low, high = self.low, self.high
        if low is not None and high is not None:
            low, high = means(low, parts), means(high, parts)
        elif self.kind == "line":
            low, high = [min(values[part]) for part in parts], [max(values[part]) for part in parts]
        if self.steps is not None:
            steps = [self.steps[part][-1] for part in parts]
            return replace(self, points=(means(places, parts), means(values, parts)), steps=steps)
        return replace(self, points=([places[part][-1] for part in parts], means(values, parts)), low=low, high=high)


@dataclass(frozen=True)
class Band:
    """A range that is healthy: of the vertical axis, or of the horizontal one if `along_x`."""

    low: float
    high: float
    label: str
    along_x: bool = False


@dataclass(frozen=True)
class Chart:
    """
    Curves with their axes.

    Attributes:
        ylabel: what the vertical axis measures, with its unit.
        xlabel: of charts whose horizontal axis is not the progress of training.
        level: a value to compare with, such as chance, and what it is.
        bottom, top: ends of the vertical axis that do not follow the values.
    """

    ylabel: str
    curves: Sequence[Curve]
    xlabel: str = ""
    level: tuple[float, str] | None = None
    band: Band | None = None
    bottom: float | None = None
    top: float | None = None


def means(values: Sequence[float], parts: Sequence[slice]) -> list[float]:
    """Return the mean of each part."""
    return [sum(values[part]) / len(values[part]) for part in parts]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` − 1 before it."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
