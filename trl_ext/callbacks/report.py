"""`ReportCallback`: keep the report of a run up to date while it runs."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from ..data.json_values import plain_file
from ..report import write_report
from ..report.credit import FOLDER as CREDIT
from ..report.drawing import matplotlib
from ..runs.facts import changed_options, hardware, model_facts, rows_of
from ..runs.failures import in_spite_of_errors
from ..runs.folder import BEAT, FACTS, STATE, begun_at, write_whole
from ..runs.log import series
from .tables import Row, write_credit


logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """
    Writes `report.html` into the run's folder, at the end and, while it runs, at most every `seconds` seconds; the
    page reloads itself until the run is done. Also writes `report.png` at the end, `run.json`, what is trained on
    what, and `trainer_state.json`, the log so far, from which `trl-ext report` makes the same page, or one of several
    runs. Every line of that log gets `time/elapsed`, the seconds that the run has taken so far. A page that cannot be
    written is a warning, not the end of the run.

    Args:
        seconds: at least this long between two pages, each at a log line. 0: at the end only.
        facts: what the page should say and the Trainer does not know. The name in "data", such as `{"data":
            "pairs.jsonl"}`, is put before the number of training rows, also on the model card.
        credit: answers, or pairs, of the last batch whose tokens the page colours by their credit, also in
            `credit/last.jsonl`; with `PPOTrainerX` and `DPOTrainerX`. 0: none.

    Raises:
        ImportError: at construction, without the extra `report`.
    """

    read_credit: Callable[[], list[Row]] | None = None  # a trainer's, who has one

    def __init__(self, seconds: float = 120.0, facts: Mapping[str, str] | None = None, credit: int = 4):
        if seconds < 0:
            raise ValueError(f"`seconds` is {seconds}; it must be 0, for the end only, or more.")
        if credit < 0:
            raise ValueError(f"`credit` is {credit}; it must be 0, for no answers by token, or more.")
        matplotlib()
        self.seconds = seconds
        self.facts = dict(facts or {})
        self.credit = credit
        self._known: dict[str, Any] = {}
        self._last = 0.0
        self._has_ended = self._has_logged = False
        self._begun = time.time()  # before other callbacks write their first tables
        self._started = time.monotonic()
        self._ends_beat = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_ended:
            self._begun = time.time()
        self._has_ended = self._has_logged = False
        before = series(state.log_history, "time/elapsed")[1]  # of a resumed run
        self._started = time.monotonic() - (before[-1] if before else 0.0)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        facts = facts_of(args, **kwargs) | self.facts
        data = facts.pop("data", None)
        if data is not None and "training data" not in self.facts:
            facts["training data"] = ", ".join(filter(None, (data, facts.get("training data"))))
        if state.global_step:  # a resumed run began when it was first started
            with in_spite_of_errors("The report"):
                self._begun = begun_at(folder) or self._begun
        self._known = {"begun": self._begun, "every": self.seconds, "data": data, "facts": facts, "beats": True}
        self._known["options"] = changed_options(args)
        self._write_facts(folder)
        self._ends_beat.set()  # of a training that an error has ended
        self._ends_beat = threading.Event()
        threading.Thread(target=_beat, args=(folder / FACTS, self._ends_beat), daemon=True).start()
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._known and state.log_history:
            state.log_history[-1]["time/elapsed"] = round(time.monotonic() - self._started, 3)
        if not self._has_ended and self.seconds and time.monotonic() - self._last >= self.seconds:
            self._write(args, state, finished=False)
        elif self._known and self.seconds and not self._has_logged:
            self._write_log(args, state)  # for whoever looks before the first page, and should the run be killed
        self._has_logged = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = True
        self._ends_beat.set()
        if self._known and not any("train_runtime" in line for line in state.log_history):  # a signal has ended it
            self._known["stopped"] = state.global_step
            self._write_facts(Path(args.output_dir))
        self._write(args, state, finished=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._known:
            self._note_held_out(Path(args.output_dir), kwargs.get("metrics") or {}, kwargs.get("eval_dataloader"))
        if self._has_ended:  # the last evaluation of a script belongs to its report
            self._write(args, state, finished=True)

    def _note_held_out(self, folder: Path, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note the held-out rows, which are known at their first evaluation; of several sets, each by its name."""
        rows = rows_of(getattr(loader, "dataset", None))
        name = next((key for key in metrics if key.endswith("_runtime")), "eval_runtime")
        name = name.removeprefix("eval").removesuffix("runtime").strip("_")
        known = self._known["facts"].get("held-out data", "")
        text = f"{name} {rows}".strip()
        if rows and text not in known.split("; "):
            self._known["facts"]["held-out data"] = "; ".join(filter(None, (known, text)))
            self._write_facts(folder)

    def _write_facts(self, folder: Path) -> None:
        text = plain_file(self._known, not_finite=str)
        with in_spite_of_errors("The report"):
            write_whole(folder / FACTS, lambda part: part.write_text(text, encoding="utf-8"))

    def _write_log(self, args: Any, state: Any) -> None:
        with in_spite_of_errors("The log"):
            write_whole(Path(args.output_dir) / STATE, lambda part: state.save_to_json(str(part)))

    def _write(self, args: Any, state: Any, finished: bool) -> None:
        if not state.is_world_process_zero:
            return
        self._write_log(args, state)
        with in_spite_of_errors("The report"):
            if self.read_credit is not None:
                path = Path(args.output_dir) / CREDIT / "last.jsonl"  # only one: a long run writes many pages
                write_credit(path, state.global_step, self.read_credit())
            write_report([args.output_dir], refresh=0 if finished else math.ceil(self.seconds), picture=finished)
        self._last = time.monotonic()


def _beat(path: Path, end: threading.Event) -> None:
    """Touch a file as long as the process lives, so that a run that was killed is not taken for a running one."""
    while not end.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def facts_of(args: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any) -> dict[str, str]:
    """Return what is trained, on what, with what, in words."""
    facts = {} if model is None else model_facts(model)
    facts["training data"] = rows_of(getattr(train_dataloader, "dataset", None))
    facts["hardware"] = hardware(args)
    facts["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {name: value for name, value in facts.items() if value}
