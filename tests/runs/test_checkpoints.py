"""A checkpoint is complete or absent, whenever a run is killed; nothing broken is used, nothing complete is lost."""

import contextlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import tiny
from dpo_runs import dpo_run, dpo_trainer, tiny_pairs
from ppo_runs import ppo_run, run_to_best_checkpoint
from reward_runs import reward_trainer
from trl_ext import RewardConfigX, RewardTrainerX
from trl_ext.runs import checkpoints, saving
from trl_ext.runs.checkpoints import MANIFEST, begin, checkpoint_of, complete, fault_of, numbered, rotate
from trl_ext.runs.failures import RunError


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
_watchers = []


def _audit(event, arguments):
    for watcher in _watchers:
        watcher(event, arguments)


@contextlib.contextmanager
def copies_between_writes(folder, into):
    """Copies a folder before each write in it, as a kill at that moment would leave it; yields the list of copies."""
    copies = []

    def watcher(event, arguments):
        writes = event in WRITES or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if not writes or not place_of(event, arguments).startswith(str(folder)):
            return
        _watchers.remove(watcher)  # copying writes, too
        copies.append(shutil.copytree(folder, into / f"{len(copies)}"))
        _watchers.append(watcher)

    if not _watchers:
        sys.addaudithook(_audit)
    _watchers.append(watcher)
    try:
        yield copies
    finally:
        _watchers.remove(watcher)


def place_of(event, arguments):
    if (
        event in ("os.remove", "os.rmdir") and arguments[1] >= 0
    ):  # `shutil.rmtree` names files by their folder's number
        return os.readlink(f"/proc/self/fd/{arguments[1]}")
    return str(arguments[0])


def write(run, step, text):
    """A checkpoint of two files, as a trainer writes it."""
    staged = run / checkpoints.SAVING / f"checkpoint-{step}"
    begin(staged)
    (staged / "weights.txt").write_text(text)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
    return complete(staged, "small")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of PPO with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    ppo_run(folder, save_strategy="steps", save_steps=1, max_steps=2)
    return folder


# --- kills


def test_kill_between_two_writes_leaves_the_last_complete_checkpoint(tmp_path):
    """One old checkpoint at most is kept."""
    output, seen = tmp_path / "run", []
    output.mkdir()
    with copies_between_writes(output, tmp_path / "copies") as copies:
        ppo_run(output, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    assert set(numbered(output)) == {"checkpoint-3"}
    assert not list(output.glob("_*"))
    for copy in copies:
        complete_ones = [name for name in numbered(copy) if fault_of(copy / name) is None]
        assert len(complete_ones) == len(numbered(copy))  # none is there that is not complete
        if complete_ones or seen:
            seen.append(numbered(copy)[checkpoint_of(True, copy).name])
    assert seen == sorted(seen)
    assert set(seen) == {1, 2, 3}
    assert len(seen) > 60


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "control: nothing is put back"])
def test_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, mistaken):
    """By a run in the same folder, or by one that was resumed from an earlier step."""
    output = tmp_path / "run"
    write(output, 2, "old")
    if mistaken:
        monkeypatch.setattr(checkpoints, "put_back", lambda _: None)
    with copies_between_writes(output, tmp_path / "copies") as copies:
        write(output, 2, "new")
    texts = []
    for copy in copies:
        with contextlib.suppress(ValueError):
            texts.append((checkpoint_of("True", copy) / "weights.txt").read_text())
    assert (len(texts) == len(copies) and texts == sorted(texts, reverse=True)) is not mistaken
    assert (output / "checkpoint-2" / "weights.txt").read_text() == "new"


def test_checkpoint_that_was_moved_aside_is_found_by_its_name(tmp_path):
    checkpoint = write(tmp_path, 2, "old")
    aside = tmp_path / checkpoints.REPLACED
    aside.mkdir()
    checkpoint.rename(aside / checkpoint.name)
    assert checkpoint_of(str(checkpoint), tmp_path) == checkpoint
    assert (checkpoint / "weights.txt").read_text() == "old"


# --- what is broken


BREAKS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": Path.unlink,
    "altered": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_each_broken_file_is_named_and_the_checkpoint_passed_over(run, tmp_path, how):
    whole = run / "checkpoint-2"
    files = [path.relative_to(whole) for path in whole.glob("**/*") if path.is_file()]
    assert {"ppo_state.pt", "optimizer.pt", "config.json", "critic/config.json"} <= {path.as_posix() for path in files}
    for i, file in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(run, copy)
        BREAKS[how](copy / "checkpoint-2" / file)
        if file.name == MANIFEST and how == "missing":  # as one of an earlier version
            assert checkpoint_of(True, copy).name == "checkpoint-2"
            continue
        assert checkpoint_of(True, copy).name == "checkpoint-1"
        with pytest.raises(ValueError, match=rf"checkpoint-2', and it.* {file}.*\. Beside it is") as refused:
            checkpoint_of(str(copy / "checkpoint-2"), copy)
        assert "\n" not in str(refused.value)
        shutil.rmtree(copy)


@contextlib.contextmanager
def as_another_user():
    """Within the context, files that their owner alone may read are refused: root may read any."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize("what", [".", "weights.txt"])
def test_checkpoint_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch, caplog, what):
    monkeypatch.chdir(tmp_path)  # below folders that another user may not enter
    for step in (1, 2):
        write(Path("run"), step, "")
    for path in (Path("."), *Path("run").glob("**/*")):
        path.chmod(0o755)
    (Path("run/checkpoint-2") / what).chmod(0)
    with as_another_user():
        assert checkpoint_of(True, "run").name == "checkpoint-1"
        name = "trainer_state.json" if what == "." else what
        with pytest.raises(ValueError, match=rf"checkpoint-2', and its {name} cannot be read \(PermissionError\)"):
            checkpoint_of("run/checkpoint-2", "run")
    (Path("run/checkpoint-2") / what).chmod(0o755)


def test_manifest_that_lists_nothing_makes_nothing_complete(tmp_path):
    checkpoint = write(tmp_path, 1, "")
    (checkpoint / MANIFEST).write_text('{"version": 1, "files": {}}')
    assert fault_of(checkpoint) == f"its {MANIFEST} does not list trainer_state.json"


def test_no_checkpoint_is_asked_for_by_false(tmp_path):
    assert [checkpoint_of(given, tmp_path) for given in (None, False, "False", "false", "")] == [None] * 5


def test_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    """Before, a reward model went on from DPO's policy with a head of random numbers."""
    saves = {"save_strategy": "steps", "save_steps": 1}
    dpo_run(tmp_path / "dpo", max_steps=1, **saves)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    dpo_run(tmp_path / "lora", models={"peft_config": adapter}, max_steps=1, **saves)
    whole, lora = (str(tmp_path / name / "checkpoint-1") for name in ("dpo", "lora"))

    def said(trainer, checkpoint):
        with pytest.raises(ValueError, match="checkpoint-1") as refused:
            trainer.train(resume_from_checkpoint=checkpoint)
        return str(refused.value)

    args = RewardConfigX(str(tmp_path / "reward"), use_cpu=True, bf16=False, report_to="none")
    reward = RewardTrainerX(
        tiny.tiny_reward_model(), args, train_dataset=tiny_pairs(), processing_class=tiny.tiny_tokenizer()
    )
    assert "was saved by DPO, and this run is reward training. Give" in said(reward, whole)
    assert "trains the whole model, and" in said(dpo_trainer(tmp_path / "1"), lora)
    assert "trains an adapter, and" in said(dpo_trainer(tmp_path / "2", models={"peft_config": adapter}), whole)
    other = dpo_trainer(
        tmp_path / "3", models={"peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])}
    )
    assert "checkpoint-1 has lora_alpha=8; that of this run has lora_alpha=4. Resume" in said(other, lora)


def test_control_unchecked_the_broken_one_is_taken(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    BREAKS["cut"](tmp_path / "run" / "checkpoint-2" / "optimizer.pt")
    monkeypatch.setattr(checkpoints, "fault_of", lambda *_: None)
    assert checkpoint_of(True, tmp_path / "run").name == "checkpoint-2"


def test_log_says_which_checkpoint_was_passed_over_and_why(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    BREAKS["missing"](tmp_path / "run" / "checkpoint-2" / "optimizer.pt")
    checkpoint_of(True, tmp_path / "run")
    assert "Resuming from checkpoint-1. Passed over: checkpoint-2, because it has no optimizer.pt" in caplog.text
    BREAKS["cut"](tmp_path / "run" / "checkpoint-1" / "critic" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint.*checkpoint-2, .*; checkpoint-1, .* its critic/model"
    ):
        checkpoint_of(True, tmp_path / "run")


def test_checkpoint_of_an_earlier_run_is_taken_by_its_name_alone(run, tmp_path, caplog):
    """A run that has written over another one has not come as far."""
    shutil.copytree(run, tmp_path / "run")
    for step, at in ((1, 3000), (2, 1000)):
        os.utime(tmp_path / "run" / f"checkpoint-{step}", (at, at))
    (tmp_path / "run" / "run.json").write_text('{"begun": 2000.0}')
    assert checkpoint_of(True, tmp_path / "run").name == "checkpoint-1"
    assert "checkpoint-2, because it is of an earlier run in this folder" in caplog.text
    assert checkpoint_of(str(tmp_path / "run" / "checkpoint-2"), tmp_path).name == "checkpoint-2"


def test_checkpoint_of_an_earlier_version_is_opened_not_compared(run, tmp_path, caplog):
    checkpoint = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / MANIFEST).unlink()
    assert checkpoint_of(True, tmp_path) == checkpoint
    checkpoint_of(str(checkpoint), tmp_path)
    assert caplog.text.count(f"{checkpoint} has no {MANIFEST}, like those of earlier versions") == 1
    for name in ("optimizer.pt", "ppo_state.pt", "critic/model.safetensors", "tokenizer.json"):
        kept = (checkpoint / name).read_bytes()
        BREAKS["cut"](checkpoint / name)
        with pytest.raises(ValueError, match=rf"no complete checkpoint.* its {name} cannot be read"):
            checkpoint_of(True, tmp_path)
        (checkpoint / name).write_bytes(kept)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        checkpoint_of(True, tmp_path)


def test_state_of_a_run_is_not_unpickled(run, tmp_path):
    """Without a manifest its content is not compared; it still cannot run code."""
    checkpoint = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    (checkpoint / MANIFEST).unlink()
    torch.save(Unpickled(tmp_path / "written"), checkpoint / "ppo_state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        ppo_run(tmp_path, max_steps=2, resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "written").exists()


class Unpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_digests_are_of_small_files_or_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SMALL", 2000)
    for digest in ("small", "full"):
        dpo_run(tmp_path / digest, save_strategy="steps", save_steps=1, max_steps=1, checkpoint_digest=digest)
        files = json.loads((tmp_path / digest / "checkpoint-1" / MANIFEST).read_text())["files"]
        assert ("sha256" in files["model.safetensors"]) is (digest == "full")
        assert "sha256" in files["scheduler.pt"]
        assert all(files[name]["size"] for name in ("model.safetensors", "scheduler.pt"))
    with pytest.raises(ValueError, match="`checkpoint_digest` is 'none'; it must be one of"):
        RewardConfigX("x", use_cpu=True, bf16=False, checkpoint_digest="none")


@pytest.mark.parametrize("digest", [*checkpoints.DIGESTS, "mutant: full is not passed on"])
def test_full_digest_finds_what_was_altered_in_a_large_file(tmp_path, monkeypatch, digest):
    monkeypatch.setattr(checkpoints, "SMALL", 2000)
    if digest.startswith("mutant"):
        monkeypatch.setattr(saving, "complete", lambda staged, _, by: complete(staged, "small", by))
        digest, finds = "full", False
    else:
        finds = digest == "full"
    dpo_run(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, checkpoint_digest=digest)
    BREAKS["altered"](tmp_path / "checkpoint-1" / "model.safetensors")
    fault = fault_of(tmp_path / "checkpoint-1")
    assert fault == ("its model.safetensors is not what was saved: its sha256 is another" if finds else None)


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "control: shares are by rank, over all machines"])
def test_each_machine_compares_all_of_its_files(tmp_path, monkeypatch, mistaken):
    """With `save_on_each_node` each has its own: here the second of two machines with two processes each."""
    checkpoint, found = write(tmp_path, 2, "as saved"), []
    (checkpoint / "weights.txt").write_text("as soved")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4" if mistaken else "2")
    for rank in (2, 3):
        local = rank if mistaken else rank - 2
        state = SimpleNamespace(process_index=rank, local_process_index=local, num_processes=1)
        monkeypatch.setattr(checkpoints, "PartialState", lambda state=state: state)
        found.append(checkpoints.agreed_fault(checkpoint))
    assert (found != [None, None]) is not mistaken


# --- what is kept


def test_limit_deletes_the_oldest_never_the_newest_or_the_best(tmp_path):
    newest = [write(tmp_path, step, "") for step in (7, 20, 3)][-1]
    (tmp_path / "checkpoint-20-kept").mkdir()  # a user's
    rotate(newest, 2, str(tmp_path / "checkpoint-7"))
    assert set(numbered(tmp_path)) == {"checkpoint-3", "checkpoint-7"}
    rotate(newest, 1, None)
    assert set(numbered(tmp_path)) == {"checkpoint-3"}
    assert (tmp_path / "checkpoint-20-kept").is_dir()
    assert not (tmp_path / checkpoints.SAVING).exists()


def test_best_checkpoint_is_named_by_its_place(tmp_path):
    run_to_best_checkpoint(
        tmp_path, {"reward_model": None, "reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    )
    for step in (2, 4, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
        assert fault_of(tmp_path / f"checkpoint-{step}") is None


class Looks(TrainerCallback):
    def __init__(self):
        self.faults = []

    def on_save(self, args, state, control, **kwargs):
        self.faults.append(fault_of(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


@pytest.mark.parametrize("mistaken", [False, True], ids=["right", "control: as the Trainer deletes"])
def test_kill_at_the_end_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch, mistaken):
    """When the best one alone is kept, the newest is deleted last of all."""
    if mistaken:
        monkeypatch.setattr(saving, "delete_all_but", lambda *_: None)
    output = tmp_path / "run"
    output.mkdir()
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}  # the first
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    held_out = {"eval_dataset": tiny_pairs()}
    trainer = dpo_trainer(output, save_total_limit=1, models=held_out, report_to="none", **saves, **best)
    evaluate = trainer._evaluate
    monkeypatch.setattr(
        trainer, "_evaluate", lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_constant": 0}
    )
    with copies_between_writes(output, tmp_path / "copies") as copies:
        trainer.train()
    assert set(numbered(output)) == {"checkpoint-1"}
    halves = [copy for copy in copies for name in numbered(copy) if is_partial(copy / name)]
    assert (halves != []) is mistaken


class Breaks(TrainerCallback):
    """Cuts the first checkpoint when the second is there."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            BREAKS["cut"](Path(args.output_dir) / "checkpoint-1" / "model.safetensors")


def test_newest_checkpoint_is_not_deleted_for_the_best_if_that_is_broken(tmp_path, monkeypatch):
    best = {"metric_for_best_model": "constant", "greater_is_better": True, "load_best_model_at_end": True}
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = dpo_trainer(tmp_path, save_total_limit=1, models={"eval_dataset": tiny_pairs()}, **saves, **best)
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"eval_constant": 0})
    trainer.add_callback(Breaks())
    with pytest.raises(RunError, match=r"checkpoint-1, cannot be loaded, because its model.* The run was done") as end:
        trainer.train()
    assert end.value.__notes__[0].startswith("checkpoint-2 is complete")
    assert set(numbered(tmp_path)) == {"checkpoint-1", "checkpoint-2"}


def is_partial(checkpoint):
    return not (checkpoint / MANIFEST).is_file() or fault_of(checkpoint) is not None


def test_callbacks_find_the_checkpoint_and_reward_models_have_it_too(tmp_path):
    looks = Looks()
    trainer = reward_trainer(tmp_path, tiny_pairs(8), None, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.add_callback(looks)
    trainer.train()
    assert looks.faults == [None, None]


@pytest.mark.parametrize("only_model", [False, True])
def test_too_little_space_is_said_before_it_is_needed(tmp_path, monkeypatch, caplog, only_model):
    """Before the first, and after each that another follows; the model alone needs a third of it with AdamW."""
    trainer = dpo_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, save_only_model=only_model)
    weights = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert trainer._size_of_one() == (weights if only_model else 3 * weights)
    space = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: space)
    trainer.train()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(" needs about")[0] for line in said if "needs about" in line] == [
        "A checkpoint",
        "The next checkpoint",
    ]
