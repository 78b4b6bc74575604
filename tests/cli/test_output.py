"""A run does not write over another one unasked."""

import json

import pytest

from cli_runs import error_of, run_of
from trl_ext.cli import training
from trl_ext.cli.commands.ppo import report
from trl_ext.cli.main import main
from trl_ext.cli.output import beside
from trl_ext.models.loading import adapter_config


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SHORT = {"max_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1}


@pytest.mark.parametrize("left", ["run.json", "trainer_state.json", "checkpoint-3/trainer_state.json"])
@pytest.mark.parametrize("name", ["ppo", "critic", "dpo", "reward"])
def test_folder_of_another_run_is_refused_with_the_ways_out(name, left, paths, tmp_path, capsys):
    output = tmp_path / "out"
    (output / left).parent.mkdir(parents=True)
    (output / left).write_text("{}")
    (tmp_path / "out-2").mkdir()
    words = [name, *run_of("ppo" if name == "critic" else name, paths, output_dir=output)]
    for more in ([], ["--dry_run"]):
        said = error_of([*words, *more], capsys)
        assert f"'{output}' holds a run already. Give another folder, such as `--output_dir {output}-3`" in said
        assert "`--overwrite`" in said
        assert ("`--resume_from_checkpoint True`" in said) == left.startswith("checkpoint")
    assert [path.name for path in output.iterdir()] == [left.split("/")[0]]


def test_run_is_written_over_or_resumed_when_asked_and_other_folders_are_free(paths, tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    words = ["dpo", *run_of("dpo", paths, output_dir=tmp_path, **SHORT)]
    main(words)
    plan = "DPO plan: 4 pairs per optimizer step (4 × 1 accumulated × 1 process); 1 optimizer step over "
    assert plan in capsys.readouterr().out
    monkeypatch.setattr(training.TrainingCommand, "build", lambda *_: (_ for _ in ()).throw(SystemExit("begins")))
    assert "holds a run already" in error_of(words, capsys)
    longer = [*words, "--max_steps", "2", "--resume_from_checkpoint", "True"]
    for more in ([*words, "--overwrite"], longer):
        assert error_of(more, capsys) == "begins"


def test_mutant_that_looks_for_the_folder_alone_is_seen(tmp_path, monkeypatch, paths, capsys):
    from trl_ext.cli import output

    monkeypatch.setattr(output, "holds_run", lambda folder: folder.exists())
    monkeypatch.setattr(training.TrainingCommand, "build", lambda *_: (_ for _ in ()).throw(SystemExit("begins")))
    assert error_of(["dpo", *run_of("dpo", paths, output_dir=tmp_path, **SHORT)], capsys) != "begins"


def test_run_in_the_present_folder_is_refused_with_a_folder_beside_it(paths, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    said = error_of(["dpo", *run_of("dpo", paths, output_dir=".")], capsys)
    assert f"`--output_dir {tmp_path / 'here-2'}`, or write over it" in said
    assert beside("out/", "ppo") == "out-ppo"


def test_checkpoint_of_another_run_does_not_give_this_folder_away(paths, tmp_path, capsys):
    for name in ("one/checkpoint-2", "two/checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text("{}")
    words = ["dpo", *run_of("dpo", paths, output_dir=tmp_path / "two"), "--resume_from_checkpoint"]
    assert "two' holds a run already" in error_of([*words, str(tmp_path / "one/checkpoint-2")], capsys)
    assert "holds a run already" not in error_of([*words, str(tmp_path / "two/checkpoint-2")], capsys)


def test_adapter_of_the_run_that_is_written_over_is_not_taken_for_the_new_model(paths, tmp_path):
    words = ["dpo", *run_of("dpo", paths, output_dir=tmp_path / "out", **SHORT | {"save_strategy": "no"})]
    main([*words, "--use_peft", "--lora_target_modules", "q_proj"])
    assert adapter_config(str(tmp_path / "out")) is not None
    main([*words, "--overwrite"])
    assert adapter_config(str(tmp_path / "out")) is None
    assert (tmp_path / "out" / "model.safetensors").is_file()
    main([*words, "--overwrite", "--use_peft", "--lora_target_modules", "q_proj"])
    assert adapter_config(str(tmp_path / "out")) is not None


@pytest.mark.parametrize(
    "rise, words",
    [
        (0.05, "it rose by 0.050 ± 0.010 (95%). KL to the reference: 0.00 nats"),
        (-0.05, "it fell by 0.050 ± 0.010 (95%). KL"),
        (-0.01, "it fell by 0.010 ± 0.010 (95%), not distinguishable from 0. KL"),
    ],
)
def test_score_that_fell_is_said_to_have_fallen_and_a_move_within_its_interval_not_to_be_seen(
    rise, words, tmp_path, capsys
):
    class Trainer:
        class args:
            output_dir, log_completions = str(tmp_path), False

    after = {"eval_reward/rise": rise, "eval_reward/rise_ci95": 0.01, "eval_kl/ref": -1e-4, "eval_reward/score": 1.0}
    report(Trainer, {"before": {"eval_reward/score": 1.0 - rise}, "after": after}, None)
    assert words in capsys.readouterr().out


def test_score_shows_its_progress(paths, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    models = ["--model", paths["actor"], "--ref_model", paths["actor"]]
    main(["score", *models, "--dataset_name", paths["pairs"], "--output_file", str(output), "--batch_size", "8"])
    said = capsys.readouterr().err
    count = len([json.loads(line) for line in output.read_text().splitlines()])
    for name in ("policy", "reference"):
        assert f"{name}: 100%" in said
    assert f"{2 * count // 8}/{2 * count // 8}" in said
