"""The Python examples of README and docs run as they stand, on tiny models in the places that they name."""

from pathlib import Path

import pytest

import tiny
from doc_examples import examples, run
from ppo_runs import ppo_config


pytestmark = pytest.mark.integration


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
