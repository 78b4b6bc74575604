"""`Panel`: what the page shows of some log keys, and who makes it; several runs share a chart, each in its colour."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runs.log import series
from .chart import Chart, Curve
from .drawing import OF_RUNS
from .run import Run


Runs = Sequence[Run]
ChartOf = Callable[[Runs], Chart]


@dataclass(frozen=True)
class Panel:
    """A part of the page about some log keys: one chart, or two that belong together."""

    title: str
    charts: tuple[ChartOf, ...]
    # It is shown if a run has logged one of them, in training or held out; one that ends in "/" is a prefix.
    keys: tuple[str, ...]
    caption: str  # what healthy looks like: "Healthy: …", then how to read it
    per_run: bool = False  # whether every run gets a panel of its own, because runs cannot share it
    at_least: int = 1  # how many of the keys a run must have logged

    def applies_to(self, run: Run) -> bool:
        fits = [n for n in run.keys for key in self.keys if (n.startswith(key) if key.endswith("/") else n == key)]
        return len(fits) >= self.at_least


def lines(
    *keys: tuple[str, str],
    ylabel: str,
    evaluations: bool = True,
    smooth: bool = True,
    level: tuple[float, str] | None = None,
) -> ChartOf:
    """Make a chart with a curve for each (key, label), its held-out twin as diamonds, and a level to compare with."""

    def chart(runs: Runs) -> Chart:
        curves = []
        for run in runs:
            for i, (key, label) in enumerate(keys):
                shade, dashed = run.colour or OF_RUNS[i], i > 0 and bool(run.colour)
                curves.append(Curve(label, series(run.log, key), shade, run.name, smooth=smooth, dashed=dashed))
                if evaluations:
                    twin = "held out" if label == "training" else f"{label}, held out"
                    curves.append(Curve(twin, series(run.log, f"eval_{key}"), shade, run.name, "held out"))
        return Chart(ylabel, curves, level=level)

    return chart


def spread(
    keys: Sequence[str],
    ends: tuple[str, str],
    ylabel: str,
    label: str,
    alone: str = "blue",
    bottom: float | None = None,
) -> ChartOf:
    """
    Make a chart with a mean, of the first of `keys` that a run has logged, its held-out twin as diamonds and, of one
    run, the area, called `label`, between the two keys `ends`, in which "{}" stands for that of the mean. It begins at
    `bottom`; without one, 0 is a level to compare with.
    """

    def chart(runs: Runs) -> Chart:
        curves = []
        for run in runs:
            shade = run.colour or alone
            key = next((key for key in keys if any(key in line for line in run.log)), keys[-1])
            low, high = (series(run.log, end.format(key)) for end in ends)
            if len(runs) == 1 and low[1] and low[0] == high[0]:
                curves.append(Curve(label, low, shade, run.name, "spread", low[1], high[1]))
            curves.append(Curve("mean", series(run.log, key), shade, run.name))
            curves.append(Curve("mean, held out", series(run.log, f"eval_{key}"), shade, run.name, "held out"))
        return Chart(ylabel, curves, bottom=bottom, level=(0.0, "") if bottom is None else None)

    return chart


def by_name(prefix: str, ylabel: str, suffix: str = "") -> ChartOf:
    """Make a chart with a curve for every key of one run that begins with `prefix` and ends with `suffix`."""

    def chart(runs: Runs) -> Chart:
        (run,) = runs
        found = [key for key in run.keys if key.startswith(prefix) and key.endswith(suffix)]
        named = [(key.removeprefix(prefix).removesuffix(suffix), series(run.log, key)) for key in found]
        of_runs = zip(OF_RUNS, named, strict=False)
        return Chart(ylabel, [Curve(label, points, shade, run.name) for shade, (label, points) in of_runs])

    return chart


LEARNING = Panel(
    "Learning rate and gradient",
    (
        lines(("learning_rate", ""), ylabel="learning rate", evaluations=False, smooth=False),
        lines(("grad_norm", ""), ylabel="gradient norm before clipping", evaluations=False),
    ),
    ("learning_rate", "grad_norm"),
    "Healthy: a norm without spikes; where there are some, lower the rate or warm up for longer.",
)
