"""Draw the panels of what a run costs: seconds and memory by phase, tokens per second."""

from typing import Any

from ..runs.log import memory as most_held
from ..runs.log import series
from .drawing import COLOURS, curve, finish, held_out, thin
from .panel import Panel, Runs, lines, two_rows


PHASES = {"generate": "blue", "score": "red", "learn": "green", "reference": "purple", "evaluate": "amber"}


def seconds(figure: Any, runs: Runs) -> None:
    """Draw the seconds of a rollout by phase, stacked."""
    (run,) = runs
    axis = figure.subplots()
    phases = [phase for phase in PHASES if series(run.log, f"time/{phase}")[1]]
    known = [dict(zip(*series(run.log, f"time/{phase}"), strict=True)) for phase in phases]
    steps = [step for step in known[0] if all(step in column for column in known)]
    columns = [thin((steps, [column[step] for step in steps])) for column in known]
    style = {"colors": [COLOURS[PHASES[phase]] for phase in phases], "labels": phases}
    axis.stackplot(columns[0][0], *(values for _, values in columns), alpha=0.6, linewidth=0, **style)
    finish(axis, "seconds per rollout")


def memory(figure: Any, runs: Runs) -> None:
    """Draw the peaks of one run, from 0 upwards, so that a height is a share of the whole."""
    (run,) = runs
    axis = figure.subplots()
    for phase, colour in PHASES.items():
        points = series(run.log, f"memory/{phase}")
        if phase == "evaluate":
            held_out(axis, points, colour, phase)
        else:
            curve(axis, points, colour, phase, smooth=False)  # a mean of peaks is no peak
    axis.set_ylim(0, 1.15 * max(most_held(run.log)[1]))
    finish(axis, "GiB at most")


TIME = Panel(
    "Time by phase",
    seconds,
    ("time/generate",),
    "Learning took longest in the runs that were measured, on a CPU.",
    per_run=True,
)
THROUGHPUT = Panel(
    "Throughput",
    lines(("tokens_per_second", ""), ylabel="response tokens per second", evaluations=False),
    ("tokens_per_second",),
    "Steady. Of whole cycles: a rollout is sampled, scored and learnt from.",
)
PAIR_THROUGHPUT = Panel(
    "Throughput",
    two_rows(
        lines(("tokens_per_second", ""), ylabel="tokens per second", evaluations=False),
        lines(("time/learn", ""), ylabel="seconds per step", evaluations=False),
    ),
    ("tokens_per_second",),
    "Of learning, without evaluations; it moves with the lengths of the pairs.",
    height=4.4,
)
MEMORY = Panel(
    "Memory by phase",
    memory,
    ("memory/",),
    "Steady after the first step: growth is a leak. Of the process that needs most; on a CPU with all it has loaded.",
    per_run=True,
)
