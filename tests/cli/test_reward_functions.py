"""`--reward_funcs`: functions by name, with a reward model and without, tried on a sample before a model is loaded."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from cli_runs import error_of, flags, run_of
from trl_ext.cli.commands import ppo
from trl_ext.cli.main import main
from trl_ext.cli.reward_functions import reward_functions, try_on
from trl_ext.report.run import read_run


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

FUNCTIONS = """
from beside import limit

class Kind: ...

def short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]

def right(completions, **kwargs):
    return [1.5] * len(completions)

def graded(completions, grade, **kwargs):
    return grade

def chat(completions, **kwargs):
    return [len(messages[0]["content"]) for messages in completions]

def quiet(completions, **kwargs):
    return [float(completion.islower()) for completion in completions]

def mean(completions, **kwargs):
    return [0.5]

def endless(completions, **kwargs):
    return [float("inf")] * len(completions)

def tokens(completion_ids, prompt_ids, **kwargs):
    return [[0.1] * len(ids) for ids in completion_ids]

def watched(prompts, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("share", trainer_state.global_step / trainer_state.max_steps)
    log_extra("prompt", prompts)
    return [None] * len(prompts)

async def later(completions, **kwargs):
    return [0.0] * len(completions)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    for place in (tmp_path, tmp_path / "rewards"):
        (place / "beside.py").write_text("limit = 3\n")
    (tmp_path / "my_own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "rewards" / "json.py").write_text(FUNCTIONS)  # the name of a module of Python's
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
def test_run_learns_from_functions_by_their_weights_and_logs_each(folder, paths, capsys, with_model):
    options = {"output_dir": "out", "total_episodes": 8, "per_device_train_batch_size": 8, "test_size": 4}
    arguments = run_of("ppo", paths, **options) if with_model else without_judge(paths, **options)
    weights = ["0.25", "0.5", "2.0"][0 if with_model else 1 :]
    functions = ["--reward_funcs", "my_own_rewards.short", "rewards/json.py:right", "--reward_weights", *weights]
    main(["ppo", *arguments, *functions])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Alarm: ")]
    assert said == [f"Alarm: {alarm}." for alarm in read_run("out").alarms]
    assert said[-1].startswith("Alarm: `completions/clipped_ratio` is ")
    after = json.loads((folder / "out/metrics.json").read_text())["after"]
    found = {name.split("/")[1]: after[name] for name in after if re.fullmatch("eval_rewards/.*/mean", name)}
    names = [*(["reward_model"] if with_model else []), "short", "right"]
    assert set(found) == set(names)
    assert found["short"] < 0
    assert found["right"] == 1.5
    weighted = sum(float(weight) * found[name] for weight, name in zip(weights, names, strict=True))
    assert after["eval_reward/score"] == pytest.approx(weighted, rel=1e-5)


def test_name_without_a_dot_is_one_of_trls():
    assert [f.__name__ for f in reward_functions(["think_format_reward"])] == ["think_format_reward"]


def test_file_is_imported_once_and_hides_no_module(folder):
    first, second = (reward_functions(["rewards/json.py:right"])[0] for _ in range(2))
    assert first is second
    assert first([""]) == [1.5]
    assert importlib.import_module("json").loads("1") == 1


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
        (
            "my_own_rewards.long",
            "`--reward_funcs my_own_rewards.long` leads to no function: 'my_own_rewards' has no 'long'",
        ),
        (
            "nowhere.short",
            "`--reward_funcs nowhere.short` leads to no function: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("short", "`--reward_funcs short` leads to no function: .*`trl.rewards`, `--reward_funcs accuracy_reward`"),
        ("my_own_rewards.limit", "`--reward_funcs my_own_rewards.limit` is no function, but of type int"),
        ("my_own_rewards.Kind", "`--reward_funcs my_own_rewards.Kind` is no function, but of type type"),
        (
            "broken.short",
            "`--reward_funcs broken.short` leads to no function: importing broken fails with SyntaxError",
        ),
        ("broken.py:short", "leads to no function: importing broken.py fails with SyntaxError: "),
        (
            "none.py:short",
            "leads to no function: .* no file 'none.py'. Write `--reward_funcs my_rewards.py:right`",
        ),
        ("..short", "`--reward_funcs ..short` leads to no function: TypeError"),
        ("accuracy_reward", "`--reward_funcs accuracy_reward` needs math_verify: `pip install math-verify`"),
        (
            "get_soft_overlong_punishment",
            "Call it in a file of your own: `echo .*mine = get_soft_overlong_pun",
        ),
    ],
)
def test_name_that_leads_to_no_function_is_refused(folder, name, words):
    with pytest.raises(ValueError, match=words):
        reward_functions([name])


ROW = {"prompt": "good film", "grades": 3, "answer": "4"}
CHAT = {"prompt": [{"role": "user", "content": "good film"}]}
UNLIMITED = {"reward_timeout": None, "reward_max_retries": 0, "reward_max_concurrency": None}
ARGS = SimpleNamespace(chat_template_kwargs=None, **UNLIMITED)


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        (
            ROW,
            "graded",
            "it needs 'grade', and the dataset has no such column; it has grades, answer.*`--columns grade=gr",
        ),
        (
            ROW,
            "chat",
            r"'chat' fails on an answer .*: TypeError: string indices .*my_own_rewards.py, line 16.*"
            "each of `completions` is a string",
        ),
        (ROW, "quiet", None),
        (CHAT, "quiet", r"each of `completions` is a list of messages: the text .*`completion\[-1\]\['content'\]`"),
        (CHAT, "short", None),
        (CHAT, "chat", None),
        (ROW, "mean", "'mean' returned 1 rewards, but 2 were expected"),
        (ROW, "endless", "'endless' is inf"),
        *((ROW, name, None) for name in ("short", "tokens", "watched", "later")),
        (ROW | {"grade": 2.0}, "graded", None),
        ({"input_ids": [3, 4], "answer": "4"}, "tokens", None),
        ({"prompt": ""}, "endless", None),  # of which the trainer says what is wrong
    ],
)
def test_function_is_tried_on_two_answers_to_a_prompt(folder, row, name, words):
    functions, tokenizer = reward_functions([f"my_own_rewards.py:{name}"]), tiny.tiny_tokenizer()
    if words is None:
        try_on(functions, row, tokenizer, ARGS)
    else:
        with pytest.raises(ValueError, match=words):
            try_on(functions, row, tokenizer, ARGS)


@pytest.mark.parametrize(
    ("row", "name", "is_said"),
    [
        (CHAT, "short", True),
        (CHAT, "right", True),
        (CHAT, "chat", False),
        (CHAT, "watched", False),
        (CHAT, "tokens", False),
        (ROW, "right", False),
        (CHAT, "think_format_reward", False),
    ],
)
def test_one_reward_for_both_answers_of_a_chat_is_noted(folder, capsys, row, name, is_said):
    names = [name if name.startswith("think") else f"my_own_rewards.py:{name}"]
    try_on(reward_functions(names), row, tiny.tiny_tokenizer(), ARGS)
    said = capsys.readouterr().err
    assert ("'The answer is 4.' (16 characters)" in said) == is_said
    assert (f"The reward function {name!r} gives" in said) == is_said
    assert ("`completion[-1]['content']`" in said) == is_said


def test_trial_waits_no_longer_than_the_run_would(folder):
    Path("late.py").write_text("import time\n\ndef late(**kwargs):\n    time.sleep(0.5)\n", encoding="utf-8")
    args = SimpleNamespace(chat_template_kwargs=None, **UNLIMITED | {"reward_timeout": 0.05})
    with pytest.raises(ValueError, match=r"'late' fails on an answer .* no answer within 0\.05 s"):
        try_on(reward_functions(["late.py:late"]), ROW, tiny.tiny_tokenizer(), args)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--reward_funcs my_own_rewards.mean", "'mean' returned 1 rewards"),
        ("--reward_funcs my_own_rewards.mean --dry_run", "'mean' returned 1 rewards"),
        ("--reward_funcs nowhere.short --dataset_name missing.jsonl", "`--reward_funcs nowhere.short` leads to no"),
        ("", "There is no reward at all: give `--reward_model_path FOLDER`, the output folder of `trl-ext reward`"),
    ],
)
def test_command_refuses_it_before_a_model_is_loaded(folder, paths, capsys, monkeypatch, more, words):
    monkeypatch.setattr(ppo, "PPOTrainerX", lambda *_, **__: pytest.fail("loads models"))
    assert words in error_of(["ppo", *without_judge(paths, output_dir="out"), *more.split()], capsys)


def test_weights_are_counted_before_a_model_is_loaded(folder, paths, capsys):
    more = ["--reward_funcs", "my_own_rewards.short", "--reward_weights", "1", "2", "3"]
    said = error_of(["ppo", *run_of("ppo", paths, output_dir="out"), *more], capsys)
    assert (
        "`--reward_weights` has 3 numbers for 2 rewards. Give one for each, such as `--reward_weights 1.0 1.0`, in "
        "this order: the reward model, short." in said
    )
