"""
Count the stops of two things on their way through PPO: a prompt, from the data loader to the optimizer's first step,
and the constructor's `args`.

    python tests/stops.py             # of the working tree
    python tests/stops.py --list      # and name them, in the order in which they are first called

A stop is a function or method of the package, by name, counted once however often it is called; a room is a file. A
prompt stops where its token ids or text are handed in, by themselves or in a rollout, and something is handed on: ids,
a tensor or a rollout. What only looks, as a check or a metric does, is no stop. `args` stop wherever they are handed
in, their own methods and computed fields included.
"""

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
PACKAGE = str(ROOT / "trl_ext") + "/"

PROMPT = "hello world again"


def holds(value: Any, is_it: Callable[[Any], bool], depth: int = 4) -> bool:
    """Return whether a value is what is looked for, or holds it in a list, dictionary or dataclass."""
    if is_it(value):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        return any(holds(each, is_it, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return any(holds(each, is_it, depth - 1) for each in value[:8])
    if is_dataclass(value) and not isinstance(value, type):
        return any(holds(getattr(value, field.name, None), is_it, depth - 1) for field in fields(value))
    return False


@contextmanager
def watching(
    is_it: Callable[[Any], bool], goes_on: Callable[[Any], bool] = lambda result: True
) -> Iterator[list[tuple[str, str]]]:
    """
    Within the context, the functions (file, name) that are handed what `is_it` knows, and return what `goes_on` knows,
    in the list that it yields when it ends.
    """
    handed_to: dict[tuple[str, str], bool] = {}  # and whether something was handed on

    def look(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE) or "<" in code.co_name:
            return
        stop = code.co_filename.removeprefix(PACKAGE), code.co_qualname
        if event == "call" and stop not in handed_to:
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
            if any(holds(frame.f_locals[name], is_it) for name in code.co_varnames[:count]):
                handed_to[stop] = False
        elif event == "return" and handed_to.get(stop) is False:
            handed_to[stop] = holds(result, goes_on)

    stops: list[tuple[str, str]] = []
    sys.setprofile(look)
    try:
        yield stops
    finally:
        sys.setprofile(None)
        stops += [stop for stop, is_handed_on in handed_to.items() if is_handed_on]


def count() -> dict[str, list[tuple[str, str]]]:
    """Return the stops of a prompt and of `args` in a run of one optimizer step."""
    import tiny
    from trl_ext import PPOConfigX, PPOTrainerX

    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]

    def is_prompt(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.dim() == 2 and not value.is_floating_point() and has_ids(value.tolist()[0])
        return (isinstance(value, str) and PROMPT in value) or (isinstance(value, list) and has_ids(value))

    def has_ids(row: list[Any]) -> bool:
        return any(row[start : start + len(ids)] == ids for start in range(len(row) - len(ids) + 1))

    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 2, "response_length": 4, "max_steps": 1, "report_to": "none"}
        quiet = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
        args = PPOConfigX(output_dir=folder, gradient_accumulation_steps=1, num_ppo_epochs=1, **options, **quiet)
        with watching(lambda value: isinstance(value, PPOConfigX)) as of_args:
            trainer = PPOTrainerX(
                args,
                processing_class=tokenizer,
                model=tiny.tiny_actor(),
                reward_model=tiny.tiny_reward_model(),
                train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 4}),
            )
        with watching(
            is_prompt, goes_on=lambda result: isinstance(result, torch.Tensor) or is_prompt(result)
        ) as of_prompt:
            trainer.train()
    return {"a prompt": of_prompt, "args": of_args}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the stops")
    shown = parser.parse_args()
    for what, stops in count().items():
        print(f"{what}: {len(stops)} stops in {len({file for file, _ in stops})} rooms")
        if shown.list:
            print("\n".join(f"    {file}: {name}" for file, name in stops))
