"""`benchmarks/bench_ppo.py`: the arithmetic of its table, what a run takes part in, and one run on a tiny model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from commands import script
from trl_ext import PPOConfigX


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
    fast[0]["updates"][1]["learn"] = 2.0
    lines = bench.table({bench.BASELINE: slow, "head": fast}, {bench.BASELINE: 7.5, "head": 6.0}).splitlines()
    assert lines[2:] == [
        "| TRL 1.12 `PPOTrainer` | 15.0 | 7.5 | 7.5 | 30.0 | 60.0 | 7.5 | 25% | 8.0 | 1.00 (1.00) | 1.00 | 1.00 |",
        '| `critic="head"` | 6.0 | 3.0 | 2.0 | 12.0 | 15.0 | 6.0 | 50% | 6.0 | 2.50 (4.00) | 3.00 | 0.75 |',
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_floor_counts_the_operations_of_the_matrices_that_run():
    """Of actor and critic on the prompt and two answers in one row, counted by torch; attention by hand."""
    setup = script("bench_ppo_setup")
    config = setup.TINY | {"num_key_value_heads": 1, "use_cache": False}
    shape = setup.shape([], config, 2, [6], 4, [4, 3], batch=2, num_generations=2)
    prompt, answers = 6, [4, 3]
    assert setup.lengths(shape["job"]) == [(prompt, answers)]
    row = torch.zeros(1, prompt + sum(answers), dtype=torch.long)

    def linear_flops(model):
        total = 0

        def count(module, given, output):
            nonlocal total
            total += 2 * given[0].numel() * module.out_features

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(count)
        model(row)
        return total

    trunk = linear_flops(setup.random_model(config).model)
    # A token sees half of its own piece on average, and all of the prompt before it: scores and values of 2 layers
    trunk += 2 * 2 * 2 * 32 * (6 * 3 + 4 * (6 + 2) + 3 * (6 + 1.5))
    head = 2 * 32 * 256 * sum(answers)
    forward = {"generate": trunk + head, "reference": trunk + head, "reward": trunk, "critic": trunk}
    learn = 2 * 3 * (trunk + head)
    assert setup.update_flops(shape["job"], "head") == pytest.approx(sum(forward.values()) + learn)
    assert setup.update_flops(shape["job"], "model") == pytest.approx(sum(forward.values()) + learn + 2 * 3 * trunk)


def test_trainers_take_turns_and_every_run_is_kept(monkeypatch, tmp_path, capsys):
    bench = script("bench_ppo")
    seen = []

    def measure(python, job, folder):
        seen.append((python, job["trainer"], job["batch"], job["updates"]))
        return run(9, 2, peak=1.0)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "matrix_rate", lambda config, device, dtype: 1e9)
    monkeypatch.setattr(bench, "python_of", lambda trainer, folder: f"python of {trainer}")
    output = tmp_path / "bench.json"
    argv = ["bench_ppo.py", "--shapes", "tiny", "--runs", "2", "--updates", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*argv, "--trainers", "trl-1.12", "torchtune-0.6.1", "head"])
    bench.main()
    trainers = ("trl-1.12", "torchtune-0.6.1", "head")
    assert seen == [(f"python of {trainer}", trainer, 4, 2) for trainer in trainers] * 2
    assert {trainer: len(runs) for trainer, runs in json.loads(output.read_text())["tiny"].items()} == dict.fromkeys(
        trainers, 2
    )
    assert "| 1.0 | 1.00 (1.00) | 1.00 | 1.00 |" in capsys.readouterr().out


def test_environment_is_made_once_with_all_but_trl_as_pinned(monkeypatch, tmp_path):
    setup = script("bench_ppo_setup")
    calls = []

    def run_nothing(command, check):
        calls.append(command)
        (tmp_path / "bench-trl-1.12").mkdir(exist_ok=True)

    monkeypatch.setattr(setup.subprocess, "run", run_nothing)
    assert setup.python_of("head", tmp_path) == sys.executable
    for _ in range(2):
        assert setup.python_of("trl-1.12", tmp_path) == str(tmp_path / "bench-trl-1.12" / "bin" / "python")
    assert len(calls) == 2
    assert "trl==1.12.0" in calls[1]
    pins = (tmp_path / "bench-trl-1.12" / "constraints.txt").read_text()
    assert "torch==" in pins
    assert "\ntrl==" not in pins


@pytest.mark.parametrize(
    ("trainer", "n"), [("model-padded", 1), ("head-budget", 2), ("model-scored", 2), ("model-unshared", 2)]
)
def test_answers_are_those_of_the_list_whichever_rows_are_left(tmp_path, monkeypatch, trainer, n):
    """On the tiny model, in the second update; packed or not, with one or two answers to a prompt."""
    setup, worker = script("bench_ppo_setup"), script("bench_ppo_worker")
    monkeypatch.setattr(worker, "BUDGET", 20)
    monkeypatch.setattr(PPOConfigX, "shares_prompts", PPOConfigX.shares_prompts)  # taken back
    job = setup.shape([], setup.TINY, 1, [9, 3, 5, 2], 8, [8, 1, 4, 6], batch=4, num_generations=n)["job"]
    job |= {"trainer": trainer, "updates": 2, "device": "cpu", "output_dir": str(tmp_path)}
    built = worker.build(job, worker.UpdateClock(steps_per_update=1))
    built.train()
    rollout, listed = built.run_state.rollout, setup.listed_answers(job, 1)
    assert rollout.attended.sum(1).tolist() == [8, 6, 4, 1]
    assert torch.equal(rollout.response_ids[rollout.attended], listed[rollout.attended])
    assert rollout.has_eos.tolist() == [False, True, True, True]
    assert rollout.prompt_mask.sum(1).tolist() == ([9, 3, 5, 2] if n == 1 else [5, 5, 2, 2])
    assert built.args.packing == ("padded" not in trainer)
    assert built._packings[0].shares == (trainer in ("head-budget", "model-scored"))
    assert built.args.score_batch_tokens == (20 if trainer == "model-scored" else None)
    assert len(built.run_state.micro_batches[0]) == (2 if trainer == "head-budget" else 1)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_shape_of_the_gpu_runs_small_on_a_cpu(tmp_path, monkeypatch):
    """LoRA, answers that are given, and attention without FlexAttention."""
    setup, worker = script("bench_ppo_setup"), script("bench_ppo_worker")
    monkeypatch.setattr("trl_ext.packing.flex.why_not", None)  # taken back
    job = setup.SHAPES["tiny-lora"]["job"] | {"trainer": "head-pieces", "updates": 1, "device": "cpu"}
    built = worker.build(job | {"output_dir": str(tmp_path)}, worker.UpdateClock(steps_per_update=2))
    built.train()
    assert built.run_state.rollout.attended.sum(1).tolist() == [8, 4, 8, 4]
    assert built.model.peft_config["default"].r == 4


def test_runs_that_cannot_be_or_would_end_too_late_are_left_out(monkeypatch, tmp_path, capsys):
    bench = script("bench_ppo")
    clock = iter(range(0, 10_000, 100))  # a run takes 100 s
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bench, "matrix_rate", lambda config, device, dtype: 1e15)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)

    def measure(python, job, folder):
        if job["trainer"] == "model-padded":
            raise RuntimeError("out of memory")
        return run(9, 2, peak=1.0)

    monkeypatch.setattr(bench, "measure", measure)
    argv = ["bench_ppo.py", "--device", "cuda", "--shapes", "0.5b", "--runs", "1", "--minutes", "8"]
    monkeypatch.setattr(sys, "argv", [*argv, "--environments", str(tmp_path)])
    bench.main()
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert "0.5b model-pieces: 9.0, 2.0 s" in printed
    assert "0.5b head: left out" in printed
    assert "flash" not in printed
    assert bench.LABELS[bench.BASELINE] not in printed


def test_tail_has_its_mean_and_groups_have_one_prompt_each():
    setup = script("bench_ppo_setup")
    assert sum(setup.tail(128)) / 16 == pytest.approx(0.4 * 128, rel=0.01)
    assert (min(setup.PROMPTS), max(setup.PROMPTS)) == (32, 256)
    for name in ("groups", "groups-varied"):
        assert [(prompt, len(of)) for prompt, of in setup.lengths(setup.SHAPES[name]["job"])] == [(256, 8)] * 2


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
    return setup.SHAPES["tiny"]["job"] | {"trainer": trainer, "updates": 2, "device": "cpu"}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["model", "head"])
def test_run_of_our_trainer_on_the_tiny_shape(tmp_path, monkeypatch, trainer):
    bench, worker = script("bench_ppo"), script("bench_ppo_worker")

    def run_here(command, **_):
        worker.main(json.loads(command[2]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    measured = bench.measure(sys.executable, _job(trainer), tmp_path)
    assert len(measured["updates"]) == 2
    for update in measured["updates"]:
        assert min(update.values()) > 0
        assert update["generate"] + update["score"] + update["learn"] == pytest.approx(update["total"])
    assert measured["peak_gb"] > 0.1
