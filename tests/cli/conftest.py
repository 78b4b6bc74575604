"""
What the tests of the command line share. Warnings that they ignore are of TRL, transformers and torch, on the way
through whole commands.
"""

import pytest
from datasets import Dataset

import tiny


@pytest.fixture(autouse=True)
def _undrawn(undrawn):
    """tests/scripts/test_scripts.py has runs whose reports are drawn."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Tiny models, 40 prompts and 40 pairs."""
    folder = tmp_path_factory.mktemp("command-line")
    texts = tiny.tiny_prompts(40)["prompt"]
    Dataset.from_dict({"prompt": texts}).to_json(str(folder / "prompts.jsonl"))
    pairs = [{"prompt": text, "chosen": " good film", "rejected": " bad film and cat"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    Dataset.from_dict({"prompt": [f"good {i}" for i in range(1200)]}).to_json(str(folder / "many.jsonl"))
    tiny.tiny_actor(max_position_embeddings=4096).save_pretrained(folder / "long")
    tiny.tiny_tokenizer().save_pretrained(folder / "long")
    others = {"many": str(folder / "many.jsonl"), "long": str(folder / "long")}
    return (
        others
        | {"folder": folder, "pairs": str(folder / "pairs.jsonl"), "prompts": str(folder / "prompts.jsonl")}
        | (tiny.save_tiny(folder))
    )


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def demo(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("output_dir: from-demo\nlearning_rate: 1e-3\n")
    return path
