"""Find the functions of `--reward_funcs`, and try them on a sample, before a model is loaded."""

import ast
import asyncio
import difflib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerState
from trl import is_conversational

from .._trl import get_callable_name
from ..ppo.data import READ, prompt_ids
from ..ppo.roles.reward_calls import patient
from ..ppo.roles.reward_functions import check_rewards, check_signature
from ..runs.failures import RunError


# Values of the arguments that TRL's makers of reward functions need, as examples.
OF_TRL = {"max_completion_len": 256, "soft_punish_cache": 64, "ngram_size": 3, "max_penalty": -1.0}
# Two answers, so that a function that gives one number for all of them is seen.
ANSWERS = ("The answer is 4.", "I do not know.")
WAYS = (
    "Write `--reward_funcs my_rewards.py:right`, the function `right` of a file; `--reward_funcs my_rewards.right`, "
    "of a module that Python finds from this folder; or a name in `trl.rewards`, `--reward_funcs accuracy_reward`."
)


def reward_functions(names: Sequence[str]) -> list[Callable]:
    """
    Return reward functions by their names: `my_rewards.right` of `my_rewards.py` in this folder or of an installed
    module, `path/to/file.py:right`, or a name in `trl.rewards`.

    Raises:
        ValueError: for a name that leads to no function, or to one of TRL's that makes reward functions.
    """
    found = []
    for name in names:
        if name.endswith(".py"):
            known = _functions_in(Path(name))
            first, *others = known or ["FUNCTION"]
            more = f" The file has {', '.join(others)} too." if others else ""
            raise ValueError(
                f"`--reward_funcs {name}` names no function of the file: write `--reward_funcs {name}:{first}`.{more}"
            )
        place, _, attribute = name.rpartition(":" if ":" in name else ".")
        try:
            function = getattr(_module(place or "trl.rewards"), attribute)
        except Exception as error:  # whatever the user's module does when it is imported
            raise ValueError(
                f"`--reward_funcs {name}` leads to no function: {_reason(error, place, attribute)}"
            ) from error
        home = getattr(function, "__module__", "")
        if home.startswith("trl.rewards") and attribute.startswith("get_"):
            needed = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
            given = ", ".join(f"{each.name}={OF_TRL.get(each.name, '…')}" for each in needed)
            raise ValueError(
                f"`--reward_funcs {name}` makes a reward function and is none. Call it in a file of your own: `echo "
                f'"from trl.rewards import {attribute}; mine = {attribute}({given})" > made_rewards.py`, and give '
                "`--reward_funcs made_rewards.py:mine`."
            )
        if not callable(function) or isinstance(function, type):
            there = ", ".join(_functions_of(_module(place or "trl.rewards"))) or "none"
            raise ValueError(
                f"`--reward_funcs {name}` is no function, but of type {type(function).__name__}. Functions there: "
                f"{there}."
            )
        if home == "trl.rewards.accuracy_rewards" and importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"`--reward_funcs {name}` needs math_verify: `pip install math-verify`.")
        found.append(function)
    return found


def _reason(error: Exception, place: str, attribute: str) -> str:
    """Return why a name led to no function, and what would."""
    module = sys.modules.get(str(Path(place).resolve()) if place.endswith(".py") else place)
    if isinstance(error, AttributeError) and module is not None:
        known = _functions_of(module)
        near = difflib.get_close_matches(attribute, known, n=1)
        written = f"`--reward_funcs {place}{':' if place.endswith('.py') else '.'}{(near or known or ['NAME'])[0]}`"
        way = f"Did you mean {written}?" if near else f"It has {', '.join(known) or 'none'}. Write {written}, say."
        return f"{place!r} has no {attribute!r}. {way}"
    if not place:
        return f"trl.rewards has no {attribute!r}. {WAYS}"
    if isinstance(error, FileNotFoundError) and error.errno is None:  # `_module`'s
        files = [each.name for each in Path(place).parent.glob("*.py")]
        near = difflib.get_close_matches(Path(place).name, files, n=1, cutoff=0.8)
        meant = f"Did you mean `--reward_funcs {Path(place).with_name(near[0])}:{attribute}`?" if near else WAYS
        return f"{error}. {meant}"
    if isinstance(error, TypeError) or (isinstance(error, ImportError) and f"{place}.".startswith(f"{error.name}.")):
        return f"{type(error).__name__}: {error}. {WAYS}"
    return f"importing {place} fails with {type(error).__name__}: {error}. Mend the file, or install what it needs."


def _functions_of(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value)]


def _functions_in(path: Path) -> list[str]:
    """Return the functions that a file defines, without running it; none if it cannot be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _module(place: str) -> ModuleType:
    """Import a module by its dotted name, the current folder's first, or by its file, once."""
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {place!r}")
    name = str(path)  # under its own name it could hide an installed module
    if name not in sys.modules:
        if str(path.parent) not in sys.path:  # for what it imports from beside it
            sys.path.append(str(path.parent))
        spec: Any = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _hint(error: Exception, is_chat: bool) -> str:
    """Return what to change: how completions look, where the function may have taken them for something else."""
    if not isinstance(error, AttributeError | LookupError | TypeError):
        return "A model may answer anything: return a reward, or `None` where it does not apply."
    if is_chat:
        return (
            "The prompts are conversations, so each of `completions` is a list of messages: the text of an answer is "
            "`completion[-1]['content']`."
        )
    return (
        "The prompts are text, so each of `completions` is a string; with `--apply_chat_template` it is a list of "
        "messages. A model may answer anything: return a reward, or `None` where it does not apply."
    )


def try_on(functions: Sequence[Callable], row: dict[str, Any], tokenizer: Any, args: Any) -> None:
    """
    Ask each function about two made-up answers to the prompt of a row, with its other columns, as a run would. Of one
    that gives both the same reward, where prompts are conversations, a line on stderr says what completions are.

    Raises:
        ValueError: for a function that needs a column that there is not, raises an error, or returns anything but
            rewards.
    """
    try:
        ids = prompt_ids(row, tokenizer, args.chat_template_kwargs or {}, tokenizer.pad_token_id)
    except Exception:  # what is wrong with such a prompt, the trainer says for all of them
        ids = []
    if not ids:
        return
    prompt = row["prompt"] if "prompt" in row else tokenizer.decode(ids, skip_special_tokens=True)
    is_chat = is_conversational({"prompt": prompt})
    others = {name: [value] * len(ANSWERS) for name, value in row.items() if name not in ("prompt", *READ)}
    inputs = others | {
        "prompts": [prompt] * len(ANSWERS),
        "completions": [[{"role": "assistant", "content": text}] if is_chat else text for text in ANSWERS],
        "completion_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS],
        "prompt_ids": [ids] * len(ANSWERS),
        "trainer_state": TrainerState(max_steps=1),
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }
    for function in functions:
        name = get_callable_name(function)
        check_signature(function, name, inputs)
        try:
            answer = patient(function, name, args)(**inputs)
            answer = asyncio.run(answer) if inspect.iscoroutine(answer) else answer
        except Exception as error:  # whatever the user's function does
            cause = (error.__cause__ or error) if isinstance(error, RunError) else error  # its own line
            last = traceback.extract_tb(cause.__traceback__)[-1]
            file = os.path.relpath(last.filename)
            file = last.filename if file.startswith("..") else file
            raise ValueError(
                f"The reward function {name!r} fails on an answer to the first prompt, {ANSWERS[0]!r}: "
                f"{type(error).__name__}: {error} ({file}, line {last.lineno}). {_hint(error, is_chat)}"
            ) from error
        try:
            rewards = check_rewards(answer, name, inputs)
        except FloatingPointError as error:  # which ends a run; here nothing has begun
            raise ValueError(str(error)) from error
        is_first = int(os.environ.get("RANK", 0)) == 0
        first, second = rewards
        if is_chat and is_first and isinstance(first, float) and first == second and not _is_of_trl(function):
            print(_note_on_one_reward(name, first), file=sys.stderr)


def _is_of_trl(function: Callable) -> bool:
    """Return whether a function is one of TRL's, which read messages."""
    return getattr(function, "__module__", "").startswith("trl.rewards")


def _note_on_one_reward(name: str, reward: Any) -> str:
    given = " and ".join(f"{text!r} ({len(text)} characters)" for text in ANSWERS)
    return (
        f"The reward function {name!r} gives two made-up answers, {given}, the same reward, {reward}. That is right "
        "if it looks for something that neither has. The prompts are conversations, so each of `completions` is a "
        "list of messages, of which `len(completion)` counts 1: the text of an answer is `completion[-1]['content']`."
    )
