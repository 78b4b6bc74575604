"""The last lines of a run: its evaluations, and the commands to look at it, to resume it, to go on, to talk to it."""

import json
import math
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedModel, TrainerCallback

from cli_runs import TRAINING, error_of, run_of
from trl_ext import RewardTrainerX
from trl_ext.cli import training
from trl_ext.cli.closing import report_callbacks, resuming, without
from trl_ext.cli.main import main
from trl_ext.ppo.roles.reward_functions import check_rewards
from trl_ext.report import first_and_last_evaluation, read_run
from trl_ext.runs.failures import RunError


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def last_lines(text):
    """Place and commands of the last lines."""
    lines = text[text.index("Everything is in ") :].splitlines()
    return lines[0].removeprefix("Everything is in "), dict(line.strip().split(maxsplit=1) for line in lines[1:])


class StopAfter(TrainerCallback):
    """What a callback does that has seen enough, or, with `error`, a user who has."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            raise self.error() if callable(self.error) else self.error
        control.should_training_stop |= state.global_step == self.step


@pytest.fixture
def stop_after(monkeypatch):
    """Ends the next run early."""

    def stop(step, error=None):
        monkeypatch.setattr(training, "report_callbacks", lambda _: [StopAfter(step, error)])

    return stop


OF_PAIRS = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1}
SHORT = {"dpo": OF_PAIRS, "reward": OF_PAIRS}
SHORT["ppo"] = {"total_episodes": 8, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "save_steps": 1}


def state_in(folder):
    return json.loads((folder / "trainer_state.json").read_text())


def steps_taken(folder):
    return state_in(folder)["global_step"]


@pytest.mark.parametrize("name", TRAINING)
def test_run_that_stopped_early_is_resumed_to_its_end_and_no_further(name, paths, tmp_path, stop_after, capsys):
    """Beyond its end it would take another step and overwrite what it has left."""
    output = tmp_path / "a run"  # a folder that has to be quoted
    stop_after(1)
    main([name, *run_of(name, paths, output_dir=output, **SHORT[name])])
    place, lines = last_lines(capsys.readouterr().out)
    assert (shlex.split(place), steps_taken(output)) == ([str(output)], 1)
    resume = shlex.split(lines["resume"])
    assert resume[:2] == ["trl-ext", name]
    assert resume[-2:] == ["--resume_from_checkpoint", str(output / "checkpoint-1")]
    stop_after(99)
    main(resume[1:])
    assert steps_taken(output) == 2
    assert "resume" not in last_lines(capsys.readouterr().out)[1]

    weights = (output / "model.safetensors").read_bytes()
    for more in ([], ["--dry_run"]):
        said = error_of([*resume[1:-1], str(output / "checkpoint-2"), *more], capsys)
        assert "checkpoint-2 has taken 2 optimizer steps, and this one ends after 2. To train for longer" in said
        assert said.count("\n") == 0
    assert (output / "model.safetensors").read_bytes() == weights


class Interrupts(TrainerCallback):
    """Presses Ctrl-C in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", TRAINING)
def test_run_that_ctrl_c_has_stopped_ends_as_if_it_had_not_been(name, paths, tmp_path, monkeypatch, capsys):
    """By the line that it prints; the report says where it stopped."""
    short = SHORT[name] | {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}
    short |= {"num_mini_batches": 2, "max_steps": -1, "total_episodes": 8} if name == "ppo" else {}
    main([name, *run_of(name, paths, output_dir=tmp_path / "whole", **short)])
    with monkeypatch.context() as patch:
        patch.setattr(training, "report_callbacks", lambda facts: [*report_callbacks(facts), Interrupts()])
        with pytest.raises(SystemExit) as end:
            main([name, *run_of(name, paths, output_dir=tmp_path / "a run", **short)])
    assert end.value.code == 130
    said = capsys.readouterr().err.splitlines()
    line = next(line for line in said if line.startswith("Stopped at step 2 by SIGINT. To go on from there: trl-ext "))
    assert read_run(tmp_path / "a run").state == "stopped at step 2"
    main(shlex.split(line.partition(": trl-ext ")[2]))
    assert read_run(tmp_path / "a run").state == "finished"
    for file in ("model.safetensors", *(["critic/model.safetensors"] if name == "ppo" else [])):
        assert (tmp_path / "a run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", TRAINING)
def test_signal_while_models_load_ends_the_command_in_one_line(name, number, paths, tmp_path, monkeypatch, capfd):
    """An output folder that was there stays; a new one, into which nothing is written yet, goes."""
    load, own = PreTrainedModel.from_pretrained.__func__, signal.getsignal(number)

    def send(cls, *args, **kwargs):
        os.kill(os.getpid(), number)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(send))
    (tmp_path / "old").mkdir()
    for output in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(SystemExit) as end:
            main([name, *run_of(name, paths, output_dir=output, **SHORT[name])])
        said = capfd.readouterr().err
        assert end.value.code == 128 + number
        assert said.splitlines()[-1] == f"Stopped by {number.name} before the run had begun: start it again."
        assert "Traceback" not in said
        assert signal.getsignal(number) == own
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]
    assert not any((tmp_path / "old").iterdir())


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (RunError("Full."), 1)])
def test_interrupted_run_says_how_to_go_on(paths, tmp_path, stop_after, capsys, error, code):
    words = ["dpo", *run_of("dpo", paths, output_dir=tmp_path, **SHORT["dpo"])]
    stop_after(1, error)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("To go on from the last chec")]
    assert lines[0].endswith(f"--resume_from_checkpoint {tmp_path / 'checkpoint-1'}")
    if code == 130:
        assert said[-1] == "Stopped by SIGINT."
    else:
        assert said[-3:-1] == ["error: Full.", error.__notes__[0]]


@pytest.mark.parametrize("answer, said", [([math.nan], "The reward 'mine' is nan"), (None, "'mine' returned None")])
def test_wrong_answer_amid_a_run_is_a_sentence_and_the_way_on(paths, tmp_path, stop_after, capsys, answer, said):
    """It would be a traceback, or leave out what is saved."""
    stop_after(2, lambda: check_rewards(answer, "mine", {}))
    with pytest.raises(SystemExit) as end:
        main(["dpo", *run_of("dpo", paths, output_dir=tmp_path, **SHORT["dpo"] | {"max_steps": 3})])
    lines = end.value.code.splitlines()
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert lines[1].startswith("checkpoint-2 is complete")
    assert lines[2].endswith(f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}")


def test_evaluation_without_the_metric_says_so():
    trainer = SimpleNamespace(
        state=SimpleNamespace(log_history=[{"eval_loss": 1.0, "step": 2}]), evaluate=lambda: None
    )
    with pytest.raises(ValueError, match=r"gave no eval_reward/score: no source of the reward applied"):
        first_and_last_evaluation(trainer, "eval_reward/score")


def test_ctrl_c_in_the_last_evaluation_leaves_what_was_trained(paths, tmp_path, monkeypatch):
    def interrupt(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardTrainerX, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main(["reward", *run_of("reward", paths, output_dir=tmp_path, **SHORT["reward"] | {"save_strategy": "no"})])
    assert (tmp_path / "model.safetensors").is_file()


def test_signal_while_the_trained_model_is_saved_lets_it_be_saved(paths, tmp_path, monkeypatch, capfd):
    """Without checkpoints it is all that there is of the run."""
    save = RewardTrainerX.save_model

    def send(trainer, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(RewardTrainerX, "save_model", send)
    unsaved = SHORT["reward"] | {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    with pytest.raises(SystemExit) as end:
        main(["reward", *run_of("reward", paths, output_dir=tmp_path, **unsaved)])
    assert end.value.code == 143
    said = capfd.readouterr().err
    assert "SIGTERM: the run ends as soon as its model is saved. Once more, after 2 seconds, ends it now." in said
    assert f"The run was done. The model is in {tmp_path}; it was not evaluated." in said
    assert (tmp_path / "model.safetensors").is_file()


def test_results_that_cannot_be_written_are_named_and_the_model_is_there(paths, tmp_path, capsys):
    (tmp_path / "metrics.json").mkdir()
    said = error_of(["dpo", *run_of("dpo", paths, output_dir=tmp_path, **SHORT["dpo"] | {"max_steps": 1})], capsys)
    assert "error: What comes after the model, which is saved, was not written: IsADirectoryError, Is a dir" in said
    assert "Traceback" not in said
    assert (tmp_path / "model.safetensors").is_file()


def test_last_lines_of_dpo_look_at_it_and_talk_to_it(paths, tmp_path, capsys):
    output = tmp_path / "a run"
    main(["dpo", *run_of("dpo", paths, max_steps=1, per_device_train_batch_size=4, output_dir=output)])
    lines = last_lines(capsys.readouterr().out)[1]
    program, page = shlex.split(lines["look"])
    assert (program, Path(page).is_file()) == ("open", True)
    assert shlex.split(lines["chat"]) == ["trl-ext", "chat", str(output)]


def test_last_lines_of_ppo_go_on_from_actor_and_critic(paths, tmp_path, capsys):
    short = SHORT["ppo"] | {"total_episodes": 4, "output_dir": tmp_path / "1"}
    main(["ppo", *run_of("ppo", paths, **short)])
    words = shlex.split(last_lines(capsys.readouterr().out)[1]["next"])
    assert words[:2] == ["trl-ext", "ppo"]
    again = dict(zip(words[2::2], words[3::2], strict=True))
    first = dict(zip(*[iter(run_of("ppo", paths, **short))] * 2, strict=True))
    assert again == first | {
        "--model": str(tmp_path / "1"),
        "--value_model": str(tmp_path / "1" / "critic"),
        "--output_dir": str(tmp_path / "1-next"),
    }
    main(words[1:])
    assert (tmp_path / "1-next" / "critic").is_dir()


def test_next_of_a_resumed_run_of_ppo_does_not_resume(paths, tmp_path, stop_after, capsys):
    """The second run ends where one run of that length would have; its losses begin with the first one's."""
    short = SHORT["ppo"] | {"total_episodes": 4, "output_dir": tmp_path}
    main(["ppo", *run_of("ppo", paths, **short)])
    capsys.readouterr()
    before = state_in(tmp_path)
    main(["ppo", *run_of("ppo", paths, **short | {"total_episodes": 8}), "--resume_from_checkpoint", "True"])
    after = state_in(tmp_path)
    assert after["global_step"] == 2 * before["global_step"]
    first, both = ([line["loss"] for line in s["log_history"] if "loss" in line] for s in (before, after))
    assert both[: len(first)] == first
    assert "--resume_from_checkpoint" not in last_lines(capsys.readouterr().out)[1]["next"]


def test_checkpoint_of_an_earlier_run_is_not_resumed(tmp_path):
    """Nor one that was cut off, or a folder of another name."""
    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-best", "checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 30}')
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert resuming("dpo", tmp_path, []).endswith("checkpoint-20")
    os.utime(tmp_path / "checkpoint-20", (1, 1))
    (tmp_path / "run.json").write_text('{"begun": 1000.0}')
    assert resuming("dpo", tmp_path, []).endswith("checkpoint-3")
    os.utime(tmp_path / "checkpoint-3", (1, 1))
    assert resuming("dpo", tmp_path, []) is None


def test_next_of_a_reward_run_is_ppo_of_the_same_model_and_data(paths, tmp_path, capsys):
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": tmp_path / "r"}
    main(["reward", *run_of("reward", paths, **short)])
    words = shlex.split(last_lines(capsys.readouterr().out)[1]["next"])
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--model": str(paths["actor"]),
        "--dataset_name": str(paths["pairs"]),
        "--reward_model_path": str(tmp_path / "r"),
        "--output_dir": f"{tmp_path / 'r'}-ppo",
    }
    main([*words[1:], "--dry_run"])
    assert "The first prompt" in capsys.readouterr().out


def test_words_are_dropped_with_their_values_in_both_spellings():
    argv = ["--a_b", "1", "2", "--keep", "3", "--a-b=4", "--flag", "--c", "5"]
    assert without(argv, "a_b", "c") == ["--keep", "3", "--flag"]


# --- what a run says of its evaluations

UNSAVED = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no"}
PPO_SHORT = UNSAVED | {"total_episodes": 8, "num_ppo_epochs": 1}


def summary(name, paths, capsys, **options):
    main([name, *run_of(name, paths, **options)])
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Held-out "))


# An evaluation on the way is not one from before the first step.
@pytest.mark.parametrize("on_the_way", [{}, {"eval_strategy": "steps", "eval_steps": 1}], ids=["none", "some"])
def test_without_an_evaluation_at_the_start_there_is_no_before(on_the_way, paths, tmp_path, capsys):
    said = summary("ppo", paths, capsys, output_dir=tmp_path / "ppo", eval_on_start=False, **PPO_SHORT, **on_the_way)
    assert " after. KL to the reference:" in said
    assert not any(word in said for word in ("before", "rose", "nan"))
    dpo = UNSAVED | {"max_steps": 2, "output_dir": tmp_path / "dpo"}
    said = summary("dpo", paths, capsys, eval_on_start=False, **dpo, **on_the_way)
    assert " after, of 4." in said
    assert "before" not in said
    for name in ("ppo", "dpo"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert list(metrics) == ["after"]
        assert metrics["after"]["step"] == 2
    assert not (tmp_path / "ppo" / "samples.md").exists()
    assert (tmp_path / "dpo" / "table.md").read_text().startswith("| held-out pairs | after |")
