"""SIGTERM and SIGINT end a step, save and stop; the run that goes on from there is the run that never stopped."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import tiny
from dpo_runs import dpo_trainer, tiny_pairs
from ppo_runs import changed, ppo_config, ppo_trainer, snapshot
from trl_ext import PPOTrainerX, ReportCallback
from trl_ext.report import read_run
from trl_ext.runs import saving, signals
from trl_ext.runs.checkpoints import fault_of, numbered
from trl_ext.runs.saving import SavesWhole
from trl_ext.runs.signals import SignalWatch, StoppedBySignal


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Sends(TrainerCallback):
    """Sends this process a signal in a step, or in an evaluation, of so many optimizer steps before."""

    def __init__(self, step, number=signal.SIGTERM, event="on_step_begin"):
        def send(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, event, send)


def ppo(folder, **options):
    """Two rollouts of 4 prompts, each learned from in 4 steps."""
    torch.manual_seed(0)
    held_out = options.pop("models", {})
    options = {"num_mini_batches": 2, "max_steps": 8, "save_on_signal": True, "normalize_rewards": True} | options
    return ppo_trainer(folder, {"train_dataset": tiny.tiny_prompts(8)} | held_out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = ppo(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer.state.log_history, snapshot(trainer.model)


def stop(trainer, step, code=143):
    with pytest.raises(StoppedBySignal) as end:
        trainer.train()
    assert (end.value.code, end.value.step, trainer.state.global_step) == (code, step, step)
    return end.value


def without_times(log, after):
    times = ("time", "memory", "per_second", "runtime")
    return [
        {key: value for key, value in line.items() if not any(part in key for part in times)}
        for line in log
        if line["step"] > after and "loss" in line
    ]


# Where the signal comes -> the step that is saved.
PHASES = {
    "learning": 3,
    "generation": 4,
    "the reward": 4,
    "reading the values": 4,
    "the reward, whose server is away": 4,
}


@pytest.mark.parametrize("phase", PHASES)
def test_signal_ends_the_step_and_saves(whole, tmp_path, monkeypatch, phase):
    """While the first rollout is learned from, or in the second one, which the resumed run makes again."""
    trainer, own = ppo(tmp_path), signal.getsignal(signal.SIGTERM)

    def sending(method):
        def send(*args, **kwargs):
            if trainer.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                if phase.endswith("is away"):
                    raise ConnectionError
            return method(*args, **kwargs)

        return send

    if phase == "learning":
        trainer.add_callback(Sends(2))
    else:
        names = {"generation": "_generate_single_turn", "reading the values": "_score_with_models"}
        name = names.get(phase, "_calculate_rewards")
        monkeypatch.setattr(trainer, name, sending(getattr(trainer, name)))
    step = PHASES[phase]
    stopped = stop(trainer, step)
    assert stopped.checkpoint == tmp_path / f"checkpoint-{step}"
    assert numbered(tmp_path) == {f"checkpoint-{step}": step}
    assert fault_of(stopped.checkpoint) is None
    assert signal.getsignal(signal.SIGTERM) == own
    resumed = ppo(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    log, weights = whole
    assert without_times(resumed.state.log_history, step) == without_times(log, step)
    assert not changed(resumed.model, weights)


def test_control_without_the_state_at_the_steps_end_the_rollout_is_another(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(PPOTrainerX, "_back_to_step_end", lambda self: None)
    trainer = ppo(tmp_path)
    score = trainer._score_with_models

    def send(rollout):
        score(rollout)
        if trainer.state.global_step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "_score_with_models", send)
    stop(trainer, 4)
    resumed = ppo(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert changed(resumed.model, whole[1])


def test_signal_before_the_first_step_saves_nothing(tmp_path):
    trainer = ppo(tmp_path)
    trainer.add_callback(Sends(0))
    assert stop(trainer, 0).checkpoint is None
    assert numbered(tmp_path) == {}


def test_signal_in_the_rollout_after_resuming_needs_no_save(tmp_path):
    trainer = ppo(tmp_path / "first", save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()
    trainer = ppo(tmp_path / "second")
    trainer.add_callback(Sends(4))
    with pytest.raises(StoppedBySignal) as end:
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert end.value.checkpoint == tmp_path / "first" / "checkpoint-4"
    assert not numbered(tmp_path / "second")


class Counts(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_save(self, args, state, control, **kwargs):
        text = (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text()
        self.lines.append(["eval_loss" in line for line in json.loads(text)["log_history"]])


def dpo(folder, *callbacks, **options):
    torch.manual_seed(0)
    trainer = dpo_trainer(folder, max_steps=4, save_on_signal=True, report_to="none", **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "models": {"eval_dataset": tiny_pairs()}}


def test_evaluation_that_is_due_comes_between_two_saves(tmp_path):
    counts = Counts()
    stop(dpo(tmp_path, Sends(1, signal.SIGINT), counts, **EVALUATED), 2, code=130)
    assert counts.lines == [[False, False], [False, False, True]]


def test_signal_during_an_evaluation_saves_after_it(tmp_path):
    stop(dpo(tmp_path, Sends(2, event="on_prediction_step"), **EVALUATED), 2)
    assert fault_of(tmp_path / "checkpoint-2") is None


def test_evaluation_at_the_end_of_an_epoch_is_not_left_out(tmp_path):
    """The Trainer makes it after the step's end; without it the resumed run would choose among fewer checkpoints."""
    counts = Counts()
    held_out = {"train_dataset": tiny_pairs(8), "eval_dataset": tiny_pairs()}
    trainer = dpo(tmp_path, Sends(1), counts, eval_strategy="epoch", logging_steps=1, models=held_out)
    stop(trainer, 2)
    assert counts.lines == [[False, False], [False, False, True]]
    assert fault_of(tmp_path / "checkpoint-2") is None


def test_signal_at_the_last_step_lets_the_run_end_as_usual(tmp_path, caplog):
    dpo(tmp_path, Sends(3)).train()
    assert "The signal came at the last step: the run is done" in caplog.text
    assert not numbered(tmp_path)


def test_signal_to_another_rank_stops_this_one_too(tmp_path, monkeypatch):
    trainer = dpo(tmp_path)
    gather = trainer.accelerator.gather

    def of_two(tensor):
        asks = tensor.dtype == torch.int64 and tensor.shape == (1,)
        return torch.tensor([0, 15]) if asks else gather(tensor)

    monkeypatch.setattr(trainer.accelerator, "gather", of_two)
    stop(trainer, 1)


def test_report_says_where_the_run_was_stopped_until_it_goes_on(tmp_path, undrawn):
    stop(dpo(tmp_path, Sends(1), ReportCallback(seconds=0)), 2)
    run = read_run(tmp_path)
    assert (run.state, run.is_finished, run.step) == ("stopped at step 2", False, 2)
    resumed = dpo(tmp_path, ReportCallback(seconds=0))
    resumed.train(resume_from_checkpoint=True)
    assert read_run(tmp_path).state == "finished"


MUTANTS = {
    "no rank asks": (SavesWhole, "_signal", lambda self: 0),
    "nothing is saved": (SavesWhole, "_save_unless_saved", lambda self: None),
    "the handlers stay": (SignalWatch, "__exit__", lambda *_: None),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_option_saves_stops_and_puts_the_handlers_back(tmp_path, monkeypatch, mutant):
    own = {number: signal.getsignal(number) for number in signals.CAUGHT}
    if mutant is not None:
        monkeypatch.setattr(*MUTANTS[mutant])
    try:
        dpo(tmp_path, Sends(1)).train()
        code = None
    except StoppedBySignal as end:
        code = end.code
    put_back = {number: signal.getsignal(number) for number in own} == own
    for number, handler in own.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    is_right = (code, fault_of(tmp_path / "checkpoint-2"), put_back) == (143, None, True)
    assert is_right is (mutant is None)


# --- the handlers


class SignalsTheGroup(TrainerCallback):
    """Sends SIGTERM to this process and the workers of its data loader, as another program would."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            workers = multiprocessing.active_children()
            assert workers
            for process in (os.getpid(), *(worker.pid for worker in workers)):
                subprocess.run([sys.executable, "-S", "-c", f"import os; os.kill({process}, 15)"], check=True)
            time.sleep(0.2)


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "control: workers as torch starts them"])
def test_workers_of_the_data_loader_outlive_a_signal_to_the_group(tmp_path, monkeypatch, mistaken):
    if mistaken:
        monkeypatch.setattr(saving, "start_worker", lambda start, worker: start(worker))
    workers = {"dataloader_num_workers": 1, "models": {"train_dataset": tiny_pairs(64)}}
    trainer = dpo(tmp_path, SignalsTheGroup(), **workers)
    if mistaken:
        with pytest.raises(RuntimeError, match="killed by signal: Terminated"):
            trainer.train()
    else:
        stop(trainer, 2)
        assert fault_of(tmp_path / "checkpoint-2") is None


def wait_in_python():
    while True:
        time.sleep(0.01)


def wait_in_c():
    """One call, of half a minute, in which no handler in Python runs; as a collective whose partner is gone."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)


def watched(wait, begun):
    with SignalWatch(speaks=False):
        begun.set()
        wait()


@pytest.mark.parametrize("wait", [wait_in_python, wait_in_c])
def test_second_signal_ends_the_process_at_once_unless_it_is_the_first_one_passed_on(monkeypatch, wait):
    monkeypatch.setattr(signals, "AGAIN", 0.3)
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    run = fork.Process(target=watched, args=(wait, begun))
    run.start()
    assert begun.wait(5)
    time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(run.pid, number)
        time.sleep(0.02)
    assert run.is_alive()
    time.sleep(0.4)
    os.kill(run.pid, signal.SIGINT)
    run.join(3)
    ended = run.exitcode
    run.kill()
    assert ended == 130


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "control: it writes into the pipe"])
def test_signal_to_a_forked_process_does_not_count(monkeypatch, mistaken):
    monkeypatch.setattr(signals, "AGAIN", 0.0)
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with SignalWatch(speaks=False):
        if mistaken:
            monkeypatch.setattr(signals, "_pipes", set())
        child = os.fork()
        if child == 0:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(0.1)
    assert (ended != []) is mistaken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_forked_process_of_a_reward_function_can_be_ended(number):
    """It has inherited the handler; Ctrl-C, which all processes get, leaves it to its work."""
    with SignalWatch(speaks=False) as watch:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.5,))
        child.start()
        time.sleep(0.1)
        os.kill(child.pid, number)
        child.join(5)
    assert child.exitcode == (-number if number == signal.SIGTERM else 0)
    assert watch.received is None


@pytest.mark.parametrize("reader", ["lives", "has ended"])
def test_reader_that_the_same_signal_ends_does_not_end_the_run(monkeypatch, reader):
    """As of `trl-ext ppo ... 2>&1 | tee log`."""
    monkeypatch.setattr(signals.time, "sleep", lambda _: None)
    read, write = os.pipe()
    kept = os.dup(2)
    os.dup2(write, 2)
    os.close(write)
    try:
        if reader == "has ended":
            os.close(read)
        with SignalWatch(speaks=True):
            signal.raise_signal(signal.SIGINT)
        os.write(2, b"a line of the log\n")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    if reader == "lives":
        with open(read, "rb") as pipe:
            assert pipe.read() == (
                b"\nSIGINT: the run stops after this step and saves. Once more, after 2 seconds, ends it now.\n"
                b"a line of the log\n"
            )


def test_another_thread_gets_no_signals():
    said = []

    def enter():
        try:
            SignalWatch(speaks=False).__enter__()
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "`save_on_signal` needs the main thread" in said[0]


def test_without_the_option_the_handlers_are_left_alone(tmp_path):
    own, seen = signal.getsignal(signal.SIGTERM), []
    trainer = dpo(tmp_path)
    trainer.args.save_on_signal = False
    see = Sends(0)
    see.on_step_begin = lambda *args, **kwargs: seen.append(signal.getsignal(signal.SIGTERM))
    trainer.add_callback(see)
    trainer.train()
    assert set(seen) == {own}


def test_two_ways_to_wait_for_sigterm_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`save_on_signal` and `enable_jit_checkpoint` both wait for SIGTERM"):
        ppo_config(tmp_path, save_on_signal=True, enable_jit_checkpoint=True)
