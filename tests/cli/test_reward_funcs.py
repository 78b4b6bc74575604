"""`--reward_funcs`: functions by name, with a reward model and without, in `trl-ext ppo` and its dry run."""

import importlib.util
import json
import re

import pytest

from cli_runs import error_of, flags, run_of
from trl_ext.cli.main import main
from trl_ext.cli.models import reward_functions


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

FUNCTIONS = """
limit = 3

class Kind: ...

def short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]

def right(completions, **kwargs):
    return [1.5] * len(completions)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def short(:")
    # No test needs what the mathematics of TRL's own functions need.
    find = importlib.util.find_spec
    absent = {"math_verify"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in absent else find(name, *args))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_judge(paths, **options):
    arguments = run_of("ppo", paths, **options)
    at = arguments.index("--reward_model_path")
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize("with_model", [False, True])
def test_run_learns_from_functions_and_logs_each(folder, paths, with_model):
    options = {"output_dir": "out", "total_episodes": 8, "per_device_train_batch_size": 8, "test_size": 4}
    arguments = run_of("ppo", paths, **options) if with_model else without_judge(paths, **options)
    main(["ppo", *arguments, "--reward_funcs", "my_own_rewards.short", "my_own_rewards.right"])
    metrics = json.loads((folder / "out/metrics.json").read_text())
    after = metrics["after"]
    found = {name.split("/")[1] for name in after if name.startswith("eval_rewards/")}
    assert found == {"short", "right"} | ({"reward_model"} if with_model else set())
    assert after["eval_rewards/short/mean"] < 0
    assert after["eval_rewards/right/mean"] == 1.5


def test_name_without_a_dot_is_one_of_trls():
    assert [f.__name__ for f in reward_functions(["think_format_reward"])] == ["think_format_reward"]


def test_dry_run_plans_without_a_reward_model(folder, paths, capsys):
    size = flags(per_device_train_batch_size=4, total_episodes=8)
    functions = ["--reward_funcs", "my_own_rewards.short"]
    main(["ppo", *without_judge(paths, output_dir="out"), *size, *functions, "--dry_run", "--gpu", "a100-80gb"])
    said = capsys.readouterr().out
    assert "It fits" in said
    assert "reward model" not in said.lower().split("this was a dry run")[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_own_rewards.long", "`--reward_funcs my_own_rewards.long` leads to no function: AttributeError: .*'long'"),
        (
            "nowhere.short",
            "`--reward_funcs nowhere.short` leads to no function: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("short", "`--reward_funcs short` leads to no function: .*`trl.rewards`, such as `accuracy_reward`"),
        ("my_own_rewards.limit", "`--reward_funcs my_own_rewards.limit` is no function, but of type int"),
        ("my_own_rewards.Kind", "`--reward_funcs my_own_rewards.Kind` is no function, but of type type"),
        ("broken.short", "`--reward_funcs broken.short` leads to no function: SyntaxError"),
        ("..short", "`--reward_funcs ..short` leads to no function: TypeError"),
        ("accuracy_reward", "`--reward_funcs accuracy_reward` needs math_verify: `pip install math-verify`"),
    ],
)
def test_name_that_leads_to_no_function_is_refused(folder, paths, capsys, name, words):
    said = error_of(["ppo", *without_judge(paths, output_dir="out"), "--reward_funcs", name], capsys)
    assert re.search(words, said.replace("\n", " ")), said
