"""The scripts' command line: which of default, recipe and flag holds, and what an unknown option does."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import RewardConfig

from trl_ext.cli.data import DataArguments, load_rows, load_splits
from trl_ext.cli.models import ModelArguments
from trl_ext.cli.options import read
from trl_ext.conversions import to_prompts


@dataclass
class Toy:
    """A toy's"""

    size: int = field(default=1, metadata={"help": "A size."})
    rate: float = field(default=0.5, metadata={"help": "A rate, 50% at first."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names."})


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


def run(argv, demo, defaults=None):
    return read("", (Toy, DataArguments, ModelArguments, RewardConfig), "A toy.", argv, demo, defaults).make()


def test_flag_beats_recipe_beats_default(recipe, demo):
    path = recipe("size: 2\nrate: 0.25\nlearning_rate: 5e-5\nseed: 7\n")
    toy, _, _, args = run(["--config", path, "--size", "3", "--seed=9"], demo, {"logging_steps": 4, "seed": 1})
    assert (toy.size, toy.rate, args.learning_rate, args.seed, args.logging_steps) == (3, 0.25, 5e-5, 9, 4)
    assert args.output_dir != "from-demo"


def test_order_of_flags_and_recipe_does_not_matter(recipe, demo):
    path = recipe("size: 2\n")
    first, second = run(["--size", "3", f"--config={path}"], demo), run([f"--config={path}", "--size", "3"], demo)
    assert first[0] == second[0] == Toy(size=3)


def test_demo_recipe_is_read_for_the_embedded_data_only(recipe, demo):
    assert run([], demo)[3].output_dir == "from-demo"
    assert run(["--model", "mine"], demo)[3].output_dir == "from-demo"
    assert run(["--dataset_name", "mine"], demo)[3].output_dir != "from-demo"
    assert run(["--config", recipe("size: 2")], demo)[3].output_dir != "from-demo"


@pytest.mark.parametrize("key", ["model", "model_name_or_path"])
def test_model_has_a_short_name_in_the_recipe_and_as_a_flag(recipe, demo, key):
    assert run(["--config", recipe(f"{key}: mine\n")], demo)[2].model_name_or_path == "mine"
    assert run([f"--{key}", "mine"], demo)[2].model_name_or_path == "mine"


def test_unknown_options_are_errors(recipe, demo):
    with pytest.raises(
        ValueError, match=r"recipe\.yaml: there is no option `learning_rat`; did you mean `learning_rate`"
    ):
        run(["--config", recipe("learning_rat: 1\n")], demo)
    with pytest.raises(ValueError, match="no option `--learning_rat`; did you mean `--learning_rate`"):
        run(["--learning_rat", "1"], demo)  # argparse would complete the abbreviation
    with pytest.raises(ValueError, match="holds a list; it must hold"):
        run(["--config", recipe("- size\n")], demo)


def test_recipe_values_keep_their_types(recipe, demo):
    path = recipe("names: [a, b]\nrate: 1e-2\ndataset_name: null\nuse_cpu: true\n")
    toy, data, _, args = run(["--config", path], demo)
    assert (toy.names, toy.rate, data.dataset_name, args.use_cpu) == (["a", "b"], 0.01, None, True)


def test_dtype_follows_the_device(demo, monkeypatch):
    _, _, model, args = run([], demo)
    assert (args.bf16, model.init_kwargs()["dtype"]) == (False, "float32")
    assert run(["--bf16", "true", "--use_cpu"], demo)[3].bf16  # what was asked for stays
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model = run(["--use_peft", "--use_cpu"], demo)[2]
    assert (model.init_kwargs()["dtype"], model.init_kwargs(use_cpu=True)["dtype"]) == ("bfloat16", "float32")
    assert ModelArguments().init_kwargs()["dtype"] == "float32"  # weights that are trained in full
    assert ModelArguments(dtype="float16").init_kwargs()["dtype"] == "float16"
    assert not run(["--use_cpu"], demo)[3].bf16


def help_text(argv, demo, capsys):
    with pytest.raises(SystemExit) as end:
        run(argv, demo)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_grouped_and_short_and_help_all_is_complete(demo, capsys):
    short, full = help_text(["--help"], demo, capsys), help_text(["--help_all"], demo, capsys)
    for heading in ("A toy's:", "Data:", "Optimizer:", "Evaluation, saving and logging:"):
        assert heading in short
    assert "--size INT" in short
    assert "50% at first" in short
    assert "from-demo" not in short  # what holds for data of one's own
    assert "(default: from-demo)" in help_text(["--help", "--config", str(demo)], demo, capsys)
    assert "(default: None)" not in short
    assert "--adam_beta1" not in short
    assert "--adam_beta1 FLOAT" in full
    assert "--learning-rate" not in full  # one spelling
    assert short.count("\n") < 150 < full.count("\n") - 150


# --------------------------------------------------------------------------------------------------------------- data


def no_embedded(*_):
    raise AssertionError("the embedded data were asked for")


@pytest.fixture
def rows():
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(20)]})


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_loaded_and_a_tenth_of_it_held_out(rows, tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    getattr(rows, f"to_{kind.removesuffix('l')}")(str(path))
    splits = load_splits(DataArguments(dataset_name=str(path)), no_embedded, to_prompts)
    assert (len(splits["train"]), len(splits["test"])) == (18, 2)
    assert sorted([*splits["train"]["prompt"], *splits["test"]["prompt"]]) == sorted(rows["prompt"])


def test_a_saved_folder_is_loaded_with_its_splits(rows, tmp_path):
    DatasetDict(train=rows, test=rows.select([3])).save_to_disk(str(tmp_path / "both"))
    rows.save_to_disk(str(tmp_path / "one"))
    both = load_splits(
        DataArguments(dataset_name=str(tmp_path / "both"), train_size=5, test_size=99), no_embedded, to_prompts
    )
    assert (both["train"]["prompt"], both["test"]["prompt"]) == ([f"p{i}" for i in range(5)], ["p3"])
    assert len(load_splits(DataArguments(dataset_name=str(tmp_path / "one")), no_embedded, to_prompts)["test"]) == 2


def test_a_missing_split_is_an_error_that_lists_the_splits(rows, tmp_path):
    DatasetDict(training=rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"no split 'train' but \['training'\]"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "rows")), no_embedded, to_prompts)


def test_embedded_data_get_the_sizes(rows):
    def embedded(train_size, test_size):
        return DatasetDict(train=rows.select(range(train_size)), test=rows.select(range(test_size)))

    splits = load_splits(DataArguments(train_size=3, test_size=2), embedded, to_prompts)
    assert (len(splits["train"]), len(splits["test"])) == (3, 2)


def test_a_stream_holds_out_its_first_rows(rows, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    rows.to_json(path)
    args = DataArguments(dataset_name=path, dataset_streaming=True, test_size=2, train_size=3)
    splits = load_splits(args, no_embedded, to_prompts)
    assert [row["prompt"] for row in splits["test"]] == ["p0", "p1"]
    assert [row["prompt"] for row in splits["train"]] == ["p2", "p3", "p4"]
    with pytest.raises(ValueError, match=r"no split 'test' was found: give `--test_size`"):
        load_splits(DataArguments(dataset_name=path, streaming=True), no_embedded, to_prompts)


def test_a_mixture_in_the_recipe_is_loaded_and_split(rows, tmp_path, recipe, demo):
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for file in files:
        rows.to_json(file)
    lines = "".join(f"  - {{path: json, data_files: {file}}}\n" for file in files)
    _, data, *_ = run(["--config", recipe(f"datasets:\n{lines}test_split_size: 0.25\n")], demo)
    splits = load_splits(data, no_embedded, to_prompts)
    assert (len(splits["train"]), len(splits["test"])) == (30, 10)
    again = load_splits(data, no_embedded, to_prompts)
    assert splits["test"]["prompt"] == again["test"]["prompt"]  # as on another rank
    assert run(["--datasets", "mine"], demo)[3].output_dir != "from-demo"


def test_rows_to_score_are_those_of_the_test_split_or_all(rows, tmp_path):
    rows = rows.add_column("chosen", ["yes"] * 20).add_column("rejected", ["no"] * 20)
    rows.to_json(str(tmp_path / "rows.jsonl"))
    DatasetDict(train=rows, test=rows.select([3, 4])).save_to_disk(str(tmp_path / "both"))
    assert len(load_rows(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")))) == 20
    assert load_rows(DataArguments(dataset_name=str(tmp_path / "both"), test_size=1))["prompt"] == ["p3"]
    with pytest.raises(ValueError, match=r"no split 'held' but \['train', 'test'\]"):
        load_rows(
            DataArguments(dataset_name=str(tmp_path / "both"), dataset_test_split="held", dataset_train_split="t")
        )


def test_a_recipe_sets_the_environment(recipe, demo, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TEST", "before")
    run(["--config", recipe("env: {TRL_EXT_TEST: 3}\nsize: 2\n")], demo)
    assert os.environ["TRL_EXT_TEST"] == "3"


# ------------------------------------------------------------------------------------------------------------ recipes


CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path for name in ("reward", "ppo", "dpo") for path in sorted((CONFIGS / name).glob("*.yaml"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_says_what_it_is_for(path):
    head = path.read_text().split("\n\n")[0]
    for entry in ("Hardware:", "Launch:"):
        assert entry in head
    assert "Expected:" in head or "Measured:" in head
    assert "@" not in head
