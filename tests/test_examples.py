"""The Python examples of README and docs run as they stand, on tiny models in the places that they name."""

import json
import re
from pathlib import Path

import pytest

import tiny
from ppo import four_roles
from ppo_runs import ppo_config


pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> dict[str, str]:
    """A folder with the files that the examples read, as current directory; their placeholders with what they are."""
    monkeypatch.chdir(tmp_path)
    paths = tiny.save_tiny(tmp_path)
    prompts = tiny.tiny_prompts(16)["prompt"]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    pairs = ({"prompt": prompt, "chosen": " good film", "rejected": " bad film"} for prompt in prompts)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "path/to/sft-model": paths["actor"],
        "path/to/reward-model": paths["reward_model"],
        "path/to/reward-adapter": four_roles.save_adapter(paths["actor"], tmp_path / "reward-adapter", "SEQ_CLS", 1),
        "10_000": "8",  # episodes
    }


def run(example: str, placeholders: dict[str, str], known: dict | None = None) -> dict:
    for placeholder, actual in placeholders.items():
        example = example.replace(placeholder, actual)
    names = dict(known or {})
    exec(compile(example, "example", "exec"), names)
    return names


def test_example_of_the_readme_trains(workplace):
    (example,) = examples("README.md")
    trainer = run(example, workplace)["trainer"]
    assert trainer.state.global_step > 0


def test_example_of_four_roles_trains(workplace):
    trainer = run(examples("docs/ppo.md")[0], workplace)["trainer"]
    assert trainer.state.global_step > 0
    assert Path("outputs/four-roles/critic/adapter_model.safetensors").exists()


def test_first_example_of_the_dpo_page_trains(workplace):
    trainer = run(examples("docs/dpo.md")[0], workplace)["trainer"]
    assert trainer.state.global_step > 0


def test_reward_example_of_the_dpo_page_ranks_and_rewards(workplace, tmp_path):
    models = {"policy": tiny.tiny_actor(1), "reference": tiny.tiny_actor(), "tokenizer": tiny.tiny_tokenizer()}
    known = models | {"args": ppo_config(tmp_path), "prompts": tiny.tiny_prompts(16)}
    names = run(examples("docs/dpo.md")[1], workplace, known)
    names["trainer"].train()
    assert names["trainer"].state.global_step > 0
