"""The panels of what a run costs: seconds and memory by phase, tokens per second."""

from collections.abc import Mapping

from ..runs.log import Series, series
from .chart import Chart, Curve
from .panel import Panel, Runs, lines


PHASES = {"generate": "blue", "score": "red", "learn": "green", "reference": "purple", "evaluate": "amber"}


def stacked(curves: Mapping[str, Series], colours: Mapping[str, str], run: str) -> list[Curve]:
    """
    Return the areas of series that have the same steps, each on top of those before; what is below 0 goes downwards
    from 0, as an area of its own with the same label.
    """
    found = []
    for sign in (1, -1):
        floor: list[float] = []
        for label, (steps, values) in curves.items():
            floor = floor or [0.0] * len(values)
            end = [base + sign * max(0.0, sign * value) for base, value in zip(floor, values, strict=True)]
            low, high = (floor, end) if sign > 0 else (end, floor)
            if low != high:
                own = [sign * max(0.0, sign * value) for value in values]
                found.append(Curve(label, (steps, own), colours[label], run, "area", low, high))
            floor = end
    return found


def seconds(runs: Runs) -> Chart:
    """Stack the seconds of a rollout by phase."""
    (run,) = runs
    logged = {phase: series(run.log, f"time/{phase}") for phase in PHASES}
    known = {phase: dict(zip(*points, strict=True)) for phase, points in logged.items() if points[1]}
    steps = [step for step in next(iter(known.values())) if all(step in column for column in known.values())]
    if len(steps) < 2:  # an area of one point is not to be seen
        return Chart("seconds per rollout", [], bottom=0)
    points = {phase: (steps, [column[step] for step in steps]) for phase, column in known.items()}
    return Chart("seconds per rollout", stacked(points, PHASES, run.name), bottom=0)


def memory(runs: Runs) -> Chart:
    """Show the peaks of one run, from 0 upwards, so that a height is a share of the whole."""
    (run,) = runs
    curves = []
    for phase, colour in PHASES.items():
        kind = {"kind": "held out"} if phase == "evaluate" else {"smooth": False}  # a mean of peaks is no peak
        curves.append(Curve(phase, series(run.log, f"memory/{phase}"), colour, run.name, **kind))
    return Chart("GiB at most", curves, bottom=0)


IDLE = {
    "server idle": "time/server_idle",
    "waits for server": "time/server_wait",
    "waits for rewards": "time/reward_wait",
}


def idle(runs: Runs) -> Chart:
    """Show the seconds of a rollout in which one of its machines has nothing to do, with `rollout_lag`."""
    (run,) = runs
    curves = zip(IDLE.items(), PHASES.values(), strict=False)
    found = [Curve(label, series(run.log, key), colour, run.name) for (label, key), colour in curves]
    return Chart("seconds idle per rollout", [curve for curve in found if curve.points[1]], bottom=0)


TIME = Panel(
    "Time by phase",
    (seconds,),
    ("time/generate",),
    "Healthy: shares that stay the same. Generating grows with the length of the responses.",
    per_run=True,
)
IDLE_TIME = Panel(
    "Idle time",
    (idle,),
    ("time/server_idle",),
    "Healthy: one of server and trainer is hardly ever idle: it is the slower one, and sets the pace.",
    per_run=True,
)
THROUGHPUT = Panel(
    "Throughput",
    (lines(("tokens_per_second", ""), ylabel="response tokens per second", evaluations=False),),
    ("tokens_per_second",),
    "Healthy: steady. Of whole cycles: a rollout is sampled, scored and learnt from.",
)
PAIR_THROUGHPUT = Panel(
    "Throughput",
    (
        lines(("tokens_per_second", ""), ylabel="tokens per second", evaluations=False),
        lines(("time/learn", ""), ylabel="seconds per step", evaluations=False),
    ),
    ("tokens_per_second",),
    "Healthy: steady, but for the lengths of the pairs. Of learning, without evaluations.",
)
MEMORY = Panel(
    "Memory by phase",
    (memory,),
    ("memory/",),
    "Healthy: steady after the first step; growth is a leak. Of the process that needs most; on a CPU with all it has "
    "loaded.",
    per_run=True,
)
