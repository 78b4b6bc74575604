"""`Phases`: seconds and peak memory go to the phase in which they were spent, alone and in PPO and DPO runs."""

import mmap
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import tiny
from trl_ext.runs import profiler as module
from trl_ext.runs.profiler import GIB, STATUS, Phases


CPU = torch.device("cpu")
MIB = bytes(2**20)
MUCH = 200 * len(MIB)  # bytes, more than anything else here takes
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers, on the way through a run
on_linux = pytest.mark.skipif(not STATUS.exists(), reason="the system keeps no peak that can be reset")


def fill(*_, **__):
    """Takes 200 MiB and gives them back; pages of their own, as an allocator may have as much at hand already."""
    with mmap.mmap(-1, MUCH) as pages:
        for _ in range(MUCH // len(MIB)):
            pages.write(MIB)


def memory(measured, *names):
    return measured.pop_memory(lambda peaks: peaks, *names)


# --- alone


@on_linux
def test_peak_counts_for_the_phase_that_needed_it_and_not_for_the_next():
    measured = Phases(CPU)
    for name, work in (("before", lambda: None), ("full", fill), ("after", lambda: None)):
        with measured.during(name):
            work()
    peaks = memory(measured, "before", "full", "after", "never")
    assert list(peaks) == ["memory/before", "memory/full", "memory/after"]
    assert peaks["memory/full"] - peaks["memory/before"] == pytest.approx(MUCH / GIB, rel=0.1)
    assert peaks["memory/full"] - peaks["memory/after"] == pytest.approx(MUCH / GIB, rel=0.1)
    assert memory(measured, "full") == {}  # taken
    assert measured.highest / GIB == pytest.approx(peaks["memory/full"], abs=1e-3)


@on_linux
def test_peak_of_an_inner_phase_is_not_that_of_the_outer_one_and_the_largest_stay_counts():
    measured = Phases(CPU)
    for work in (fill, lambda: None):
        with measured.during("outer"), measured.during("inner"):
            work()
    peaks = memory(measured, "outer", "inner")
    assert peaks["memory/inner"] - peaks["memory/outer"] == pytest.approx(MUCH / GIB, rel=0.1)


@pytest.fixture
def spend(monkeypatch):
    """Lets seconds pass on the clock of the phases."""
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    return clock.append


def test_seconds_count_for_one_phase_at_a_time(spend):
    measured = Phases(CPU)
    spend(1000)
    with measured.during("score"):
        spend(1)
        with measured.during("generate"):
            spend(10)
        spend(2)
        with measured.during(None):
            spend(1000)
    measured.enter("learn")
    spend(5)
    measured.enter("learn")  # the next micro-batch
    spend(6)
    measured.on_optimizer_step(None, None, None)
    spend(1000)
    assert measured.pop_seconds() == {"score": [1, 2, 0], "generate": [10], "learn": [11]}
    assert measured.pop_seconds() == {}


def test_phase_that_an_error_left_open_does_not_go_on_in_the_next_run(spend):
    measured = Phases(CPU)
    measured.enter("learn")
    spend(1000)
    measured.on_train_begin(None, None, None)
    measured.enter("learn")
    spend(3)
    measured.on_optimizer_step(None, None, None)
    assert measured.pop_seconds() == {"learn": [3]}


def test_memory_is_the_largest_of_all_ranks(monkeypatch):
    peaks = iter([0, 3 * GIB, 0, 5 * GIB])
    monkeypatch.setattr(module, "take_peak", lambda device: next(peaks))
    measured = Phases(CPU)
    for name in ("generate", "learn"):
        with measured.during(name):
            pass
    others = torch.tensor([[7.0, 2.0]])
    largest = measured.pop_memory(lambda own: torch.cat([own, others]), "generate", "learn")
    assert largest == {"memory/generate": 7.0, "memory/learn": 5.0}


def test_system_without_a_peak_to_reset_has_seconds_and_no_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CLEAR", tmp_path / "no" / "such" / "file")
    for measured in (Phases(CPU), Phases(torch.device("meta")), Phases(CPU, counts_memory=False)):
        with measured.during("learn"):
            pass
        assert memory(measured, "learn") == {}
        assert list(measured.pop_seconds()) == ["learn"]
        assert measured.highest == 0


def test_gpu_is_waited_for_and_its_counter_reset_when_a_phase_changes_only(monkeypatch):
    calls = []
    for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", GIB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: calls.append(name) or answer)
    measured = Phases(torch.device("cuda", 0))
    for _ in range(8):  # micro-batches
        measured.enter("learn")
    measured.on_optimizer_step(None, None, None)
    assert calls == ["synchronize", "max_memory_allocated", "reset_peak_memory_stats"] * 2
    measured.device = CPU  # where the test can put a tensor
    assert memory(measured, "learn") == {"memory/learn": 1.0}


@pytest.mark.gpu
def test_peak_on_a_gpu_is_what_was_allocated():
    measured = Phases(torch.device("cuda", 0))
    held = torch.ones(MUCH, dtype=torch.int8, device="cuda")
    with measured.during("full"):
        torch.ones(MUCH, dtype=torch.int8, device="cuda")
    with measured.during("after"):
        pass
    peaks = memory(measured, "full", "after")
    assert peaks["memory/full"] - peaks["memory/after"] == pytest.approx(MUCH / GIB)
    assert peaks["memory/after"] >= held.numel() / GIB


# --- in a run


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


class Slow(TrainerCallback):
    """Takes a tenth of a second with every optimizer step, and a second and a half after the second."""

    def on_pre_optimizer_step(self, *args, **kwargs):
        time.sleep(0.1)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            time.sleep(1.5)


@pytest.mark.integration
@on_linux
def test_memory_of_a_reward_function_is_that_of_scoring(tmp_path):
    def hungry(completions, **kwargs):
        fill()
        return [0.0] * len(completions)

    held_out = {"eval_dataset": tiny.tiny_prompts(2, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    models = {"reward_model": None, "reward_funcs": hungry, "eval_dataset": held_out.pop("eval_dataset")}
    trainer = ppo_runs.ppo_run(tmp_path, models, per_device_eval_batch_size=2, **held_out)
    for scored, generated in zip(logged(trainer, "memory/score"), logged(trainer, "memory/generate"), strict=True):
        assert scored - generated > 0.8 * MUCH / GIB
    assert len(logged(trainer, "memory/learn")) == 4  # every line: it learns between any two
    assert min(logged(trainer, "memory/score")) - max(logged(trainer, "memory/learn")) > 0.8 * MUCH / GIB
    assert min(logged(trainer, "memory/evaluate")) - max(logged(trainer, "memory/learn")) > 0.8 * MUCH / GIB


@pytest.mark.integration
@on_linux
def test_memory_of_the_precomputed_reference_and_of_evaluating_is_not_that_of_learning(tmp_path):
    model, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    reference.register_forward_pre_hook(fill)
    model.register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else fill())
    models = {"model": model, "ref_model": reference, "eval_dataset": dpo_runs.tiny_pairs(4, seed=3)}
    options = {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = dpo_runs.dpo_run(tmp_path, models, **options)
    learn = max(logged(trainer, "memory/learn"))
    assert len(logged(trainer, "memory/learn")) == 2
    assert len(logged(trainer, "memory/reference")) == len(logged(trainer, "time/reference")) == 1
    assert logged(trainer, "memory/reference")[0] - learn > 0.8 * MUCH / GIB
    assert min(logged(trainer, "memory/evaluate")) - learn > 0.8 * MUCH / GIB
    assert trainer.phases.highest / GIB > learn + 0.8 * MUCH / GIB


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_learning_ends_when_the_optimizer_has_stepped(tmp_path, kind):
    models = {"callbacks": [Slow()]}
    if kind == "dpo":
        trainer = dpo_runs.dpo_run(tmp_path, models, max_steps=3)
    else:
        trainer = ppo_runs.ppo_run(tmp_path, models, num_ppo_epochs=1, total_episodes=16)
    learning = logged(trainer, "time/learn")[1:]  # the first step warms up
    assert len(learning) == 2
    assert all(0.1 < seconds < 1.5 for seconds in learning)


@pytest.mark.integration
def test_speed_of_dpo_is_the_tokens_of_both_sequences_by_the_seconds_of_learning(tmp_path):
    trainer = dpo_runs.dpo_run(tmp_path, logging_steps=2, max_steps=4)  # every line is of one pass over all pairs
    rows = trainer.train_dataset
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    rates, seconds = logged(trainer, "tokens_per_second"), logged(trainer, "time/learn")
    assert [rate * 2 * step for rate, step in zip(rates, seconds, strict=True)] == pytest.approx([tokens, tokens])
    assert 2 * sum(seconds) < logged(trainer, "train_runtime")[0]


@pytest.mark.integration
def test_counters_are_left_to_transformers_tracker(tmp_path):
    for trainer in (
        dpo_runs.dpo_run(tmp_path, skip_memory_metrics=False, max_steps=1),
        ppo_runs.ppo_run(tmp_path, skip_memory_metrics=False, max_steps=1),
    ):
        keys = {key for line in trainer.state.log_history for key in line}
        assert not [key for key in keys if key.startswith("memory/")]
        assert keys & {"time/learn", "time/generate"}
