"""Print what a run would be: its batches, its memory, and the first sample as the model reads it."""

import json
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
from ..planner import Plan
from ..ppo.config import PPOLoopConfig
from ..ppo.data import check_datasets, prompt_ids
from ..ppo.display import batch_plan, planned_steps, pretraining_plan
from ..ppo.pretraining import responses_to_sample
from ..ppo.roles.inputs import check_given, resolve
from ..runs.checkpoints import checkpoint_of
from ..runs.folder import is_local
from ..runs.requirements import require_writable
from ..runs.steps_left import require_steps_left
from ..runs.tables import counted
from .data import note_on_data, require_steps
from .fit import plan_run
from .launch import deepspeed_file, is_sharded_by_fsdp, processes, require_count
from .models import path_of, require_judge, require_judges
from .options import Options
from .reward_functions import reward_functions, try_on


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
    size, held_out = (len(each) if isinstance(each, Dataset) else None for each in (rows, splits["test"]))
    tokenizer = load_tokenizer(path, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    with as_if_of(count):
        if command in ("ppo", "critic"):
            check_ppo(data, path, adapter, args, splits, tokenizer)
            longest, heading, parts = prompts(rows, tokenizer, args)
        else:
            require_steps(rows, args.max_steps)
            check_columns(rows, splits["test"], lambda: tokenizer)
            longest, (heading, parts) = None, pair(command, next(iter(rows)), tokenizer, args)
        if command == "critic":
            responses = responses_to_sample(args, size), (held_out or 0) * args.num_generations_eval
            steps, text = None, pretraining_plan(args, *responses)
        else:
            steps, text = batches(command, args, size, count)
            require_steps_left(checkpoint, steps)
    options = vars(given.values) | vars(args) | {"deepspeed": deepspeed_file(given)}
    options |= {"fsdp": True} if is_sharded_by_fsdp(given) else {}
    plan_text, of_memory = memory(command, options, given, count, longest)
    if not given.json:
        print(text, plan_text, "\n".join([heading, *token_lines(parts, tokenizer)]), sep="\n\n", end="\n\n")
        note = note_on_data(data, rows, tokenizer)
        if note:
            print(note, end="\n\n")
        print("This was a dry run: leave out --dry_run to train.")
        return
    found = {"command": command, "model": path, "data": data.source, "output_dir": args.output_dir}
    found |= {"processes": count}
    found |= {"rows": {"train": size, "test": held_out}, "optimizer_steps": steps, "batches": text}
    found |= {"memory": of_memory, "sample": {"heading": heading, "parts": token_facts(parts, tokenizer)}}
    print(json.dumps(found, indent=2, ensure_ascii=False))


def require_dry_run(given: Options) -> None:
    """Raise `ValueError` for options of a dry run in a run that trains."""
    for name in ("json", "gpu"):
        if getattr(given, name, None):
            raise ValueError(
                f"`--{name}` says how `--dry_run` answers, and this run would train. Add `--dry_run`, or leave it out."
            )


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
    if judge is not None and is_local(judge) and not Path(judge).is_dir():
        require_judge("--value_model", data.value_model)
        print(f"The reward model {judge} is not there yet.\n", file=sys.stderr)
        args, given = resolve(args, model=path, peft_config=adapter, **roles)
    else:
        require_judges(args, data)
        args, given = resolve(args, model=path, peft_config=adapter, **roles)
        check_given(args, given)
    context = context_limit(text_config(given.model, args), generates=True)
    check_datasets(splits["train"], splits["test"], None, tokenizer, context, args, tokenizer.pad_token_id)
    try_on(functions, next(iter(splits["train"])), tokenizer, args)


def batches(command: str, args: Any, rows: int | None, count: int) -> tuple[int, str]:
    """Return the number of optimizer steps, and the batches in words, as the trainer counts them."""
    if command == "ppo":
        loop = PPOLoopConfig(args)
        return planned_steps(loop, rows), batch_plan(loop, rows)
    per_device, accumulated, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps
    if steps <= 0:
        per_epoch = math.ceil(math.ceil((rows or 0) / (per_device * count)) / accumulated)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    of = counted(rows, "pair") if rows is not None else "a stream of pairs"
    return steps, (
        f"{command.upper()} plan: {counted(per_device * accumulated * count, 'pair')} per optimizer step "
        f"({per_device} × {accumulated} accumulated × {counted(count, 'process')}); "
        f"{counted(steps, 'optimizer step')} over {of}."
    )


def memory(
    command: str, options: dict[str, Any], given: Options, count: int, longest: int | None
) -> tuple[str, dict[str, Any]]:
    """Return the memory plan, or why there is none, in words and as facts."""
    if command == "critic":
        why = "a critic alone is not planned; it needs less than PPO of the same model."
        return f"Memory: {why}", {"planned": False, "why": why}
    if given.gpu is not None:
        machine = planner.hardware(given.gpu, gpus=count)
    elif options["use_cpu"]:
        machine = replace(planner.CPU, memory=planner.this_machine().host_memory, gpus=count)
    else:
        machine = replace(planner.this_machine(), gpus=count)
    try:
        planned = plan_run(command, options, machine, longest)
        return planner.plan_text(planned), memory_facts(planned)
    except Exception as reason:  # what cannot be planned may still be trained
        return f"Memory: not planned: {reason}", {"planned": False, "why": str(reason)}


def memory_facts(planned: Plan) -> dict[str, Any]:
    """Return whether a plan fits, and what it needs, in GiB."""
    on = planned.hardware
    sizes = {"needed": planned.needed, "of": on.memory, "host_needed": planned.host, "host_of": on.host_memory}
    rounded = {f"{name}_gib": round(size / planner.GIB, 2) for name, size in sizes.items()}
    return {"planned": True, "fits": planned.fits, "gpu": on.name, "most_when": planned.peak.moment} | rounded


def prompts(rows: Any, tokenizer: Any, args: Any) -> tuple[int, str, dict[str, list[int]]]:
    """Return the tokens of the longest of the first prompts, and the first of them: a heading, and its tokens."""
    first = [row for row, _ in zip(rows, range(LOOKED_AT), strict=False)]
    ids = [prompt_ids(row, tokenizer, args.chat_template_kwargs or {}, tokenizer.pad_token_id) for row in first]
    longest = max(map(len, ids))
    heading = f"The first prompt, as the actor reads it ({longest} tokens in the longest of {len(ids)} looked at):"
    return longest, heading, {"prompt": ids[0]}


def pair(command: str, row: dict[str, Any], tokenizer: Any, args: Any) -> tuple[str, dict[str, list[int]]]:
    """Return the first pair: a heading, and the tokens of each part, none where it is left out."""
    if getattr(args, "chat_template_path", None):
        print("`chat_template_path` is not applied in a dry run.", file=sys.stderr)
    columns = tokenised_pair(PAIR_TRAINERS[command], row, tokenizer, args)
    if not columns:
        return f"The first pair is left out: it is longer than `max_length={args.max_length}`.", {}
    heading = f"The first pair, as the model reads it (cut to {args.max_length} tokens where it is longer):"
    return heading, {name.removesuffix("_ids"): list(ids) for name, ids in columns.items()}


def token_facts(parts: dict[str, list[int]], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return of each part its length, its text with special tokens, and its ids."""
    return {name: {"tokens": len(ids), "text": tokenizer.decode(ids), "ids": ids} for name, ids in parts.items()}


def token_lines(parts: dict[str, list[int]], tokenizer: Any) -> Iterator[str]:
    """Give the same in lines for people."""
    for name, fact in token_facts(parts, tokenizer).items():
        yield f"  {name:9}{fact['tokens']:5} tokens  {fact['text']!r}"
        yield f"{'':24}{' '.join(map(str, fact['ids']))}"
