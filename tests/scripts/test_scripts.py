"""The scripts from end to end on tiny models: parse, load, train, save; and every recipe is one they accept."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from cli_runs import flags
from commands import command
from trl_ext.cli.data import DataArguments, load_splits
from trl_ext.data.conversions import to_preference


# Of TRL, transformers and torch themselves, on the way through a whole script.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    tiny.tiny_prompts(24).to_json(str(folder / "prompts.jsonl"))
    texts = tiny.tiny_prompts(40)["prompt"]
    pairs = [{"chosen": f"good {text}", "rejected": f"bad {text}"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    return {"folder": folder, **tiny.save_tiny(folder)}


REWARD = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none"}
PPO = {
    "response_length": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 1,
    "total_episodes": 8,
    "logging_steps": 1,
    "report_to": "none",
}


def ppo_flags(paths, reward_model, **options):
    data = {"model": paths["actor"], "dataset_name": paths["folder"] / "prompts.jsonl"}
    return flags(**data, reward_model_path=reward_model, **PPO, **options)


@pytest.fixture(scope="module")
def reward_run(paths):
    output = paths["folder"] / "reward"
    data = {"model": paths["actor"], "dataset_name": paths["folder"] / "pairs.jsonl", "output_dir": output}
    command("reward").main(flags(**data, **REWARD))
    return output


def test_reward_saves_a_model_metrics_and_a_picture(reward_run):
    model = AutoModelForSequenceClassification.from_pretrained(reward_run)
    assert model.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(reward_run).get_vocab() == tiny.tiny_tokenizer().get_vocab()
    metrics = json.loads((reward_run / "metrics.json").read_text())
    assert metrics["eval_pairs"] == 4  # a tenth of 40
    assert metrics["eval_accuracy_low"] <= metrics["eval_accuracy"] <= metrics["eval_accuracy_high"]
    assert (reward_run / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_takes_the_reward_model_of_reward_py(paths, reward_run, critic, capsys, request):
    if critic == "head":
        request.getfixturevalue("undrawn")
    output = paths["folder"] / f"ppo-{critic}"
    command("ppo").main(ppo_flags(paths, reward_run, output_dir=output, critic=critic))
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    assert (output / "critic").is_dir()
    metrics = json.loads((output / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert (before["step"], after["step"]) == (0, 2)
    rise = after["eval_reward/score"] - before["eval_reward/score"]
    assert after["eval_reward/rise"] == pytest.approx(rise, abs=1e-6)
    assert before["eval_kl/ref"] == pytest.approx(0, abs=1e-5)
    assert (output / "report.html").is_file()
    assert critic == "head" or (output / "report.png").stat().st_size > 10_000
    table = (output / "samples.md").read_text().splitlines()
    assert table[0] == "| prompt | before | score | after | score |"
    assert len(table) == 2 + 3  # 3 of 24 prompts are held out
    printed = capsys.readouterr().out
    assert "Held-out score:" in printed
    assert "step 1/2  reward" in printed


# ---------------------------------------------------------------------------------------------------------------- DPO


DPO = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
}


def dpo_flags(paths, output, **options):
    data = {"model": paths["actor"], "dataset_name": paths["folder"] / "sourced.jsonl", "output_dir": output}
    return flags(**data, **DPO | options)


@pytest.fixture(scope="module")
def dpo_run(paths):
    """DPO on the pairs of reward.py, with a source each; held-out pairs in held_out.jsonl."""
    pairs = Dataset.from_json(str(paths["folder"] / "pairs.jsonl"))
    source = paths["folder"] / "sourced.jsonl"
    pairs.add_column("source", ["a", "b"] * (len(pairs) // 2)).to_json(str(source))
    held_out = load_splits(DataArguments(dataset_name=str(source)), None, to_preference)["test"]
    held_out.to_json(str(paths["folder"] / "held_out.jsonl"))
    output = paths["folder"] / "dpo"
    command("dpo").main(dpo_flags(paths, output, save_steps=1))
    return output


def test_dpo_saves_a_model_metrics_a_table_and_a_picture(dpo_run):
    AutoModelForCausalLM.from_pretrained(dpo_run)
    assert AutoTokenizer.from_pretrained(dpo_run).get_vocab() == tiny.tiny_tokenizer().get_vocab()
    metrics = json.loads((dpo_run / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert (before["step"], after["step"]) == (0, 2)
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert after["eval_preference/pairs"] == 4  # a tenth of 40
    assert (dpo_run / "report.png").stat().st_size > 10_000
    table = (dpo_run / "table.md").read_text().splitlines()
    assert table[:2] == ["| held-out pairs | before | after |", "|---|---:|---:|"]
    assert table[2].startswith("| preference accuracy (95% interval) | all ties | ")
    assert any(row.startswith("| accuracy, a |") for row in table)


def test_score_gives_the_margins_of_the_evaluation(paths, dpo_run, capsys):
    output = paths["folder"] / "scores" / "held_out.jsonl"
    held_out = paths["folder"] / "held_out.jsonl"
    models = {"model": dpo_run, "ref_model": paths["actor"]}
    command("score").main(flags(**models, dataset_name=held_out, output_file=output, batch_size=3))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    after = json.loads((dpo_run / "metrics.json").read_text())["after"]
    for key in ("chosen", "rejected"):
        mean = sum(row[f"{key}_reward"] for row in rows) / len(rows)
        assert mean == pytest.approx(after[f"eval_rewards/{key}"], abs=1e-5)
    assert all(row["margin"] == row["chosen_reward"] - row["rejected_reward"] for row in rows)
    assert rows[0].keys() == {"chosen", "rejected", "source", "chosen_reward", "rejected_reward", "margin"}
    right = sum(row["margin"] > 0 for row in rows)
    assert right == pytest.approx(4 * after["eval_preference/accuracy"])
    assert f"Pairs in the right order: {right / 4:.1%} of 4 (95% interval" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_dpo_resumes_and_ends_where_it_would_have_ended(paths, dpo_run, capsys):
    output = paths["folder"] / "dpo-resumed"
    command("dpo").main(dpo_flags(paths, output, save_steps=1, resume_from_checkpoint=dpo_run / "checkpoint-1"))
    assert not (output / "checkpoint-1").exists()  # it began with the second step
    assert "all ties before" in capsys.readouterr().out  # the evaluation of the first run
    resumed, first = (json.loads((run / "metrics.json").read_text())["after"] for run in (output, dpo_run))
    assert resumed["eval_loss"] == pytest.approx(first["eval_loss"], abs=1e-6)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "qlora"])
def test_dpo_trains_an_adapter_that_is_scored_without_a_reference(paths, dpo_run, quantised):
    output, scores, actor = (str(paths["folder"] / f"{name}-{quantised}") for name in ("lora", "scores", "actor"))
    tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained(actor)  # NF4 on CPU needs such widths
    tiny.tiny_tokenizer().save_pretrained(actor)
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_dropout", "0", "--ignore_bias_buffers"]
    nf4 = ["--load_in_4bit", "--use_bnb_nested_quant"] if quantised else []
    command("dpo").main(dpo_flags(paths | {"actor": actor}, output) + lora + nf4)
    assert (Path(output) / "adapter_config.json").exists()
    held_out = paths["folder"] / "held_out.jsonl"
    command("score").main(flags(model=output, dataset_name=held_out, output_file=scores) + nf4)
    margins = [json.loads(line)["margin"] for line in Path(scores).read_text().splitlines()]
    after = json.loads((Path(output) / "metrics.json").read_text())["after"]
    mean = sum(margins) / len(margins)
    # On a quantised base TRL trains the adapter in bfloat16; here it is read in float32.
    assert mean == pytest.approx(after["eval_rewards/margins"], abs=1e-2 if quantised else 1e-5)
    assert abs(mean) > 2e-2


def test_dpo_knows_every_flag_of_trl_dpo(capsys):
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TrlParser

    of_trl = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig))
    flags_of_trl = {f"--{action.dest}" for action in of_trl._actions if action.dest != "help"}
    with pytest.raises(SystemExit):
        command("dpo").COMMAND.options(["--help_all"])
    assert len(flags_of_trl) > 150
    assert flags_of_trl <= set(re.findall(r"--\w+", capsys.readouterr().out))
