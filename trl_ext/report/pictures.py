"""Draw the panels that a run has, and write a PNG of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .drawing import OF_RUNS, STYLE, figure, matplotlib, pixels, text_line
from .panel import LEARNING, Panel, Runs, lines
from .policy_panels import POLICY
from .preference_panels import PREFERENCE
from .run import Run


WIDTH = 4.4  # inches of a panel
CRITIC = (
    Panel(
        "Explained variance of held-out returns",
        lines(("value/explained_variance_mc", "training"), ylabel="1 − Var(G − V) / Var(G)", at=0),
        ("value/explained_variance_mc",),
        "Rising, then flat or falling: the critic of the best pass is kept. At most 0 a constant explains as much.",
    ),
)
OTHER = (
    Panel("Loss", lines(("loss", "training"), ylabel="loss"), ("loss",), "Falling."),
    Panel(
        "Token accuracy",
        lines(("mean_token_accuracy", "training"), ylabel="share"),
        ("mean_token_accuracy",),
        "The share of tokens that the model puts first; rising.",
    ),
    LEARNING,
)
OF_KIND = {"ppo": POLICY, "grpo": POLICY, "dpo": PREFERENCE, "reward": PREFERENCE, "critic": (*CRITIC, *OTHER)}


def panels_of(runs: Runs) -> list[tuple[Panel, list[Run]]]:
    """Return the panels to draw, each with its runs, in order; those of two algorithms one after the other."""
    chosen: dict[Panel, list[Run]] = {}
    for run in runs:
        for panel in OF_KIND.get(run.kind or "", OTHER):
            if panel.applies_to(run):
                chosen.setdefault(panel, []).append(run)
    found: list[tuple[Panel, list[Run]]] = []
    for panel, of_panel in chosen.items():
        found += [(panel, [run]) for run in of_panel] if panel.per_run else [(panel, of_panel)]
    return found


@dataclass(frozen=True)
class Drawn:
    """A panel on a figure of its own, with its heading."""

    heading: str
    panel: Panel
    figure: Any


def draw(runs: Runs) -> list[Drawn]:
    """Draw the panels that the runs have logged something for."""
    found = []
    with matplotlib().rc_context(STYLE):
        for panel, of_panel in panels_of(runs):
            canvas = figure(WIDTH, panel.height)
            panel.draw(canvas, of_panel)
            suffix = f": {of_panel[0].name}" if panel.per_run and len(runs) > 1 else ""
            found.append(Drawn(panel.title + suffix, panel, canvas))
    return found


def write_picture(drawn: Sequence[Drawn], runs: Runs, path: Path, title: str = "") -> None:
    """Write a PNG of drawn panels, up to three in a row; several runs are named in their colours."""
    import numpy

    columns = min(3, max(len(drawn), 1))
    with matplotlib().rc_context(STYLE):
        strips = [text_line(title, WIDTH * columns, 0.4, size=13)] if title else []
        if len(runs) > 1:
            names = zip(runs, itertools.cycle(OF_RUNS), strict=False)
            strips += [text_line(f"● {run.name}", WIDTH * columns, 0.25, size=10, colour=c) for run, c in names]
        cells = [[text_line(d.heading, WIDTH, 0.35), pixels(d.figure)] for d in drawn]
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)] or [[[text_line("", WIDTH, 1.0)]]]
        picture = _join(strips + [_join([_join(cell, 0) for cell in row], 1) for row in rows], 0)
        matplotlib().image.imsave(path, numpy.ascontiguousarray(picture))


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
