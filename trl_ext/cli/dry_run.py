"""Print what a run would be: its batches, its memory, and the first sample as the model reads it."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from trl import DPOTrainer, RewardTrainer

from .. import planner
from .._trl import tokenised_pair
from ..data.pairs import check_columns
from ..models.context import context_limit
from ..models.loading import load_tokenizer, text_config
from ..ppo.config import PPOLoopConfig
from ..ppo.data import check_datasets, prompt_ids
from ..ppo.display import batch_plan, planned_steps, pretraining_plan
from ..ppo.pretraining import responses_to_sample
from ..ppo.roles.inputs import check_given, resolve
from ..runs.checkpoints import checkpoint_of
from ..runs.folder import is_local
from ..runs.requirements import require_writable
from ..runs.steps_left import require_steps_left
from .data import require_steps
from .fit import plan_run
from .launch import deepspeed_file, processes, require_count
from .models import path_of, require_judges, reward_functions
from .options import Options


PAIR_TRAINERS = {"dpo": DPOTrainer, "reward": RewardTrainer}
LOOKED_AT = 1000  # prompts that are tokenised to find the longest


def dry_run(command: str, given: Options, load: Callable[[Any], DatasetDict]) -> None:
    """Print it all; only the tokenizer and the data are loaded, and no file is written."""
    require_count(given)
    # A DeepSpeed file is for the run's processes: it would start their process group here.
    data, model, args = given.make(deepspeed=None)
    checkpoint = checkpoint_of(args.resume_from_checkpoint, args.output_dir)
    require_writable(args.output_dir)
    path, is_adapter = path_of(model, args, command)
    adapter = model.adapter("SEQ_CLS" if command == "reward" else "CAUSAL_LM", is_adapter=is_adapter)
    splits, count = load(data), processes(given)
    rows = splits["train"]
    tokenizer = load_tokenizer(path, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    with as_if_of(count):
        if command in ("ppo", "critic"):
            check_ppo(data, path, adapter, args, splits, tokenizer)
            longest, sample = prompts(rows, tokenizer, args)
        else:
            require_steps(rows, args.max_steps)
            check_columns(rows, splits["test"], lambda: tokenizer)
            longest, sample = None, pair(command, next(iter(rows)), tokenizer, args)
        size = len(rows) if isinstance(rows, Dataset) else None
        if command == "critic":
            held_out = len(splits["test"]) * args.num_generations_eval
            text = pretraining_plan(args, responses_to_sample(args, size), held_out)
        else:
            steps, text = batches(command, args, size, count)
            require_steps_left(checkpoint, steps)
        print(text, end="\n\n")
    options = vars(given.values) | vars(args) | {"deepspeed": deepspeed_file(given)}
    print(memory(command, options, given, count, longest), end="\n\n")
    print(f"{sample}\n\nThis was a dry run: leave out --dry_run to train.")


@contextmanager
def as_if_of(count: int) -> Iterator[None]:
    """Within the context, options count `count` processes, which are not started."""
    state = PartialState()
    before, state.num_processes = state.num_processes, count
    try:
        yield
    finally:
        state.num_processes = before


def check_ppo(data: Any, path: str, adapter: Any, args: Any, splits: DatasetDict, tokenizer: Any) -> None:
    """Raise `PPOTrainerX`'s own errors about prompts and models; a reward model may still have to be trained."""
    judge = args.reward_model_path
    functions = reward_functions(data.reward_funcs)
    roles = {"value_model": data.value_model, "reward_model": judge, "reward_funcs": functions}
    args, given = resolve(args, model=path, peft_config=adapter, **roles)
    if judge is not None and is_local(judge) and not Path(judge).is_dir():
        require_judges(None, data.value_model)
        print(f"The reward model {judge} is not there yet.\n")
    else:
        require_judges(judge, data.value_model)
        check_given(args, given)
    context = context_limit(text_config(given.model, args), generates=True)
    check_datasets(splits["train"], splits["test"], None, tokenizer, context, args, tokenizer.pad_token_id)


def batches(command: str, args: Any, rows: int | None, count: int) -> tuple[int, str]:
    """Return the number of optimizer steps, and the batches in words, as the trainer counts them."""
    if command == "ppo":
        loop = PPOLoopConfig(args)
        return planned_steps(loop, rows), batch_plan(loop, rows)
    per_device, accumulated, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps
    if steps <= 0:
        per_epoch = math.ceil(math.ceil((rows or 0) / (per_device * count)) / accumulated)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    of = f"{rows} pairs" if rows is not None else "a stream of pairs"
    return steps, (
        f"{command.upper()} plan: {per_device * accumulated * count} pairs per optimizer step ({per_device} × "
        f"{accumulated} accumulated × {count} process(es)); {steps} optimizer steps over {of}."
    )


def memory(command: str, options: dict[str, Any], given: Options, count: int, longest: int | None) -> str:
    """Return the memory plan, or why there is none."""
    if command == "critic":
        return "Memory: a critic alone is not planned; it needs less than PPO of the same model."
    if given.gpu is not None:
        machine = planner.hardware(given.gpu, gpus=count)
    elif options["use_cpu"]:
        machine = replace(planner.CPU, memory=planner.this_machine().host_memory, gpus=count)
    else:
        machine = replace(planner.this_machine(), gpus=count)
    try:
        return planner.plan_text(plan_run(command, options, machine, longest))
    except Exception as reason:  # what cannot be planned may still be trained
        return f"Memory: not planned: {reason}"


def prompts(rows: Any, tokenizer: Any, args: Any) -> tuple[int, str]:
    """Return the tokens of the longest of the first prompts, and the first of them in words."""
    first = [row for row, _ in zip(rows, range(LOOKED_AT), strict=False)]
    ids = [prompt_ids(row, tokenizer, args.chat_template_kwargs or {}, tokenizer.pad_token_id) for row in first]
    longest = max(map(len, ids))
    heading = f"The first prompt, as the actor reads it ({longest} tokens in the longest of {len(ids)} looked at):"
    return longest, f"{heading}\n{token_lines({'prompt': ids[0]}, tokenizer)}"


def pair(command: str, row: dict[str, Any], tokenizer: Any, args: Any) -> str:
    """Return the first pair in words."""
    if getattr(args, "chat_template_path", None):
        print("`chat_template_path` is not applied in a dry run.", file=sys.stderr)
    columns = tokenised_pair(PAIR_TRAINERS[command], row, tokenizer, args)
    if not columns:
        return f"The first pair is left out: it is longer than `max_length={args.max_length}`."
    heading = f"The first pair, as the model reads it (cut to {args.max_length} tokens where it is longer):"
    return f"{heading}\n{token_lines({name.removesuffix('_ids'): ids for name, ids in columns.items()}, tokenizer)}"


def token_lines(parts: dict[str, list[int]], tokenizer: Any) -> str:
    """Return the length of each part, its text with special tokens, and its ids."""
    return "\n".join(
        f"  {name:9}{len(ids):5} tokens  {tokenizer.decode(ids)!r}\n{'':24}{' '.join(map(str, ids))}"
        for name, ids in parts.items()
    )
