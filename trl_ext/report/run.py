"""`Run`: read what a run's folder says about it, while it is running or when it is done."""

import difflib
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runs.alarms import Alarm, alarms
from ..runs.convergence import KL_BAND, Verdict, verdict
from ..runs.folder import BEAT, FACTS, STATE, begun_at, is_of_this_run, newest, read_facts, without_place
from ..runs.log import algorithm
from .credit import Credit, read_credit
from .drawing import OF_RUNS
from .tables import Pair, Sample, read_pairs, read_samples


QUIET = 600.0  # seconds before a run may count as silent


@dataclass(frozen=True)
class Run:
    """
    One run: its log, and what is known of it. `facts` and `options` are for people to read. `heard` is when its log
    was last written, in seconds since the epoch; after `silent_after` more seconds without a log line, it is silent.
    `stopped` says that a signal has ended it, or that its process no longer lives. `colour` is its own among several
    runs, a name of `COLOURS`; `source` is the file that its log is from, below the folder.
    """

    name: str
    log: list[dict[str, Any]]
    facts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    samples: list[Sample] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    credit: Credit | None = None
    heard: float | None = None
    silent_after: float = math.inf
    stopped: bool = False
    colour: str = ""
    source: str = STATE

    @cached_property
    def keys(self) -> list[str]:
        """Return what it has logged, in training or in evaluations, without `eval_`."""
        names = {key: None for line in self.log for key, value in line.items() if value is not None}
        return list(dict.fromkeys(key.removeprefix("eval_") for key in names))

    @cached_property
    def kind(self) -> str | None:
        """Return the algorithm, as in `trl_ext.runs.log.SIGNS`."""
        return algorithm(self.log)

    @property
    def kl_band(self) -> tuple[float, float]:
        """Return the run's own band, else the usual one, in nats per sequence."""
        low, high = self.options.get("kl_band") or KL_BAND
        return float(low), float(high)

    @property
    def is_finished(self) -> bool:
        return any("train_runtime" in line for line in self.log) or 0 < self.max_steps <= self.step

    @property
    def is_silent(self) -> bool:
        """Return whether an unfinished run has stopped, or has logged nothing for so long that it probably has."""
        is_overdue = self.heard is not None and time.time() - self.heard > self.silent_after
        return not self.is_finished and (self.stopped or is_overdue)

    @property
    def state(self) -> str:
        """Return "finished", "running", at which step it has stopped, or for how long it has not logged."""
        if self.stopped and not self.is_finished:
            return f"stopped at step {self.step}"
        if self.is_silent:
            return f"has not logged for {_duration(time.time() - (self.heard or 0.0))}"
        return "finished" if self.is_finished else "running"

    @cached_property
    def verdict(self) -> Verdict:
        return verdict(self.log, self.kl_band)

    @cached_property
    def alarms(self) -> list[Alarm]:
        return alarms(self.log, self.kl_band[1])


def read_run(folder: str | Path) -> Run:
    """
    Read a run from its output folder: the newest `trainer_state.json` in it or in its checkpoints, `run.json` if
    [`ReportCallback`] has written one, and saved completions. Files that are older than the beginning in `run.json`
    are an earlier run's and are skipped.

    Raises:
        FileNotFoundError: when there is no log.
        ValueError: when none can be read, such as one that is half-written.
    """
    folder = Path(folder)
    paths, errors, state, source = _states(folder), [], None, folder
    for path in paths:  # the first that is whole: the Trainer may be writing the others
        try:
            state, source = json.loads(path.read_text(encoding="utf-8")), path
            break
        except ValueError as error:
            errors.append(f"{path} ({error})")
    if state is None:
        raise ValueError(
            f"No log can be read: {', '.join(errors)}. Look again when it is written, or remove the file."
        )
    log = state.get("log_history") or []
    known = _known(folder)
    written = [path.stat().st_mtime for path in paths]
    return Run(
        name=folder.resolve().name,
        log=log,
        facts=known["facts"],
        options=known["options"],
        step=int(state.get("global_step") or 0),
        max_steps=int(state.get("max_steps") or 0),
        samples=read_samples(folder, log),
        pairs=read_pairs(folder),
        credit=read_credit(folder),
        heard=max(written),
        silent_after=_silent_after(written, len(log), begun_at(folder), known.get("every") or 0.0),
        stopped=_has_stopped(known, folder),
        source=source.relative_to(folder).as_posix(),
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several runs, as `read_run` does, and tell them apart."""
    places = [Path(folder) for folder in folders]
    return told_apart([read_run(place) for place in places], places)


def told_apart(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """Give each of several runs its colour and, where folders share a name, as much of their paths as it takes."""
    if len(runs) == 1:
        return list(runs)
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return [
        replace(run, name="/".join(p[-depth:]), colour=OF_RUNS[i % len(OF_RUNS)])
        for i, (run, p) in enumerate(zip(runs, parts, strict=True))
    ]


def _states(folder: Path) -> list[Path]:
    """Return the logs of the last run in a folder, the newest first."""
    there = newest([path for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()])
    paths = [path for path in there if is_of_this_run(path, folder)]
    if paths:
        return paths
    if there:
        raise FileNotFoundError(
            f"{str(folder)!r} holds the log of an earlier run only ({there[0]}): the run that {FACTS} is about has "
            f"not written one yet. {_when_to_look(folder)}, or name another folder."
        )
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, [each.name for each in folder.parent.glob("*/")], n=1)
        meant = f"Did you mean {str(folder.with_name(near[0]))!r}?" if near else _give_run(folder.parent)
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. {meant}")
    if (folder / FACTS).is_file():
        raise FileNotFoundError(f"The run in {str(folder)!r} has written no log yet. {_when_to_look(folder)}.")
    raise FileNotFoundError(
        f"{str(folder)!r} holds no log of a run: neither {STATE} nor checkpoint-*/{STATE}. {_give_run(folder.parent)} "
        "A run that has just begun has a log after its first checkpoint, or at once with `ReportCallback`."
    )


def _when_to_look(folder: Path) -> str:
    if _has_stopped(read_facts(folder), folder):
        return "It has stopped, before its first log line: start it again"
    return "Look again after its next log line"


def _give_run(place: Path) -> str:
    """Return, as a sentence, what to give for a run: the first output folder in a place that has a log."""
    logs = sorted(
        [*place.glob(f"*/{STATE}"), *place.glob(f"*/checkpoint-*/{STATE}"), *place.glob(f"outputs/*/{STATE}")]
    )
    folders = [each.parent.parent if each.parent.name.startswith("checkpoint-") else each.parent for each in logs]
    named = f"`trl-ext report {shlex.quote(str(folders[0]))}`" if folders else "`trl-ext report outputs/ppo-demo`"
    return f"Give the output folder of a run, what its `--output_dir` was, such as {named}."


def _silent_after(written: Sequence[float], lines: int, begun: float | None, every: float) -> float:
    """
    Return the seconds without a new log after which a run is silent: at least 10 minutes, 20 times the usual time of a
    log line and 3 times the time between two logs, `written` at these times or `every` so many seconds. Infinite if
    nothing says how often there is one.
    """
    times = sorted(written if begun is None else (begun, *written))
    if not every and len(times) < 2:
        return math.inf
    between = every or (times[-1] - times[0]) / (len(times) - 1)
    of_line = 0.0 if begun is None else (times[-1] - begun) / max(1, lines)
    return max(QUIET, 20 * of_line, 3 * between)


def _has_stopped(known: dict[str, Any], folder: Path) -> bool:
    """Return whether a signal has ended the run of which `run.json` has said this, or its process no longer lives."""
    return "stopped" in known or (bool(known.get("beats")) and not _lives(folder / FACTS))


def _lives(facts: Path) -> bool:
    """Return whether a run has touched its `run.json` of late; two beats may be late, on a busy machine or disk."""
    return time.time() - facts.stat().st_mtime < 3 * BEAT


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def _known(folder: Path) -> dict[str, Any]:
    """Return `facts` and `options` from `run.json`; without one, what the model's config says."""
    known = read_facts(folder)
    if known:
        return {"facts": {}, "options": {}} | known
    facts = {}
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        config = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        if config.get(key):
            facts["model"] = without_place(str(config[key]))
        elif config.get("architectures"):
            facts["architecture"] = str(config["architectures"][0])
    return {"facts": facts, "options": {}}
