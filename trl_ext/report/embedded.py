"""Embed in the page all that draws its curves without a network: thinned curves, a plotting library, a script."""

import base64
import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.log import hours, tokens
from .chart import Chart, Curve, Points
from .pictures import Shown
from .run import Run


def library(name: str) -> str:
    """Return a file of uPlot as the package uplot-python has it, without importing that package."""
    if (found := importlib.util.find_spec("uplot")) is None:
        raise ImportError(
            "Reports need uplot-python, which is not installed. Install it with `pip install 'trl-ext[report]'`."
        )
    (folder,) = found.submodule_search_locations or []
    return (Path(folder) / "static" / name).read_text(encoding="utf-8")


def scripts() -> list[str]:
    """Return the texts of the library and of the page's own script."""
    return [library("uPlot.iife.js"), Path(__file__).with_name("page.js").read_text(encoding="utf-8")]


def style() -> str:
    """Return the library's style sheet."""
    return library("uPlot.min.css")


def policy(texts: Sequence[str]) -> str:
    """Return the page's content security policy: these scripts run, nothing else does, and nothing is loaded."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    of_scripts = " ".join(f"'sha256-{each}'" for each in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {of_scripts}"


def curves_json(panels: Sequence[Shown], runs: Sequence[Run]) -> str:
    """Return the curves of all panels, thinned, as JSON that closes no element of HTML and opens none."""
    arrays: dict[tuple[float | None, ...], int] = {}  # most curves of a run share their steps

    def array(values: Sequence[float]) -> int:
        return arrays.setdefault(tuple(map(short, values)), len(arrays))

    def curve(given: Curve) -> dict[str, Any]:
        thinned = given.thinned()
        places, values = thinned.points
        found = {"label": given.label, "run": names.index(given.run), "colour": given.colour, "kind": given.kind}
        found |= {"steps": array(places if thinned.steps is None else thinned.steps), "y": array(values)}
        found |= {} if thinned.steps is None else {"x": array(places)}
        if thinned.low is not None and thinned.high is not None:
            found |= {"low": array(thinned.low), "high": array(thinned.high)}
        return found | {"dashed": given.dashed, "smooth": given.smooth}

    def chart(given: Chart) -> dict[str, Any]:
        band = given.band and vars(given.band)
        found = {"ylabel": given.ylabel, "xlabel": given.xlabel, "level": given.level, "band": band}
        curves = [curve(each) for each in given.curves if each.points[1]]
        return found | {"bottom": given.bottom, "top": given.top, "curves": curves}

    def progress(points: Points) -> list[int] | None:
        thinned = Curve("", points, "").thinned().points
        return [array(part) for part in thinned] if thinned[1] else None

    names = [run.name for run in runs]
    data = {
        "runs": [
            {"name": run.name, "tokens": progress(tokens(run.log)), "hours": progress(hours(run.log))} for run in runs
        ],
        "panels": [{"title": shown.heading, "charts": [chart(each) for each in shown.charts]} for shown in panels],
        "arrays": list(arrays),  # evaluated after what fills it
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def short(value: float) -> float | int | None:
    """Return a number with as many digits as a picture shows; `None` if it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
