"""`trl-ext critic`: one run from prompts to a folder, the commands that it ends with, and what it refuses."""

import json
import shlex

import pytest
from safetensors.torch import load_file
from torch import equal

import tiny
from cli_runs import error_of, flags, plan_line
from commands import command
from trl_ext.cli.main import main
from trl_ext.ppo.saved_rollouts import OPTIONS


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
SHORT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 4}
SHORT |= {"total_episodes": 12, "test_size": 4, "response_length": 4, "report_to": "none"}


def words_of(paths, **options):
    """Flags that `trl-ext critic` and `trl-ext ppo` both take."""
    data = {"model": paths["actor"], "dataset_name": paths["prompts"], "reward_model_path": paths["reward_model"]}
    return flags(**data | SHORT | options)


def last_lines(printed):
    lines = printed[printed.index("Everything is in") :].splitlines()
    return dict(line.split(maxsplit=1) for line in lines[1:])


@pytest.fixture(scope="module")
def ran(paths, tmp_path_factory):
    """A run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("critic") / "a run"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        more = {"output_dir": folder, "learning_rate": 1e-2, "max_passes": 2, "critic_learning_rate": 5e-3}
        main(["critic", *words_of(paths, **more)])
    return folder, "\n".join(printed)


def test_run_leaves_critic_tokenizer_responses_and_what_it_explains(ran):
    folder, printed = ran
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.json"} <= names
    assert {"rollouts/train.parquet", "rollouts/held_out.parquet", "rollouts/facts.json", "policy.json"} <= names
    assert not [name for name in names if name.startswith("checkpoint")]
    metrics = json.loads((folder / "metrics.json").read_text())
    key = "eval_value/explained_variance_mc"
    explained = [line[key] for line in (metrics["before"], *metrics["passes"])]
    assert metrics["after"][key] == max(explained) == explained[metrics["best_pass"]]
    table = printed[printed.index("Held-out responses:") :].splitlines()[1 : len(explained) + 1]
    assert [float(line.split()[1]) for line in table] == [pytest.approx(each, abs=5e-4) for each in explained]
    assert [line.endswith("<- kept") for line in table] == [i == metrics["best_pass"] for i in range(len(table))]
    assert f"{max(explained):.3f} after {metrics['best_pass']} passes" in (folder / "README.md").read_text()


def test_next_command_is_ppo_with_this_critic_and_its_own_rate(ran, monkeypatch):
    folder, printed = ran
    words = shlex.split(last_lines(printed)["next"])
    assert words[:2] == ["trl-ext", "ppo"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--value_model"] == str(folder)
    assert given["--critic_learning_rate"] == "0.005"
    assert given.keys().isdisjoint({"--learning_rate", "--max_passes", "--total_episodes"})
    main([*words[1:], *flags(total_episodes=4, num_ppo_epochs=1)])
    log = json.loads((folder.parent / "a run-ppo" / "trainer_state.json").read_text())["log_history"]
    assert any("value/explained_variance_mc" in line for line in log)


def test_again_command_reads_the_responses_and_gives_the_same_critic(ran):
    folder, printed = ran
    words = shlex.split(last_lines(printed)["again"])
    assert words[-4:] == ["--rollouts", str(folder / "rollouts"), "--output_dir", f"{folder}-again"]
    main(words[1:])
    first, second = (load_file(path / "model.safetensors") for path in (folder, folder.parent / "a run-again"))
    assert all(equal(first[name], second[name]) for name in first)


def test_responses_of_another_policy_and_a_missing_reward_are_one_sentence(ran, paths, tmp_path, capsys):
    folder, _ = ran
    rollouts = {"rollouts": folder / "rollouts", "output_dir": tmp_path / "out"}
    tiny.tiny_actor(5).save_pretrained(tmp_path / "other")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "other")
    words = words_of(paths | {"actor": tmp_path / "other"}, **rollouts)
    assert "whose weights are not those of this run's" in error_of(["critic", *words], capsys)
    without = flags(model=paths["actor"], dataset_name=paths["prompts"], output_dir=tmp_path / "out")
    assert "There is no reward at all" in error_of(["critic", *without], capsys)
    gone = words_of(paths, rollouts=tmp_path, output_dir=tmp_path / "out")
    assert "has no facts.json" in error_of(["critic", *gone], capsys)
    assert not (tmp_path / "out").exists()


def test_recipe_of_ppo_serves_for_its_critic(paths, recipe, tmp_path, capsys):
    """With options that say how the actor learns; they are not read."""
    own = {"kl_controller": "band", "cliprange": 0.3, "lam_alpha": 0.5, "critic_warmup_until": 0.5, "save_steps": 1}
    path = recipe("".join(f"{name}: {value}\n" for name, value in (SHORT | own).items()))
    data = flags(model=paths["actor"], dataset_name=paths["prompts"], reward_model_path=paths["reward_model"])
    words = ["--config", path, *data, *flags(output_dir=tmp_path / "critic")]
    main(["critic", *words, "--max_passes", "1"])
    assert "Everything is in" in capsys.readouterr().out
    assert (tmp_path / "critic" / "model.safetensors").is_file()


def test_dry_run_prints_the_trainers_plan(ran, paths, tmp_path, capsys):
    _, printed = ran
    more = {"output_dir": tmp_path / "out", "max_passes": 2}
    main(["critic", *words_of(paths, **more), "--dry_run"])
    text = capsys.readouterr().out
    line = plan_line(text)
    assert line.startswith("Critic plan: 12 responses to learn from, 4 held out; up to 2 passes of 3 optimizer steps")
    assert line in printed
    assert "The first prompt, as the actor reads it" in text
    assert not (tmp_path / "out").exists()


def test_recipe_of_the_demo_samples_as_ppos_does():
    """Its critic would be another policy's, or of other answers."""
    critic, ppo = (command(name).COMMAND.options([]) for name in ("critic", "ppo"))
    for name in (*OPTIONS, "prompt_words", "reward_model_path", "critic", "use_peft", "model_name_or_path", "gamma"):
        assert getattr(critic, name) == getattr(ppo, name), name
    assert critic.learning_rate == ppo.critic_learning_rate
