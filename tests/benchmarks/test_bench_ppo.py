"""`benchmarks/bench_ppo.py`: the arithmetic of its table, what a run takes part in, and one run on a tiny model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from commands import script


def run(*totals, peak):
    """A run whose updates took these seconds on two threads: 1/2 to generate, 1/4 to score, 1/4 to learn."""
    updates = [{"generate": t / 2, "score": t / 4, "learn": t / 4, "total": t, "cpu": 2 * t} for t in totals]
    return {"updates": updates, "peak_gb": peak, "load": 0.0}


def test_summary_leaves_out_first_updates_and_takes_medians_over_runs():
    summary = script("bench_ppo").summarise([run(100, 4, 8, peak=2.0), run(100, 12, 20, peak=3.0)])
    assert summary == {"generate": 5.0, "score": 2.5, "learn": 2.5, "total": 10.0, "cpu": 20.0, "peak_gb": 3.0}


def test_table_compares_with_the_baseline():
    bench = script("bench_ppo")
    slow, fast = [run(0, 30, peak=8.0)], [run(0, 12, peak=6.0)]
    fast[0]["updates"][1]["cpu"] = 15
    lines = bench.table({bench.BASELINE: slow, "head": fast}).splitlines()
    assert lines[2:] == [
        "| TRL 1.12 `PPOTrainer` | 15.0 | 7.5 | 7.5 | 30.0 | 60.0 | 8.0 | 1.00 (1.00) | 1.00 |",
        '| `critic="head"` | 6.0 | 3.0 | 3.0 | 12.0 | 15.0 | 6.0 | 2.50 (4.00) | 0.75 |',
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_trainers_take_turns_and_every_run_is_kept(monkeypatch, tmp_path, capsys):
    bench = script("bench_ppo")
    seen = []

    def measure(python, job, folder):
        seen.append((python, job["trainer"], job["batch"], job["updates"]))
        return run(9, 2, peak=1.0)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "save_models", lambda config, folder: None)
    monkeypatch.setattr(bench, "baseline_python", lambda folder: "python of TRL 1.12")
    output = tmp_path / "bench.json"
    argv = ["bench_ppo.py", "--shapes", "tiny", "--runs", "2", "--updates", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    turns = [("python of TRL 1.12", "trl-1.12"), (sys.executable, "model"), (sys.executable, "head")]
    assert seen == [(*turn, 4, 2) for turn in turns] * 2
    assert {trainer: len(runs) for trainer, runs in json.loads(output.read_text())["tiny"].items()} == dict.fromkeys(
        ("trl-1.12", "model", "head"), 2
    )
    assert "| 2.0 | 4.0 | 1.0 | 1.00 (1.00) | 1.00 |" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("trainer", ["model-padded", "head"])
def test_varied_lengths_are_those_of_the_lists(tmp_path, trainer):
    """On the tiny model: the listed prompts and answers, packed or not."""
    setup, worker = script("bench_ppo_setup"), script("bench_ppo_worker")
    config = setup.SHAPES["tiny"]["config"]
    setup.save_models(config, tmp_path)
    job = setup.SHAPES["tiny"]["job"] | {"prompts": [3, 9, 5, 2], "answers": [8, 1, 4, 6], "trainer": trainer}
    job |= {"updates": 2, "models": str(tmp_path), "output_dir": str(tmp_path / "out")}
    trainer = worker.build(job, worker.UpdateClock(steps_per_update=2))
    trainer.train()
    rollout = trainer.run_state.rollout
    assert sorted(rollout.prompt_mask.sum(1).tolist()) == [2, 3, 5, 9]
    assert sorted(rollout.attended.sum(1).tolist()) == [1, 4, 6, 8]
    assert trainer.args.packing == ("padded" not in job["trainer"])
    assert sum(setup.ANSWERS) / len(setup.ANSWERS) == pytest.approx(0.4 * max(setup.ANSWERS), rel=0.01)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_groups_have_one_prompt_each(tmp_path):
    setup, worker = script("bench_ppo_setup"), script("bench_ppo_worker")
    setup.save_models(setup.SHAPES["tiny"]["config"], tmp_path)
    job = setup.SHAPES["tiny"]["job"] | {"prompts": [6], "answers": [8, 1, 4, 6], "num_generations": 2}
    job |= {"trainer": "model", "updates": 1, "models": str(tmp_path), "output_dir": str(tmp_path / "out")}
    trainer = worker.build(job, worker.UpdateClock(steps_per_update=2))
    trainer.train()
    assert trainer.run_state.rollout.groups() == [[0, 1], [2, 3]]
    assert {setup.SHAPES[name]["job"]["num_generations"] for name in ("groups", "groups-varied")} == {8}


def test_failed_run_says_what_it_printed(tmp_path):
    bench, python = script("bench_ppo"), tmp_path / "python"
    python.write_text("#!/bin/sh\necho no GPU for $1 >&2\nexit 7\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"(?s)run of head ended with 7.*no GPU for .*bench_ppo_worker\.py"):
        bench.measure(str(python), _job("head"), tmp_path)


def test_clock_splits_an_update_into_its_phases(monkeypatch):
    """Two steps in an update: 1 s before, 2 s generating, 3 s scoring, 4 s and 5 s learning."""
    worker = script("bench_ppo_worker")
    now = 100.0

    def spend(seconds, result=None):
        nonlocal now
        now += seconds
        return result

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now)
    monkeypatch.setattr(worker.time, "process_time", lambda: 1.5 * now)
    clock = worker.UpdateClock(steps_per_update=2)
    generate, learn = clock.generating(spend), clock.learning(spend)
    clock.on_train_begin(None, None, None)
    for update in range(2):
        spend(1)
        assert generate(2, result="response") == "response"
        with torch.no_grad():
            learn(3)
        for step, seconds in enumerate((4, 5)):
            learn(seconds)
            clock.on_step_end(None, SimpleNamespace(global_step=2 * update + step + 1), None)
    assert clock.updates == [{"generate": 2, "learn": 9, "total": 15, "score": 4, "cpu": 22.5}] * 2


def _job(trainer):
    setup = script("bench_ppo_setup")
    return setup.SHAPES["tiny"]["job"] | {"trainer": trainer, "updates": 2}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["model", "head"])
def test_run_of_our_trainer_on_the_tiny_shape(tmp_path, monkeypatch, trainer):
    bench, setup, worker = script("bench_ppo"), script("bench_ppo_setup"), script("bench_ppo_worker")

    def run_here(command, **_):
        worker.main(json.loads(command[2]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    setup.save_models(setup.SHAPES["tiny"]["config"], tmp_path)
    measured = bench.measure(sys.executable, _job(trainer), tmp_path)
    assert len(measured["updates"]) == 2
    for update in measured["updates"]:
        assert min(update.values()) > 0
        assert update["generate"] + update["score"] + update["learn"] == pytest.approx(update["total"])
    assert measured["peak_gb"] > 0.1
