"""The last lines of a run: the commands to look at it, to resume it, to go on from it, to talk to it."""

import json
import shlex
from pathlib import Path

import pytest

from cli_runs import run_of
from trl_ext.cli.closing import closing_lines, without
from trl_ext.cli.main import main


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def last_lines(text):
    """Place and commands of the last lines."""
    lines = text[text.index("Everything is in ") :].splitlines()
    return lines[0].removeprefix("Everything is in "), dict(line.strip().split(maxsplit=1) for line in lines[1:])


def test_last_lines_of_dpo_resume_it_and_talk_to_it(paths, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a run"  # a folder that has to be quoted
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": output, "save_steps": 1}
    main(["dpo", *run_of("dpo", paths, **short)])
    place, lines = last_lines(capsys.readouterr().out)
    assert place == str(output)
    program, page = shlex.split(lines["look"])
    assert (program, Path(page).is_file()) == ("open", True)
    resume = shlex.split(lines["resume"])
    assert resume[:2] == ["trl-ext", "dpo"]
    assert resume[-2:] == ["--resume_from_checkpoint", str(output / "checkpoint-1")]
    resume[resume.index("--max_steps") + 1] = "2"
    main(resume[1:])
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    again = shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])
    assert again.count("--resume_from_checkpoint") == 1
    assert again[-1] == str(output / "checkpoint-2")
    assert shlex.split(lines["chat"]) == ["trl-ext", "chat", str(output)]


def test_last_lines_of_ppo_go_on_from_actor_and_critic(paths, tmp_path, capsys):
    short = {"total_episodes": 4, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "output_dir": tmp_path / "1"}
    main(["ppo", *run_of("ppo", paths, **short)])
    _, lines = last_lines(capsys.readouterr().out)
    words = shlex.split(lines["next"])
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


def test_last_lines_of_ppo_resume_it(paths, tmp_path, capsys):
    """The second run ends where the first, longer one would have been; `next` does not resume."""
    short = {"total_episodes": 4, "per_device_train_batch_size": 4, "output_dir": tmp_path, "save_steps": 2}
    main(["ppo", *run_of("ppo", paths, **short)])
    resume = shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])
    assert resume[:2] == ["trl-ext", "ppo"]
    resume[resume.index("--total_episodes") + 1] = "8"
    before = json.loads((tmp_path / "trainer_state.json").read_text())
    main(resume[1:])
    after = json.loads((tmp_path / "trainer_state.json").read_text())
    assert after["global_step"] == 2 * before["global_step"]
    first, both = ([line["loss"] for line in s["log_history"] if "loss" in line] for s in (before, after))
    assert both[: len(first)] == first
    lines = last_lines(capsys.readouterr().out)[1]
    assert "--resume_from_checkpoint" not in lines["next"]
    assert lines["resume"].endswith(f"checkpoint-{after['global_step']}")


def test_checkpoint_of_an_earlier_run_is_not_resumed(paths, tmp_path, capsys):
    short = {"max_steps": 3, "per_device_train_batch_size": 4, "output_dir": tmp_path, "save_steps": 1}
    main(["dpo", *run_of("dpo", paths, **short)])
    assert "checkpoint-3" in last_lines(capsys.readouterr().out)[1]["resume"]
    main(["dpo", *run_of("dpo", paths, **short | {"max_steps": 1, "beta": 0.3})])
    assert shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])[-1] == str(tmp_path / "checkpoint-1")
    main(["dpo", *run_of("dpo", paths, **short | {"max_steps": 1, "save_strategy": "no"})])
    assert "resume" not in last_lines(capsys.readouterr().out)[1]


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


def test_last_line_without_a_report_says_how_to_make_it(tmp_path):
    assert f"trl-ext report {tmp_path}" in closing_lines("dpo", tmp_path)


def test_words_are_dropped_with_their_values_in_both_spellings():
    argv = ["--a_b", "1", "2", "--keep", "3", "--a-b=4", "--flag", "--c", "5"]
    assert without(argv, "a_b", "c") == ["--keep", "3", "--flag"]
