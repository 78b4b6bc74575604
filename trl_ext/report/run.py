"""`Run`: what a run's folder says about it, while it is running or when it is done."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..alarms import Alarm, alarms
from ..convergence import KL_BAND, Verdict, verdict
from ..history import algorithm
from ..places import FACTS, without_place
from .tables import Pair, Sample, read_pairs, read_samples


STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """One run: its log, and what is known of it. `facts` and `options` are for people to read."""

    name: str
    log: list[dict[str, Any]]
    facts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    samples: list[Sample] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """The algorithm, as in `trl_ext.history.SIGNS`."""
        return algorithm(self.log)

    @property
    def kl_band(self) -> tuple[float, float]:
        """Nats per sequence: the run's own, else the documents'."""
        low, high = self.options.get("kl_band") or KL_BAND
        return float(low), float(high)

    @property
    def is_finished(self) -> bool:
        return any("train_runtime" in line for line in self.log) or 0 < self.max_steps <= self.step

    @property
    def verdict(self) -> Verdict:
        return verdict(self.log, self.kl_band)

    @property
    def alarms(self) -> list[Alarm]:
        return alarms(self.log, self.kl_band[1])


def read_run(folder: str | Path) -> Run:
    """
    A run from its output folder: the newest `trainer_state.json` in it or in its checkpoints, `run.json` if
    [`ReportCallback`] has written one, and completions that were written down.

    Raises:
        FileNotFoundError: where no log is to be found.
    """
    folder = Path(folder)
    state = _newest_state(folder)
    log = state.get("log_history") or []
    known = _known(folder)
    return Run(
        name=folder.resolve().name,
        log=log,
        facts=known["facts"],
        options=known["options"],
        step=int(state.get("global_step") or 0),
        max_steps=int(state.get("max_steps") or 0),
        samples=read_samples(folder, log),
        pairs=read_pairs(folder),
    )


def name_apart(runs: list[Run], folders: list[Path]) -> list[Run]:
    """Runs whose folders have one name get as much of their paths as tells them apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(2, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return [Run(**{**vars(run), "name": "/".join(p[-depth:])}) for run, p in zip(runs, parts, strict=True)]


def _newest_state(folder: Path) -> dict[str, Any]:
    """The state that has come furthest; of two equal ones, that of the folder itself."""
    paths = [path for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no log of a run: neither {STATE} nor checkpoint-*/{STATE}. Give the `output_dir` of a "
            "run; one that is still running has a log after its first checkpoint, or at once with `ReportCallback`."
        )
    states = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return max(states, key=lambda state: (state.get("global_step") or 0, len(state.get("log_history") or [])))


def _known(folder: Path) -> dict[str, Any]:
    """`facts` and `options` from `run.json`, else from the model card and the model's config."""
    if (folder / FACTS).is_file():
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    facts = {}
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        config = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        if config.get(key):
            facts["model"] = without_place(str(config[key]))
        elif config.get("architectures"):
            facts["architecture"] = str(config["architectures"][0])
    return {"facts": facts, "options": _table_of_the_card(folder / "README.md")}


def _table_of_the_card(card: Path) -> dict[str, Any]:
    """The rows of the table that `PPOTrainerX` adds to its model card."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    _, _, section = text.partition("## What was trained, and how")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", section, flags=re.MULTILINE)
    return {name.strip(): value.strip() for name, value in rows}
