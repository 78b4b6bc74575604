"""
Draw charts with matplotlib, for the PNG; and the colours of the page.

matplotlib is an extra: `pip install 'trl-ext[report]'`. Figures are made without pyplot, which would change settings
of the process that trains.
"""

from collections.abc import Sequence
from typing import Any

from .chart import Chart, Curve, running_mean


# Name -> colour on a light page, where it is a CSS variable of that name, which dark mode redefines.
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


def draw_charts(canvas: Any, charts: Sequence[Chart]) -> None:
    """Draw one chart on a figure, or two, one above the other."""
    parts = [canvas] if len(charts) == 1 else canvas.subfigures(len(charts), 1)
    for part, chart in zip(parts, charts, strict=True):
        draw_chart(part, chart)


def draw_chart(canvas: Any, chart: Chart) -> None:
    """Draw a chart on a figure."""
    axis = canvas.subplots()
    if chart.band is not None:
        span = axis.axvspan if chart.band.along_x else axis.axhspan
        span(chart.band.low, chart.band.high, color=COLOURS["band"], zorder=0, linewidth=0, label=chart.band.label)
    for curve in chart.curves:
        if curve.points[1]:
            DRAWN_AS[curve.kind](axis, curve.thinned())
    if chart.level is not None:
        axis.axhline(chart.level[0], color=COLOURS["muted"], linewidth=1, linestyle="--", label=chart.level[1])
    axis.set_ylim(bottom=chart.bottom, top=chart.top)
    finish(axis, chart.ylabel, chart.xlabel)


def line(axis: Any, curve: Curve) -> None:
    """Draw a metric of the training; of many points the running mean, with the points faint behind it."""
    (steps, values), colour = curve.points, COLOURS[curve.colour]
    style = "--" if curve.dashed else "-"
    if curve.low is not None:
        axis.fill_between(steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if len(values) <= 30 or not curve.smooth:
        marker = "." if len(values) <= 60 else None
        axis.plot(steps, values, style, color=colour, marker=marker, label=curve.label)
        return
    axis.plot(steps, values, style, color=colour, alpha=0.3, linewidth=1)
    axis.plot(steps, running_mean(values, len(values) // 15), style, color=colour, label=curve.label)


def steps(axis: Any, curve: Curve) -> None:
    """Draw a metric that changes at once."""
    axis.plot(*curve.points, color=COLOURS[curve.colour], drawstyle="steps-post", label=curve.label)


def held_out(axis: Any, curve: Curve) -> None:
    """Draw a metric of the evaluations as diamonds, with intervals if their ends are known."""
    places, values = curve.points
    edge = {"markeredgecolor": COLOURS["ink"], "markersize": 6, "linestyle": ":", "zorder": 3, "label": curve.label}
    if curve.low is None or curve.high is None:
        axis.plot(places, values, "D", color=COLOURS[curve.colour], **edge)
        return
    ends = zip(values, curve.low, curve.high, strict=True)
    errors = list(zip(*((max(0.0, value - low), max(0.0, high - value)) for value, low, high in ends), strict=True))
    axis.errorbar(places, values, yerr=errors, fmt="D", color=COLOURS[curve.colour], capsize=4, **edge)


def area(axis: Any, curve: Curve) -> None:
    """Draw what lies between two ends."""
    alpha = 0.5 if curve.kind == "area" else 0.15
    style = {"color": COLOURS[curve.colour], "alpha": alpha, "linewidth": 0, "label": curve.label}
    axis.fill_between(curve.points[0], curve.low, curve.high, **style)


def dots(axis: Any, curve: Curve) -> None:
    """Draw points, later ones stronger."""
    places, values = curve.points
    colour = matplotlib().colors.to_rgb(COLOURS[curve.colour])
    colours = [(*colour, 0.25 + 0.75 * (i + 1) / len(values)) for i in range(len(values))]
    axis.scatter(places, values, s=14, c=colours, linewidths=0)
    axis.plot([], [], ".", color=colour, label=curve.label)


DRAWN_AS = {"line": line, "steps": steps, "held out": held_out, "area": area, "spread": area, "dots": dots}


def finish(axis: Any, ylabel: str, xlabel: str = "") -> None:
    """
    Write the labels, the vertical one above the axes, where it is read whole, and, below them, a legend if anything
    has a name; give the axes the rest of the room.
    """
    # With a height of its own: matplotlib would look for one, and measure every tick twice.
    axis.set_title(ylabel, loc="left", y=1.0, fontsize=9, color=COLOURS["muted"])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no exponent above the axes, which hides the label
    axis.set_xlabel(xlabel or "optimizer step")
    if not xlabel:
        axis.xaxis.get_major_locator().set_params(integer=True)
    named: dict[str, Any] = {}
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
        named.setdefault(label, handle)  # several runs have the same names
    rows = 0
    if named:
        columns = max(1, min(len(named), 58 // (max(map(len, named)) + 8)))  # letters in a panel's width
        rows = -(-len(named) // columns)
        style = {"columnspacing": 1.2, "borderpad": 0.1, "borderaxespad": 0.2}
        axis.figure.legend(named.values(), named.keys(), loc="lower left", ncols=columns, **style)
    # Margins in inches, as the texts have one size; a layout engine would draw everything several times.
    room = axis.figure
    width, height = room.bbox.width / room.dpi, room.bbox.height / room.dpi
    left, right, top, bottom = 0.7, 0.1, 0.3, 0.5 + 0.19 * rows
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
