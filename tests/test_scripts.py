"""The scripts from end to end on tiny models: parse, load, train, save; and every recipe is one they accept."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny


ROOT = Path(__file__).parents[1]
# Of TRL, transformers and torch themselves, on the way through a whole script.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    tiny.tiny_prompts(24).to_json(str(folder / "prompts.jsonl"))
    texts = tiny.tiny_prompts(40)["prompt"]
    pairs = [{"chosen": f"good {text}", "rejected": f"bad {text}"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    return {"folder": folder, **tiny.save_tiny(folder)}


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


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
    script("reward").main(flags(**data, **REWARD))
    return output


def test_reward_saves_a_model_metrics_and_a_picture(reward_run):
    model = AutoModelForSequenceClassification.from_pretrained(reward_run)
    assert model.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(reward_run).get_vocab() == tiny.tiny_tokenizer().get_vocab()
    metrics = json.loads((reward_run / "metrics.json").read_text())
    assert metrics["eval_pairs"] == 4  # a tenth of 40
    assert metrics["eval_accuracy_low"] <= metrics["eval_accuracy"] <= metrics["eval_accuracy_high"]
    assert (reward_run / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_takes_the_reward_model_of_reward_py(paths, reward_run, critic, capsys):
    output = paths["folder"] / f"ppo-{critic}"
    script("ppo").main(ppo_flags(paths, reward_run, output_dir=output, critic=critic))
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    assert (output / "critic").is_dir()
    metrics = json.loads((output / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert (before["step"], after["step"]) == (0, 2)
    rise = after["eval_reward/score"] - before["eval_reward/score"]
    assert after["eval_reward/rise"] == pytest.approx(rise, abs=1e-6)
    assert before["eval_kl/ref"] == pytest.approx(0, abs=1e-5)
    assert (output / "curves.png").stat().st_size > 10_000
    table = (output / "samples.md").read_text().splitlines()
    assert table[0] == "| prompt | before | score | after | score |"
    assert len(table) == 2 + 3  # 3 of 24 prompts are held out
    printed = capsys.readouterr().out
    assert "Held-out score:" in printed
    assert "step 1/2  reward" in printed


def test_ppo_trains_an_adapter(paths, reward_run):
    output = paths["folder"] / "ppo-lora"
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    script("ppo").main(ppo_flags(paths, reward_run, output_dir=output) + lora)
    assert (output / "adapter_config.json").exists()


def test_scripts_run_on_the_embedded_data_without_a_dataset(paths, monkeypatch):
    from trl_ext import embedded

    rows = [{"text": f"good film {i} and bird and cat", "rating": i % 5 - 2.0, "source": str(i)} for i in range(200)]
    monkeypatch.setattr(embedded, "movie_reviews", lambda: Dataset.from_list(rows))
    monkeypatch.setattr(embedded, "smollm2", lambda: paths["actor"])
    reward, ppo = str(paths["folder"] / "demo-reward"), str(paths["folder"] / "demo-ppo")
    script("reward").main(flags(output_dir=reward, train_size=16, test_size=4, max_steps=2))
    short = {"per_device_train_batch_size": 2, "test_size": 2, "total_episodes": 4, "response_length": 3}
    script("ppo").main(flags(output_dir=ppo, reward_model_path=reward, **short))
    assert (Path(reward) / "metrics.json").exists()
    assert (Path(ppo) / "metrics.json").exists()


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_help_of_a_script_is_readable_and_its_file_short(name, capsys):
    with pytest.raises(SystemExit) as end:
        script(name).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "python scripts/" in text
    assert max(map(len, text.splitlines())) <= 230
    assert len((ROOT / "scripts" / f"{name}.py").read_text().splitlines()) < 120


RECIPES = sorted((ROOT / "configs" / "reward").glob("*.yaml")) + sorted((ROOT / "configs" / "ppo").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_is_accepted(path):
    from trl import RewardConfig

    from trl_ext import PPOConfigX
    from trl_ext.cli import ModelArguments, parse

    module = script(path.parent.name)
    classes = {"reward": ("RewardArguments", RewardConfig), "ppo": ("PPOArguments", PPOConfigX)}[path.parent.name]
    data, _, args = parse((getattr(module, classes[0]), ModelArguments, classes[1]), "", path, ["--config", str(path)])
    assert data.dataset_name is None
    assert args.output_dir.startswith("outputs/")


def test_the_documents_recipe_holds_the_documents_numbers_and_loss():
    from trl_ext import PPOConfigX
    from trl_ext.cli import ModelArguments, parse

    path = ROOT / "configs" / "ppo" / "documents.yaml"
    _, _, args = parse((script("ppo").PPOArguments, ModelArguments, PPOConfigX), "", path, [])
    assert (args.cliprange, args.gamma, args.lam, args.vf_coef, args.ent_coef) == (0.2, 0.99, 0.95, 0.5, 0.01)
    assert (args.kl_placement, args.kl_estimator, args.kl_band) == ("loss", "k2", [0.5, 2.0])
    assert (args.whiten_advantages, args.cliprange_value) == (False, None)
