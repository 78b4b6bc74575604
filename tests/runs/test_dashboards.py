"""`report_to`: what the trainers log arrives in TensorBoard and in Trackio, key by key and number by number."""

import contextlib
import json
import math
import sqlite3

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpo_runs
import ppo_runs


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
RUNS = {
    "PPOTrainerX": ppo_runs.ppo_run,
    "DPOTrainerX": lambda folder, **options: dpo_runs.dpo_run(
        folder, {"eval_dataset": dpo_runs.tiny_pairs(4)}, eval_strategy="steps", eval_steps=1, **options
    ),
}


def logged(trainer):
    """(step, key) -> value, of the lines with metrics."""
    return {
        (line["step"], key): value
        for line in trainer.state.log_history
        for key, value in line.items()
        if key != "step" and "train_runtime" not in line and isinstance(value, float | int)
    }


def check(found, expected):
    """`found`: (step, tag) -> value. transformers writes training under `train/`, evaluations under `eval/`."""
    assert len(expected) > 50
    for (step, key), value in expected.items():
        tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        assert math.isclose(found[(step, tag)], value, rel_tol=1e-5, abs_tol=1e-6), (step, tag)


@pytest.mark.parametrize("name", RUNS)
def test_tensorboard_gets_every_number(tmp_path, name, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = RUNS[name](tmp_path / "run", report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    check({(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}, logged(trainer))


@pytest.mark.parametrize("name", RUNS)
def test_trackio_gets_every_number(tmp_path, name, monkeypatch):
    """Into one run of its dashboard's database, an evaluation behind the training too."""
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    trainer = RUNS[name](tmp_path / "run", report_to="trackio", project="dashboards")
    trainer.evaluate(trainer.train_dataset)
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # what is waiting is written
    with contextlib.closing(sqlite3.connect(tmp_path / "dashboards.db")) as database:
        ((run,),) = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    found = {
        (row["train/global_step"], key): v for row in rows if "train/global_step" in row for key, v in row.items()
    }
    check(found, logged(trainer))
    assert run.startswith("run-")
