"""`Panel`: what the page shows of some log keys, and who draws it; several runs share a plot, each in its colour."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..runs.log import series
from .drawing import COLOURS, OF_RUNS, curve, finish, held_out, level, thin
from .run import Run


Runs = Sequence[Run]


@dataclass(frozen=True)
class Panel:
    """What the page shows of some log keys."""

    title: str
    draw: Callable[[Any, Runs], None]  # the runs on a figure
    # It is shown if a run has logged one of them, in training or held out; one that ends in "/" is a prefix.
    keys: tuple[str, ...]
    caption: str  # what healthy looks like, in a sentence
    height: float = 3.4  # in inches; the width is that of a phone
    per_run: bool = False  # whether every run gets a panel of its own, because runs cannot share it
    at_least: int = 1  # how many of the keys a run must have logged

    def applies_to(self, run: Run) -> bool:
        names = {key.removeprefix("eval_") for line in run.log for key in line if line[key] is not None}
        fits = [n for n in names for key in self.keys if (n.startswith(key) if key.endswith("/") else n == key)]
        return len(fits) >= self.at_least


def colour(runs: Runs, run: Run, alone: str = "blue") -> str:
    """Return the run's colour among several; that of the curve if there is one run."""
    return alone if len(runs) == 1 else OF_RUNS[next(i for i, r in enumerate(runs) if r is run) % len(OF_RUNS)]


def name(runs: Runs, run: Run, label: str) -> str:
    """Return the label of a curve; of several runs, only the first has one."""
    return label if run is runs[0] else ""


def lines(
    *keys: tuple[str, str],
    ylabel: str,
    evaluations: bool = True,
    smooth: bool = True,
    at: float | None = None,
    at_label: str = "",
) -> Callable[[Any, Runs], None]:
    """Make a panel with a curve for each (key, label), its held-out twin as diamonds, and a level to compare with."""

    def draw(figure: Any, runs: Runs) -> None:
        axis = figure.subplots()
        for run in runs:
            for i, (key, label) in enumerate(keys):
                shade, dashed = colour(runs, run, OF_RUNS[i]), i > 0 and len(runs) > 1
                curve(axis, series(run.log, key), shade, name(runs, run, label), dashed, smooth)
                if evaluations:
                    twin = "held out" if label == "training" else f"{label}, held out"
                    held_out(axis, series(run.log, f"eval_{key}"), shade, name(runs, run, twin))
        if at is not None:
            level(axis, at, at_label)
        finish(axis, ylabel)

    return draw


def spread(
    keys: Sequence[str], ends: tuple[str, str], ylabel: str, label: str, alone: str = "blue", at: float | None = None
) -> Callable[[Any, Runs], None]:
    """
    Make a panel with a mean, of the first of `keys` that a run has logged, its held-out twin as diamonds and, of one
    run, the area, called `label`, between the two keys `ends`, in which "{}" stands for that of the mean. Without a
    level `at` to compare with, the axis begins at 0.
    """

    def draw(figure: Any, runs: Runs) -> None:
        axis = figure.subplots()
        for run in runs:
            shade = colour(runs, run, alone)
            key = next((key for key in keys if any(key in line for line in run.log)), keys[-1])
            low, high = (thin(series(run.log, end.format(key))) for end in ends)
            if len(runs) == 1 and low[1] and low[0] == high[0]:
                style = {"color": COLOURS[shade], "alpha": 0.15, "linewidth": 0, "label": label}
                axis.fill_between(low[0], low[1], high[1], **style)
            curve(axis, series(run.log, key), shade, name(runs, run, "mean"))
            held_out(axis, series(run.log, f"eval_{key}"), shade, name(runs, run, "mean, held out"))
        if at is None:
            axis.set_ylim(bottom=0)
        else:
            level(axis, at)
        finish(axis, ylabel)

    return draw


def two_rows(upper: Callable[[Any, Runs], None], lower: Callable[[Any, Runs], None]) -> Callable[[Any, Runs], None]:
    """Make a panel of two, one above the other."""

    def draw(figure: Any, runs: Runs) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        upper(above, runs)
        above.axes[0].set_xlabel("")
        lower(below, runs)

    return draw


def by_name(prefix: str, ylabel: str, suffix: str = "") -> Callable[[Any, Runs], None]:
    """Make a panel with a curve for every key of one run that begins with `prefix` and ends with `suffix`."""

    def draw(figure: Any, runs: Runs) -> None:
        (run,) = runs
        axis = figure.subplots()
        found = {key: None for line in run.log for key in line if key.startswith(prefix) and key.endswith(suffix)}
        for i, key in enumerate(list(found)[: len(OF_RUNS)]):
            label = key.removeprefix(prefix).removesuffix(suffix)
            curve(axis, series(run.log, key), OF_RUNS[i], label)
        finish(axis, ylabel)

    return draw


LEARNING = Panel(
    "Learning rate and gradient",
    two_rows(
        lines(("learning_rate", ""), ylabel="learning rate", evaluations=False, smooth=False),
        lines(("grad_norm", ""), ylabel="gradient norm", evaluations=False),
    ),
    ("learning_rate", "grad_norm"),
    "The norm is that before clipping; spikes ask for a lower rate or a longer warm-up.",
    height=4.4,
)
