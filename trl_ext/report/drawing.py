"""
Draw a panel with matplotlib: colours, lines, legends, thinning; and a figure as inline SVG for the page.

matplotlib is an extra: `pip install 'trl-ext[report]'`. Figures are made without pyplot, which would change settings
of the process that trains.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

from ..runs.log import Series


# Name -> colour on a light page. In SVG each becomes a CSS variable of that name, which dark mode redefines.
COLOURS = {
    "blue": "#0069b4",
    "red": "#c8402a",
    "green": "#1f8a4c",
    "purple": "#8a4fb0",
    "amber": "#b07400",
    "teal": "#007f86",
    "ink": "#1c1e21",
    "muted": "#6a7076",
    "rule": "#d5d9dd",
    "band": "#cfe9d8",
    "page": "#fefefe",
}
OF_RUNS = ("blue", "red", "green", "purple", "amber", "teal")
MOST_POINTS = 400  # more than a panel has pixels for
STYLE = {
    "font.size": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.facecolor": COLOURS["page"],
    "figure.facecolor": COLOURS["page"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["rule"],
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def matplotlib() -> Any:
    """Import the library, or raise an error that says how to install it."""
    try:
        import matplotlib as library
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed. Install it with `pip install 'trl-ext[report]'`."
        ) from error
    return library


def figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches."""
    return matplotlib().figure.Figure(figsize=(width, height))


def thin(points: Series, most: int = MOST_POINTS) -> Series:
    """Return at most `most` points, means of neighbours."""
    steps, values = points
    share = -(-len(values) // most)
    if share <= 1:
        return points
    groups = [slice(i, i + share) for i in range(0, len(values), share)]
    return [steps[g][-1] for g in groups], [sum(values[g]) / len(values[g]) for g in groups]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` − 1 before it."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def curve(axis: Any, points: Series, colour: str, label: str = "", dashed: bool = False, smooth: bool = True) -> None:
    """Draw a metric of the training as a line; of many points the running mean, with the points faint behind it."""
    steps, values = thin(points)
    if not values:
        return
    style = "--" if dashed else "-"
    if len(values) <= 30 or not smooth:
        marker = "." if len(values) <= 60 else None
        axis.plot(steps, values, style, color=COLOURS[colour], marker=marker, label=label)
        return
    axis.plot(steps, values, style, color=COLOURS[colour], alpha=0.3, linewidth=1)
    axis.plot(steps, running_mean(values, len(values) // 15), style, color=COLOURS[colour], label=label)


def held_out(
    axis: Any, points: Series, colour: str, label: str = "", ends: tuple[Series, Series] | None = None
) -> None:
    """Draw a metric of the evaluations as diamonds, with intervals if their `ends`, lower and upper, are known."""
    steps, values = points
    if not values:
        return
    edge = {"markeredgecolor": COLOURS["ink"], "markersize": 6, "linestyle": ":", "zorder": 3}
    if ends is None:
        axis.plot(steps, values, "D", color=COLOURS[colour], label=label, **edge)
        return
    low, high = (dict(zip(*end, strict=True)) for end in ends)
    below = [value - low.get(step, value) for step, value in zip(steps, values, strict=True)]
    above = [high.get(step, value) - value for step, value in zip(steps, values, strict=True)]
    errors = [[max(0.0, e) for e in side] for side in (below, above)]
    axis.errorbar(steps, values, yerr=errors, fmt="D", color=COLOURS[colour], capsize=4, label=label, **edge)


def level(axis: Any, value: float, label: str = "") -> None:
    """Draw a line to compare with, such as chance."""
    axis.axhline(value, color=COLOURS["muted"], linewidth=1, linestyle="--", label=label)


def finish(axis: Any, ylabel: str, xlabel: str = "optimizer step") -> None:
    """Write the labels and, below the axes, a legend if anything has a name; give the axes the rest of the room."""
    axis.set_ylabel(ylabel)
    axis.set_xlabel(xlabel)
    if xlabel == "optimizer step":
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axis.get_legend_handles_labels()
    rows = 0
    if labels:
        columns = max(1, min(len(labels), 58 // (max(map(len, labels)) + 8)))  # letters in a panel's width
        rows = -(-len(labels) // columns)
        style = {"columnspacing": 1.2, "borderpad": 0.1, "borderaxespad": 0.2}
        axis.figure.legend(handles, labels, loc="lower left", ncols=columns, **style)
    # Margins in inches, as the texts have one size; a layout engine would draw everything several times.
    room = axis.figure
    width, height = room.bbox.width / room.dpi, room.bbox.height / room.dpi
    left, right, top, bottom = 0.84, 0.1, 0.22, 0.5 + 0.19 * rows
    axis.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def pixels(drawn: Any) -> Any:
    """Return a figure as an array (height, width, 3) of bytes."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_dpi(120)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def text_line(text: str, width: float, height: float, size: float = 11, colour: str = "ink") -> Any:
    """Return a line of text as pixels; width and height in inches."""
    strip = figure(width, height)
    strip.text(0.09 / width, 0.5, text, fontsize=size, fontweight="bold", color=COLOURS[colour], va="center")
    return pixels(strip)


def inline_svg(drawn: Any, name: str) -> str:
    """Return a figure as an `<svg>`: colours as CSS variables, text in the page's font, nothing from outside."""
    buffer = io.StringIO()
    with matplotlib().rc_context({"svg.hashsalt": name}):  # ids of two figures on a page differ
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", text)
    for name_of, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name_of})")
    return text.strip()
