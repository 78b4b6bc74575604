"""Which of default, recipe and flag holds, and what a value or an option that cannot be is told."""

import os
from contextlib import nullcontext

import pytest
import torch

from cli_runs import Toy, toy_run
from commands import command
from trl_ext.cli.main import main
from trl_ext.cli.models import ModelArguments


def test_flag_beats_recipe_beats_default(recipe, demo):
    path = recipe("size: 2\nrate: 0.25\nlearning_rate: 5e-5\nseed: 7\n")
    toy, _, _, args = toy_run(["--config", path, "--size", "3", "--seed=9"], demo, {"logging_steps": 4, "seed": 1})
    assert (toy.size, toy.rate, args.learning_rate, args.seed, args.logging_steps) == (3, 0.25, 5e-5, 9, 4)
    assert args.output_dir != "from-demo"
    path = recipe("size: 2\n")
    for words in (["--size", "3", f"--config={path}"], [f"--config={path}", "--size", "3"]):
        assert toy_run(words, demo)[0] == Toy(size=3)


@pytest.mark.parametrize(
    "text, words, refused",
    [
        ("lam: 0.95\nlam_alpha: 0.5\n", [], True),
        ("lam_alpha: 0.5\n", ["--lam", "0.95"], True),
        ("lam: 0.95\n", ["--lam_alpha", "0.5"], True),
        ("lam_alpha: 0.5\n", [], False),
        ("lam: 0.95\n", [], False),
    ],
)
def test_lam_of_the_default_is_noticed_where_it_is_written(recipe, tmp_path, text, words, refused):
    given = command("ppo").COMMAND.options(["--config", recipe(text), "--output_dir", str(tmp_path), *words])
    with pytest.raises(ValueError, match=r"`lam=0\.95` and `lam_alpha=0\.5` both") if refused else nullcontext():
        given.make()


def test_demo_recipe_is_read_for_the_embedded_data_only(recipe, demo):
    for words, is_read in (
        ([], True),
        (["--model", "mine"], True),
        (["--dataset_name", "mine"], False),
        (["--datasets", "mine"], False),
        (["--config", recipe("size: 2")], False),
    ):
        assert (toy_run(words, demo)[3].output_dir == "from-demo") is is_read


def test_model_has_a_short_name_in_the_recipe_and_as_a_flag(recipe, demo):
    for key in ("model", "model_name_or_path"):
        for words in (["--config", recipe(f"{key}: mine\n")], [f"--{key}", "mine"]):
            assert toy_run(words, demo)[2].model_name_or_path == "mine"


def test_unknown_options_are_errors(recipe, demo):
    with pytest.raises(ValueError, match=r"recipe\.yaml: there is no option `learning_rat`; did you mean `learning_r"):
        toy_run(["--config", recipe("learning_rat: 1\n")], demo)
    with pytest.raises(ValueError, match="no option `--learning_rat`; did you mean `--learning_rate`"):
        toy_run(["--learning_rat", "1"], demo)  # argparse would complete the abbreviation
    with pytest.raises(ValueError, match="holds a list, whose first item is `- size`; it must hold"):
        toy_run(["--config", recipe("- size\n")], demo)


def test_recipe_values_keep_their_types(recipe, demo):
    path = recipe("names: [a, b]\nrate: 1e-2\ndataset_name: null\nuse_cpu: true\n")
    toy, data, _, args = toy_run(["--config", path], demo)
    assert (toy.names, toy.rate, data.dataset_name, args.use_cpu) == (["a", "b"], 0.01, None, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta: null", "`beta` is None; it must be a number."),
        ("beta: [0.1]", r"`beta` is \[0.1\]; it must be a number."),
        ("max_steps: 2.5", "`max_steps` is 2.5; it must be a whole number."),
        ("dtype: float23", "`dtype` is 'float23'; it must be one of auto"),
        ("model: a\nmodel_name_or_path: b", "gives `model_name_or_path` twice"),
        ("config: other.yaml", "there is no option `config`"),
        ("no_dataloader_pin_memory: true", "there is no option `no_dataloader_pin_memory`"),
    ],
)
def test_recipe_value_that_a_flag_would_refuse_is_refused(line, said, tmp_path):
    (tmp_path / "r.yaml").write_text(line + "\n")
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(["dpo", "--config", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize("columns", ["prompt=question chosen=good", "{prompt: question, chosen: good}"])
def test_columns_of_a_recipe_may_be_a_line_or_a_mapping(columns, tmp_path):
    (tmp_path / "r.yaml").write_text(f"columns: {columns}\n")
    assert command("dpo").COMMAND.options(["--config", str(tmp_path / "r.yaml")]).columns == [
        "prompt=question",
        "chosen=good",
    ]


def test_a_recipe_sets_the_environment(recipe, demo, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TEST", "before")
    toy_run(["--config", recipe("env: {TRL_EXT_TEST: 3}\nsize: 2\n")], demo)
    assert os.environ["TRL_EXT_TEST"] == "3"


def test_dtype_follows_the_device(demo, monkeypatch):
    _, _, model, args = toy_run([], demo)
    assert (args.bf16, model.init_kwargs()["dtype"]) == (False, "float32")
    assert toy_run(["--bf16", "true", "--use_cpu"], demo)[3].bf16  # what was asked for stays
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model = toy_run(["--use_peft", "--use_cpu"], demo)[2]
    assert (model.init_kwargs()["dtype"], model.init_kwargs(use_cpu=True)["dtype"]) == ("bfloat16", "float32")
    assert ModelArguments().init_kwargs()["dtype"] == "float32"  # weights that are trained in full
    assert ModelArguments(dtype="float16").init_kwargs()["dtype"] == "float16"
    assert not toy_run(["--use_cpu"], demo)[3].bf16


def help_text(argv, demo, capsys):
    with pytest.raises(SystemExit) as end:
        toy_run(argv, demo)
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
