"""What a run says of its evaluations: before and after, or after alone."""

import json

import pytest

from cli_runs import run_of
from trl_ext.cli.main import main


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
SHORT = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no"}
PPO = SHORT | {"total_episodes": 8, "num_ppo_epochs": 1}


def summary(name, paths, capsys, **options):
    main([name, *run_of(name, paths, **options)])
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Held-out "))


# An evaluation on the way is not one from before the first step.
@pytest.mark.parametrize("on_the_way", [{}, {"eval_strategy": "steps", "eval_steps": 1}], ids=["none", "some"])
def test_without_an_evaluation_at_the_start_there_is_no_before(on_the_way, paths, tmp_path, capsys):
    said = summary("ppo", paths, capsys, output_dir=tmp_path / "ppo", eval_on_start=False, **PPO, **on_the_way)
    assert " after. KL to the reference:" in said
    assert not any(word in said for word in ("before", "rose", "nan"))
    dpo = SHORT | {"max_steps": 2, "output_dir": tmp_path / "dpo"}
    said = summary("dpo", paths, capsys, eval_on_start=False, **dpo, **on_the_way)
    assert " after, of 4." in said
    assert "before" not in said
    for name in ("ppo", "dpo"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert list(metrics) == ["after"]
        assert metrics["after"]["step"] == 2
    assert not (tmp_path / "ppo" / "samples.md").exists()
    assert (tmp_path / "dpo" / "table.md").read_text().startswith("| held-out pairs | after |")


def test_with_an_evaluation_at_the_start_both_are_there(paths, tmp_path, capsys):
    said = summary("ppo", paths, capsys, output_dir=tmp_path, **PPO)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    before, after = (metrics[when]["eval_reward/score"] for when in ("before", "after"))
    rise = metrics["after"]["eval_reward/rise"]
    assert said.startswith(f"Held-out score: {before:+.3f} before, {after:+.3f} after; it rose by {rise:.3f} ± ")
