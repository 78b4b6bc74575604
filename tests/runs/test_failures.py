"""What ends a run from outside says what failed, what is saved, and what to do."""

import contextlib
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

import tiny
from dpo_runs import dpo_trainer, tiny_pairs
from ppo_runs import ppo_trainer
from reward_runs import reward_trainer
from trl_ext.runs import checkpoints, failures, saving
from trl_ext.runs.checkpoints import MANIFEST, SAVING, checkpoint_of, fault_of, numbered
from trl_ext.runs.failures import RunError, about_the_disk, is_of_the_disk, is_out_of_memory


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


class At(TrainerCallback):
    """Does something at the beginning of a step, the second one unless told otherwise."""

    def __init__(self, does, step=1):
        self.does, self.step = does, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.does()


@contextlib.contextmanager
def files_of_at_most(size):
    """Within the context, the kernel refuses to write beyond `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- the disk


@pytest.mark.parametrize("cut", ["model.safetensors", "optimizer.pt"])
def test_checkpoint_that_could_not_be_written_leaves_the_last_one_to_go_on_from(tmp_path, cut):
    """By safetensors' writer and by torch's, each at a limit that the kernel sets."""
    whole = dpo_trainer(tmp_path / "whole", max_steps=3, optim="adamw_torch")
    whole.train()
    output, limit = tmp_path / "run", contextlib.ExitStack()
    trainer = dpo_trainer(output, max_steps=3, optim="adamw_torch", **EVERY_STEP)

    def fill():
        limit.enter_context(files_of_at_most((output / "checkpoint-1" / cut).stat().st_size - 1))

    trainer.add_callback(At(fill))
    with limit, pytest.raises(RunError) as failed:
        trainer.train()
    assert str(failed.value).startswith("checkpoint-2 was not saved: ")
    if cut != "optimizer.pt":  # whose writer keeps the number to itself
        assert "File too large" in str(failed.value)
        assert "raise the limit (`ulimit -f`), or give another `output_dir`" in str(failed.value)
    (note,) = failed.value.__notes__
    assert note == (
        f"checkpoint-1 is complete: `resume_from_checkpoint={str(output / 'checkpoint-1')!r}` goes on from there."
    )
    assert set(numbered(output)) == {"checkpoint-1"}
    assert not (output / SAVING).exists()
    again = dpo_trainer(output, max_steps=3, optim="adamw_torch", **EVERY_STEP)
    again.train(resume_from_checkpoint=True)
    assert all(
        torch.equal(weight, whole.model.state_dict()[name]) for name, weight in again.model.state_dict().items()
    )


def test_folder_that_is_gone_is_named_or_made_again(tmp_path, caplog):
    output = tmp_path / "run"
    trainer = dpo_trainer(output, **EVERY_STEP)
    trainer.add_callback(At(lambda: shutil.rmtree(output)))
    trainer.train()
    assert f"The folder {output} is gone, with all that was in it; checkpoint-2 is saved into a new one" in caplog.text
    assert fault_of(output / "checkpoint-2") is None

    def replace():
        shutil.rmtree(output)
        output.write_text("a file")

    trainer = dpo_trainer(output, **EVERY_STEP)
    trainer.add_callback(At(replace))
    with pytest.raises(RunError, match=rf"checkpoint-2 was not saved: .*See that {output} is there") as failed:
        trainer.train()
    assert failed.value.__notes__ == ["No checkpoint of this run is saved: it has to start again."]


def test_model_that_could_not_be_saved_at_the_end_says_so(tmp_path):
    trainer = dpo_trainer(tmp_path / "run", max_steps=1, **EVERY_STEP)
    trainer.train()
    size = (tmp_path / "run" / "checkpoint-1" / "model.safetensors").stat().st_size
    with (
        files_of_at_most(size - 1),
        pytest.raises(RunError, match=r"The model was not saved: .*File too large") as failed,
    ):
        trainer.save_model()
    assert failed.value.__notes__[0].startswith("checkpoint-1 is complete, and has the model after the last step")


@pytest.mark.parametrize(
    "error, cure",
    {
        OSError(28, "No space left on device"): "GiB free: free some",
        OSError(122, "Disk quota exceeded"): "GiB free: free some",
        OSError(30, "Read-only file system"): "is not mounted read-only",
        OSError(13, "Permission denied", "/out/x"): "this user may write to",
        OSError(116, "Stale file handle"): "a disk that is no longer mounted",
        OSError(5, "Input/output error"): "can be written (",
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"): "GiB free: free some",
        RuntimeError("[enforce fail at x] PytorchStreamWriter failed writing file data/0"): "can be written (",
        RuntimeError("Parent directory /out/_saving/checkpoint-2 does not exist."): "a disk that is no longer mounted",
        # of a disk without a byte left
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"): "can be written (",
    }.items(),
)
def test_each_cause_has_its_cure(tmp_path, error, cure):
    assert is_of_the_disk(error)
    assert cure in about_the_disk(error, tmp_path, needed=0)
    assert "GiB free, of about" in about_the_disk(error, tmp_path, needed=2**60) or "not mounted" not in cure


def test_other_errors_keep_their_words_and_say_what_is_saved(tmp_path):
    def fail():
        raise KeyError("mine")

    trainer = dpo_trainer(tmp_path, **EVERY_STEP)
    trainer.add_callback(At(fail))
    with pytest.raises(KeyError, match="mine") as failed:
        trainer.train()
    assert failed.value.__notes__[0].startswith("checkpoint-1 is complete")


def test_model_that_does_not_fit_on_the_disk_says_how_much_it_needs(tmp_path, monkeypatch):
    trainer = dpo_trainer(tmp_path, save_strategy="no")
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    monkeypatch.setattr(saving, "_expected_size", lambda *_, only_model: 2**33 if only_model else 2**35)
    with pytest.raises(RunError, match=r"The model .* has 1\.00 GiB free, of about 8\.00 that are needed: free some"):
        with trainer._writing("The model", tmp_path):
            raise OSError(28, "No space left on device")


# --- folders that cannot be renamed


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another file system, to which the kernel renames nothing."""
    place = Path("/dev/shm") / f"trl_ext_{os.getpid()}_{tmp_path.name}"
    try:
        place.mkdir()
    except OSError:
        pytest.skip("there is no /dev/shm")
    if place.stat().st_dev == tmp_path.stat().st_dev:
        place.rmdir()
        pytest.skip("/dev/shm is on the file system of the tests")
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "mutant: in the order of their names"])
def test_checkpoint_is_copied_where_folders_cannot_be_renamed(tmp_path, elsewhere, monkeypatch, mistaken):
    """Killed between any two files, a half copy is taken for no checkpoint, and the one that it replaces is back."""
    run, seen = tmp_path / "run", []
    run.mkdir()
    (run / SAVING).symlink_to(elsewhere)
    with pytest.raises(OSError, match="cross-device"):
        elsewhere.rename(run / "x")

    def write(text):
        staged = run / SAVING / "checkpoint-2"
        checkpoints.begin(staged)
        for name in ("a.txt", "z.txt"):
            (staged / name).write_text(text)
        (staged / "trainer_state.json").write_text("{}")
        checkpoints.complete(staged, "small")

    def look(path):
        if path.is_file() and path.parent.parent == run:
            copy = shutil.copytree(run, tmp_path / "copies" / str(len(seen)), symlinks=True)
            seen.append("nothing")
            with contextlib.suppress(ValueError):
                seen[-1] = (checkpoint_of(True, copy) / "z.txt").read_text()

    def copy_by_name(checkpoint, place):
        place.mkdir()
        for path in checkpoints._files(checkpoint):
            shutil.copyfile(path, place / path.name)
            checkpoints._sync(place / path.name)

    sync = checkpoints._sync
    write("old")
    monkeypatch.setattr(checkpoints, "_sync", lambda path: (sync(path), look(path)))
    if mistaken:
        monkeypatch.setattr(checkpoints, "_copy", copy_by_name)
    write("new")
    assert (run / "checkpoint-2" / "z.txt").read_text() == "new"
    assert (run / "checkpoint-2" / MANIFEST).is_file()
    assert seen == ["old", "old", "nothing" if mistaken else "old", "new"]


def test_old_checkpoints_are_deleted_where_folders_cannot_be_renamed(tmp_path, elsewhere):
    run = tmp_path / "run"
    run.mkdir()
    (run / SAVING).symlink_to(elsewhere)
    dpo_trainer(run, save_total_limit=1, max_steps=2, **EVERY_STEP).train()
    assert set(numbered(run)) == {"checkpoint-2"}
    assert fault_of(run / "checkpoint-2") is None


# --- memory


def out_of_memory_at(model, phase, trainer):
    """Lets the allocator refuse what a forward pass of `model` asks for, in one phase."""

    def ask(*_):
        if trainer.phases.failed_in == phase:
            torch.empty(2**50)

    model.register_forward_pre_hook(ask)


@pytest.mark.parametrize(
    "phase, words, options",
    [
        (
            "generate",
            "while it generated, at step 1",
            "`response_length`; let vLLM .*in a new run, lower `gradient_acc",
        ),
        ("score", "while it scored a rollout, at step 1", "lower `score_batch_tokens`, 32, .*`offload_frozen_models"),
        ("learn", "while it learned, at step 0", "lower `micro_batch_tokens`, 24, the tokens of a pass"),
        ("evaluate", "during an evaluation, at step 1", "lower `per_device_eval_batch_size`; lower `score_batch_tok"),
    ],
)
def test_phase_that_is_out_of_memory_is_named_with_what_lowers_it(tmp_path, phase, words, options):
    budgets = {"micro_batch_tokens": 24, "score_batch_tokens": 32, "num_ppo_epochs": 1}
    trainer = ppo_trainer(
        tmp_path,
        {"eval_dataset": tiny.tiny_prompts(2, seed=3)},
        eval_strategy="steps",
        eval_steps=1,
        **EVERY_STEP,
        **budgets,
    )
    begins = lambda: out_of_memory_at(trainer.accelerator.unwrap_model(trainer.model), phase, trainer)  # noqa: E731
    trainer.add_callback(At(begins, step=0 if phase in ("learn", "evaluate") else 1))
    with pytest.raises(RunError, match=f"out of memory {words}: .*can't allocate memory.*{options}") as failed:
        trainer.train()
    assert is_out_of_memory(failed.value.__cause__)
    said = "checkpoint-1 is complete" if "step 1" in words and phase != "evaluate" else "No checkpoint of this run"
    assert failed.value.__notes__[0].startswith(said)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_pairs_that_need_too_much_memory_name_the_batch(tmp_path, name):
    def ask(*_):
        torch.empty(2**50)

    trainer = dpo_trainer(tmp_path) if name == "dpo" else reward_trainer(tmp_path, tiny_pairs(8), None)
    trainer.model.register_forward_pre_hook(ask)
    with pytest.raises(
        RunError, match=r"while it learned, at step 0: .*halve `per_device_train_batch_size` and double"
    ):
        trainer.train()


def test_what_another_program_says_of_its_memory_is_not_the_runs():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RunError("The reward function 'judge' has failed, with HTTP 500: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


# --- what no run ends for


def test_completions_that_cannot_be_written_end_no_run(tmp_path, caplog):
    trainer = ppo_trainer(tmp_path, log_completions=True, max_steps=1)
    (tmp_path / "completions").rmdir()
    (tmp_path / "completions").write_text("a file in the folder's place")
    trainer.train()
    assert "completions_00001.parquet was not written, and training goes on: " in caplog.text


# --- other numbers of processes


def test_number_of_processes_is_checked_before_a_run_goes_on(tmp_path, monkeypatch, caplog):
    saved = ppo_trainer(tmp_path / "ppo", max_steps=1, **EVERY_STEP)
    saved.train()
    monkeypatch.setattr(checkpoints, "_manifest", lambda _: {"processes": 2, "rows_per_step": 8})
    again = ppo_trainer(tmp_path / "ppo", max_steps=2)
    with pytest.raises(ValueError, match=r"saved by a run of 2 processes, and this one has 1\. PPO keeps rollout and"):
        again.train(resume_from_checkpoint=True)
    monkeypatch.undo()

    dpo_trainer(tmp_path / "dpo", max_steps=1, **EVERY_STEP).train()
    monkeypatch.setattr(checkpoints, "_manifest", lambda _: {"processes": 2, "rows_per_step": 8})
    with pytest.raises(ValueError, match=r"An optimizer step had 8 rows and would have 4, so that .* processes at 8"):
        dpo_trainer(tmp_path / "dpo").train(resume_from_checkpoint=True)
    dpo_trainer(tmp_path / "dpo", gradient_accumulation_steps=2).train(resume_from_checkpoint=True)
    assert "was saved by 2 processes, and this run has 1, with as many rows in an optimizer step" in caplog.text
