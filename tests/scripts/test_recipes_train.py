"""
Every recipe trains, on tiny models in the places of its own, two short steps. Those that name a DeepSpeed file are
for several GPUs: test_dry_run.py runs them dry, the proofs of tests/scale train what they name.
"""

import json
import math

import pytest
import yaml
from datasets import Dataset

import tiny
from commands import ROOT
from trl_ext.cli.main import main


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
RECIPES = [
    path
    for name in ("reward", "ppo", "dpo")
    for path in sorted((ROOT / "configs" / name).glob("*.yaml"))
    if "deepspeed" not in yaml.safe_load(path.read_text())
]
SHORT = "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --optim adamw_torch --test_size 2 "
LENGTH = {
    "reward": "--max_steps 2 --gradient_accumulation_steps 1 --train_size 8",
    "dpo": "--max_steps 2 --gradient_accumulation_steps 1 --train_size 8",
    "ppo": "--total_episodes 8 --gradient_accumulation_steps 2 --response_length 3 --num_mini_batches 1",
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A base that is wide enough for NF4 on a CPU, reward models on it, prompts and pairs."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = tiny.tiny_prompts(24)["prompt"]
    Dataset.from_dict({"prompt": texts}).to_json(str(folder / "prompts.jsonl"))
    pairs = [{"prompt": text, "chosen": " good film", "rejected": " bad film and cat"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    wide = {"hidden_size": 64, "intermediate_size": 128}
    for name, model in (("base", tiny.tiny_actor(**wide)), ("judge", tiny.tiny_reward_model(**wide))):
        model.save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    short = ["--max_steps", "1", "--report_to", "none", "--output_dir", str(folder / "judge-adapter")]
    lora = ["--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear"]
    data = ["--model", str(folder / "base"), "--dataset_name", str(folder / "pairs.jsonl")]
    main(["reward", *data, *short, *lora])
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_trains(path, paths, tmp_path, capsys):
    name, recipe = path.parent.name, yaml.safe_load(path.read_text())
    words = [name, "--config", str(path), "--model", str(paths / "base"), "--output_dir", str(tmp_path)]
    words += ["--dataset_name", str(paths / ("prompts.jsonl" if name == "ppo" else "pairs.jsonl"))]
    words += [*SHORT.split(), *LENGTH[name].split()]
    if name == "ppo":
        judge = "judge-adapter" if recipe["critic"] == "adapter" else "judge"
        words += ["--reward_model_path", str(paths / judge)]
    if "reward_funcs" in recipe:
        words += ["--reward_funcs", "ppo_runs.response_lengths"]
    if "num_generations" in recipe:
        words += ["--num_generations", "2"]
    if recipe.get("use_peft"):
        words += ["--lora_target_modules", "all-linear"]  # one names layers that the tiny model has not
    main(words)
    assert f"Everything is in {tmp_path}" in capsys.readouterr().out
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] >= 2
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert losses
    assert all(map(math.isfinite, losses))
    saved = "adapter_config.json" if recipe.get("use_peft") else "config.json"
    assert (tmp_path / saved).is_file()
    assert "## The loss" in (tmp_path / "README.md").read_text()
