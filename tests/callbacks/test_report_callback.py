"""`ReportCallback`: the page is there while a run goes on, and what it says of the run is what ran."""

import json
import os
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainerState

import ppo_runs
import tiny
import trl_runs
from trl_ext import ReportCallback, SampleCallback
from trl_ext.report import read_run
from trl_ext.runs.folder import begun_at, is_of_this_run


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def with_report(trainer, **options):
    trainer.add_callback(ReportCallback(**options))
    trainer.train()
    return trainer


def test_page_is_written_while_the_run_goes_on(tmp_path):
    trainer = ppo_runs.ppo_trainer(tmp_path, total_episodes=4)  # 2 steps
    seen = []

    class Look(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            page = tmp_path / "report.html"
            seen.append((page.is_file(), page.is_file() and "refresh" in page.read_text(), read_run(tmp_path).step))

    trainer.add_callback(ReportCallback(seconds=1e-9))  # the page says to load again after a whole second
    trainer.add_callback(Look())
    trainer.train()
    assert seen[0] == (True, True, 1)
    assert seen[1][2] == 2
    page = (tmp_path / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page
    assert "finished" in page
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
    "trainer_of, kind, model",
    [
        (ppo_runs.ppo_trainer, "ppo", "LlamaForCausalLM"),
        (trl_runs.dpo_trainer, "dpo", "actor"),
        (trl_runs.grpo_trainer, "grpo", "actor"),
        (trl_runs.reward_trainer, "reward", "LlamaForSequenceClassification"),
    ],
)
def test_any_trainer_gets_its_page(tmp_path, trainer_of, kind, model):
    trainer = with_report(trainer_of(tmp_path), seconds=0, facts={"training data": "pairs of mine"})
    run = read_run(tmp_path)
    assert run.kind == kind
    assert run.log == trainer.state.log_history
    assert run.facts["model"].endswith(model)
    assert run.facts["training data"] == "pairs of mine"
    assert run.facts["hardware"] == "1 × CPU"
    page = (tmp_path / "report.html").read_text()
    assert page.count("data-panel=") >= 2
    assert "pairs of mine" in page


def test_what_is_trained_and_how_is_counted_from_the_run(tmp_path, undrawn):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((tmp_path / "trainer_state.json").is_file())

    trainer = trl_runs.sft_trainer(tmp_path, seed=7)
    trainer.add_callback(Look())
    with_report(trainer, seconds=3600)  # the page at the end, and never before; the log at its first line
    assert seen == [False, True]
    assert read_run(tmp_path).step == trainer.state.global_step == 2
    known = json.loads((tmp_path / "run.json").read_text())
    parameters = sum(p.numel() for p in tiny.tiny_actor().parameters())
    assert known["facts"]["parameters"] == f"{parameters:,}"
    assert known["facts"]["training data"] == "8 rows"
    assert (known["options"]["seed"], known["options"]["learning_rate"]) == (7, 1e-2)
    assert "weight_decay" not in known["options"]  # left at its default
    assert "hub_token" not in known["options"]


def test_report_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("trl_ext.callbacks.report.write_report", fail)
    trainer = with_report(trl_runs.sft_trainer(tmp_path), seconds=1e-9)
    assert trainer.state.global_step == 2
    assert "OSError: disk full" in caplog.text


def test_an_evaluation_after_the_training_is_on_the_page(tmp_path):
    trainer = with_report(trl_runs.reward_trainer(tmp_path, eval_strategy="no"), seconds=0)
    assert "held-out accuracy" not in (tmp_path / "report.html").read_text()
    trainer.evaluate()
    assert "held-out accuracy" in (tmp_path / "report.html").read_text()
    assert read_run(tmp_path).log == trainer.state.log_history


def test_held_out_rows_are_named_and_data_has_one_line(tmp_path, undrawn):
    with_report(trl_runs.reward_trainer(tmp_path), seconds=0, facts={"data": "pairs.jsonl"})
    known = json.loads((tmp_path / "run.json").read_text())
    assert known["facts"]["training data"] == "pairs.jsonl, 8 rows"
    assert known["facts"]["held-out data"] == "8 rows"
    assert known["data"] == "pairs.jsonl"
    assert "data" not in known["facts"]


def test_several_held_out_sets_are_named_apart(tmp_path, undrawn):
    sets = {"near": tiny.tiny_prompts(2, seed=3), "far": tiny.tiny_prompts(3, seed=4)}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    with_report(ppo_runs.ppo_trainer(tmp_path, {"eval_dataset": sets}, max_steps=2, **evaluation), seconds=0)
    assert read_run(tmp_path).facts["held-out data"] == "near 2 rows; far 3 rows"


def test_second_run_in_the_folder_shows_nothing_of_the_first(tmp_path, undrawn):
    """The first has come further, and has written tables and checkpoints with higher numbers."""
    prompts = ["the cat"]
    for steps in (3, 1):
        trainer = trl_runs.sft_trainer(
            tmp_path, max_steps=steps, save_strategy="steps", save_steps=1, num_train_epochs=9
        )
        trainer.add_callback(SampleCallback(prompts, every=1, max_new_tokens=2))  # its first table comes first
        with_report(trainer, seconds=0)
    run = read_run(tmp_path)
    assert (run.step, run.max_steps) == (1, 1)
    assert run.log == trainer.state.log_history
    assert is_of_this_run(tmp_path / "checkpoint-1")
    assert not is_of_this_run(tmp_path / "checkpoint-3")
    assert is_of_this_run(tmp_path / "samples" / "step_00000.jsonl", tmp_path)
    assert not is_of_this_run(tmp_path / "samples" / "step_00003.jsonl", tmp_path)


def test_resumed_run_has_begun_when_it_was_first_started(tmp_path, undrawn):
    options = {"save_strategy": "steps", "save_steps": 1}
    with_report(trl_runs.sft_trainer(tmp_path, **options), seconds=0)
    first = begun_at(tmp_path)
    trainer = trl_runs.sft_trainer(tmp_path, **options)
    trainer.add_callback(ReportCallback(seconds=0))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert begun_at(tmp_path) == first
    hours = [line["time/elapsed"] for line in trainer.state.log_history]
    assert hours == sorted(hours)
    assert hours[0] > 0
    assert is_of_this_run(tmp_path / "checkpoint-1")


def test_log_is_never_half_written(tmp_path, undrawn, monkeypatch):
    """A reader that comes while it is being written finds the one before."""
    seen, save = [], TrainerState.save_to_json

    def slowly(self, path):
        Path(path).write_text("{")
        seen.append(read_run(tmp_path).step if (tmp_path / "trainer_state.json").is_file() else None)
        save(self, path)

    trainer = trl_runs.sft_trainer(tmp_path)
    monkeypatch.setattr(TrainerState, "save_to_json", slowly)
    with_report(trainer, seconds=1e-9)
    assert seen == [None, 1, 2, 2]
    assert not list(tmp_path.glob("*.part"))


def test_run_that_lives_touches_its_facts(tmp_path, undrawn, monkeypatch):
    seen = []

    class Waits(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.utime(tmp_path / "run.json", (1, 1))
            for _ in range(200):
                if (tmp_path / "run.json").stat().st_mtime > 1:
                    break
                time.sleep(0.01)
            seen.append((tmp_path / "run.json").stat().st_mtime > 1)

    monkeypatch.setattr("trl_ext.callbacks.report.BEAT", 0.01)
    trainer = trl_runs.sft_trainer(tmp_path)
    trainer.add_callback(Waits())
    with_report(trainer, seconds=0)
    assert seen == [True, True]
    time.sleep(0.05)
    os.utime(tmp_path / "run.json", (1, 1))
    time.sleep(0.05)
    assert (tmp_path / "run.json").stat().st_mtime == 1  # no longer, when it has ended


def test_seconds_below_0_are_refused():
    with pytest.raises(ValueError, match="`seconds` is -1"):
        ReportCallback(seconds=-1)
