"""The panels of a run with their charts, and a PNG of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chart import Chart
from .drawing import OF_RUNS, STYLE, draw_charts, figure, matplotlib, pixels, text_line
from .panel import LEARNING, Panel, Runs, lines
from .policy_panels import POLICY
from .preference_panels import PREFERENCE
from .run import Run


WIDTH = 4.4  # inches of a panel
HEIGHTS = {1: 3.4, 2: 5.6}  # by the number of its charts
CRITIC = (
    Panel(
        "Explained variance of held-out returns",
        (
            lines(
                ("value/explained_variance_mc", "training"),
                ylabel="1 − Var(G − V) / Var(G)",
                level=(0.0, "a constant"),
            ),
        ),
        ("value/explained_variance_mc",),
        "Healthy: rising, then flat or falling; the critic of the best pass is kept. At 0 a constant is as good.",
    ),
)
OTHER = (
    Panel("Loss", (lines(("loss", "training"), ylabel="loss"),), ("loss",), "Healthy: falling."),
    Panel(
        "Token accuracy",
        (lines(("mean_token_accuracy", "training"), ylabel="share of tokens that the model puts first"),),
        ("mean_token_accuracy",),
        "Healthy: rising.",
    ),
    LEARNING,
)
OF_KIND = {"ppo": POLICY, "grpo": POLICY, "dpo": PREFERENCE, "reward": PREFERENCE, "critic": (*CRITIC, *OTHER)}


@dataclass(frozen=True)
class Shown:
    """A panel with its heading and its charts, of all runs that it applies to."""

    heading: str
    panel: Panel
    charts: Sequence[Chart]


def panels_of(runs: Runs) -> list[tuple[Panel, list[Run]]]:
    """Return the panels to show, each with its runs, in order; those of two algorithms one after the other."""
    chosen: dict[Panel, list[Run]] = {}
    for run in runs:
        for panel in OF_KIND.get(run.kind or "", OTHER):
            if panel.applies_to(run):
                chosen.setdefault(panel, []).append(run)
    found: list[tuple[Panel, list[Run]]] = []
    for panel, of_panel in chosen.items():
        found += [(panel, [run]) for run in of_panel] if panel.per_run else [(panel, of_panel)]
    return found


def charts_of(runs: Runs) -> list[Shown]:
    """Return the panels that the runs have logged something for, with their charts."""
    found = []
    for panel, of_panel in panels_of(runs):
        suffix = f": {of_panel[0].name}" if panel.per_run and len(runs) > 1 else ""
        charts = [chart_of(of_panel) for chart_of in panel.charts]
        found.append(Shown(panel.title + suffix, panel, [chart for chart in charts if has_points(chart)]))
    return [shown for shown in found if shown.charts]


def has_points(chart: Chart) -> bool:
    return any(curve.points[1] for curve in chart.curves)


def write_picture(panels: Sequence[Shown], runs: Runs, path: Path, title: str = "") -> None:
    """Draw panels and write a PNG of them in up to three columns; several runs are named in their colours."""
    library = matplotlib()
    import numpy

    columns = min(3, max(len(panels), 1))
    with library.rc_context(STYLE):
        strips = [text_line(title, WIDTH * columns, 0.4, size=13)] if title else []
        if len(runs) > 1:
            names = zip(runs, itertools.cycle(OF_RUNS), strict=False)
            strips += [text_line(f"● {run.name}", WIDTH * columns, 0.25, size=10, colour=c) for run, c in names]
        filled: list[list[Any]] = [[] for _ in range(columns)]
        for shown in panels:  # each into the column that is shortest so far, so that no gaps are left
            min(filled, key=lambda column: sum(image.shape[0] for image in column)).extend(_cell(shown))
        below = _join([_join(column, 0) for column in filled], 1) if panels else text_line("", WIDTH, 1.0)
        picture = _join([*strips, below], 0)
        library.image.imsave(path, numpy.ascontiguousarray(picture))


def _cell(shown: Shown) -> list[Any]:
    canvas = figure(WIDTH, HEIGHTS[len(shown.charts)])
    draw_charts(canvas, shown.charts)
    return [text_line(shown.heading, WIDTH, 0.35), pixels(canvas)]


def _join(images: Sequence[Any], axis: int) -> Any:
    """Join images under each other (axis 0) or side by side (1), white where one is narrower or lower."""
    import numpy

    other = 1 - axis
    size = max(image.shape[other] for image in images)
    padded = []
    for image in images:
        fill = [(0, 0), (0, 0), (0, 0)]
        fill[other] = (0, size - image.shape[other])
        padded.append(numpy.pad(image, fill, constant_values=254))
    return numpy.concatenate(padded, axis)
