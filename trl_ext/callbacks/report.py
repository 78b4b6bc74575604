"""`ReportCallback`: the report of a run, kept up to date while it runs."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from ..places import FACTS
from ..report import write_report
from ..report.drawing import matplotlib
from ..report.run import STATE
from ..run_facts import changed_options, hardware, model_facts, rows_of


logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """
    Writes `report.html` into the run's folder, at the end and, while it runs, at most every `seconds` seconds; the
    page loads itself again until the run is done. At the end also `report.png`. With them `run.json`, what is trained
    on what, and `trainer_state.json`, the log so far, from which `trl-ext report` makes the same page, or one of
    several runs.

    Drawing takes a second or two of the main process. A page that cannot be written is a warning, not the end of the
    run.

    Args:
        seconds: at least this long between two pages, and at most as often as there is a log line. 0: at the end only.
        facts: what the Trainer does not know and the page should say, such as `{"training data": "pairs.jsonl"}`.

    Raises:
        ImportError: at construction, without the extra `report`.
    """

    def __init__(self, seconds: float = 120.0, facts: Mapping[str, str] | None = None):
        if seconds < 0:
            raise ValueError(f"`seconds` is {seconds}; it must be 0, for the end only, or more.")
        matplotlib()
        self.seconds = seconds
        self.facts = dict(facts or {})
        self._last = 0.0
        self._has_ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = False
        if not state.is_world_process_zero:
            return
        known = {"facts": facts_of(args, **kwargs) | self.facts, "options": changed_options(args)}
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).write_text(json.dumps(known, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._has_ended and self.seconds and time.monotonic() - self._last >= self.seconds:
            self._write(args, state, finished=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = True
        self._write(args, state, finished=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_ended:  # the last evaluation of a script belongs to its report
            self._write(args, state, finished=True)

    def _write(self, args: Any, state: Any, finished: bool) -> None:
        if not state.is_world_process_zero:
            return
        try:
            state.save_to_json(str(Path(args.output_dir) / STATE))
            write_report([args.output_dir], refresh=0 if finished else math.ceil(self.seconds), picture=finished)
        except Exception as error:  # a full disk or an odd log line must not cost a run of days
            logger.warning("The report was not written, and training goes on: %s: %s", type(error).__name__, error)
        self._last = time.monotonic()


def facts_of(args: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any) -> dict[str, str]:
    """What is trained, on what, with what; in words."""
    facts = {} if model is None else model_facts(model)
    facts["training data"] = rows_of(getattr(train_dataloader, "dataset", None))
    facts["hardware"] = hardware(args)
    facts["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {name: value for name, value in facts.items() if value}
