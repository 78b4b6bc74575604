"""
Responses with their scores, kept as Parquet beside `facts.json`, which says whose they are: of which policy,
tokenizer, rewards, tools and environments, sampled with which options. They are read again only by a run that would
sample and score the same.
"""

import ast
import functools
import hashlib
import inspect
import json
import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .._trl import get_callable_name, get_config_model_id
from ..models.fingerprint import identity_of, is_same, why_unknown
from ..models.loading import adapter_config
from .config import PPOConfigX
from .rewards import token_rewards
from .roles.inputs import Given, policy_of
from .rollout import Rollout


logger = logging.get_logger(__name__)

# A response, without padding; `score` is None where no reward source applied, `paid` where the last token gets it all.
COLUMNS = Features(
    {
        "prompt_ids": List(Value("int64")),
        "response_ids": List(Value("int64")),
        "counts": List(Value("bool")),
        "score": Value("float64"),
        "paid": List(Value("float64")),
        "ended": Value("bool"),
    }
)
FOLDER, FACTS = "rollouts", "facts.json"
SPLITS = ("train", "held_out")
# Options that decide which responses are sampled and what they score.
OPTIONS = (
    *("response_length", "temperature", "stop_token", "stop_token_id", "chat_template_kwargs"),
    *("num_generations", "num_generations_eval", "mask_truncated_completions", "max_tool_calling_iterations"),
    *("reward_weights", "reward_model_quantization"),
)
# What samples and scores beside policy and tokenizer -> how the responses are said to be of it.
SOURCES = {
    "rewards": "scored by",
    "reward_tokenizers": "scored with `reward_processing_classes`",
    "tools": "sampled with the tools",
    "environments": "sampled in the environments",
    "rollout_func": "sampled by `rollout_func`",
}


def facts_of(
    args: PPOConfigX, given: Given, tokenizer: PreTrainedTokenizerBase, rollout_func: Callable | None = None
) -> dict[str, Any]:
    """Return what decides which responses a run samples and how it scores them, before any model is loaded."""
    rewards = [source for source in (given.reward_model, *given.reward_funcs) if source is not None]
    own = given.reward_processing_classes
    readers = own if isinstance(own, list) else [] if own is None else [own]
    made = given.environment_factory
    environments = [made[key] for key in sorted(made)] if isinstance(made, dict) else [] if made is None else [made]
    quantization = given.quantization_config and str(given.quantization_config.to_diff_dict())
    return {
        "policy": policy_of(args, given),
        "tokenizer": _vocabulary(tokenizer),
        "rewards": [_source(source) for source in rewards],
        "reward_tokenizers": [_source(reader) for reader in readers if reader is not None],
        "tools": [_source(tool) for tool in given.tools or []],
        "environments": [_source(environment) for environment in environments],
        "rollout_func": [] if rollout_func is None else [_source(rollout_func)],
        "options": {name: getattr(args, name) for name in OPTIONS} | {"quantization_config": quantization},
    }


def _name(source: Any) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, nn.Module):
        return (get_config_model_id(source.config) if hasattr(source, "config") else None) or type(source).__name__
    return get_callable_name(source)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def _source(source: Any) -> dict[str, str | None]:
    """Return the identity of a reward, a tokenizer of one, a tool, an environment or a rollout function."""
    if isinstance(source, PreTrainedTokenizerBase):
        return {"name": source.name_or_path, "weights": _vocabulary(source), "read": "from a tokenizer"}
    if isinstance(source, nn.Module):
        return identity_of(source, _name(source))
    if not isinstance(source, str):
        return {"name": _name(source), "weights": _code(source), "read": "from its code"}
    adapter = adapter_config(source)
    if adapter is None:
        return identity_of(source, source)
    return identity_of(str(adapter.base_model_name_or_path), source, adapter.revision, source)


def _code(function: Callable) -> str | None:
    """Return the SHA-256 of a function's or a class's code, without comments; `None` where there is none to read."""
    while isinstance(function, functools.partial):
        function = function.func
    is_named = inspect.isroutine(function) or inspect.isclass(function)
    try:
        source = textwrap.dedent(inspect.getsource(function if is_named else type(function)))
    except (OSError, TypeError):  # typed at a prompt, or written in C
        return None
    try:
        source = ast.unparse(ast.parse(source))
    except SyntaxError:  # the line of a lambda is not a statement
        pass
    return hashlib.sha256(source.encode()).hexdigest()


def require_same(folder: str | Path, now: dict[str, Any]) -> None:
    """
    Raise `ValueError`, naming what differs, unless the responses kept in a folder are those of `now`; warn of what
    cannot be compared.
    """
    file = Path(folder) / FACTS
    files = [file, *(_file(folder, split) for split in SPLITS)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        lacks = f"which has no {' and no '.join(missing)}" if Path(folder).is_dir() else "and there is no such folder"
        raise ValueError(
            f"`rollouts` is {str(folder)!r}, {lacks}. Give the folder {FOLDER!r} in the "
            f"output folder of an earlier run, such as `rollouts='outputs/critic/{FOLDER}'`, or leave it out to "
            "sample."
        )
    then = json.loads(file.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    differing: list[str] = []
    unknown: list[str] = []
    if _differ([then["policy"]], [now["policy"]], unknown):
        differing.append(f"of the policy {then['policy']['name']}, whose weights are not those of this run's")
    if then["tokenizer"] != now["tokenizer"]:
        differing.append("of another tokenizer, or another chat template")
    for kind, how in SOURCES.items():
        if _differ(then[kind], now[kind], unknown):
            before, here = (", ".join(source["name"] for source in facts[kind]) or "none" for facts in (then, now))
            differing.append(f"{how} {before}, and this run has {here}, or other weights or code of that name")
    options = [name for name, value in now["options"].items() if then["options"].get(name) != value]
    if options:
        before, here = (", ".join(f"{n}={f['options'].get(n)}" for n in options) for f in (then, now))
        differing.append(f"sampled with {before}, and this run has {here}")
    if differing:
        raise ValueError(
            f"The responses in {folder} are {'; and '.join(differing)}. Their returns would teach the critic of "
            "another run: make these the same, or leave out `rollouts` to sample."
        )
    if unknown:
        logger.warning(
            f"Whether the responses in {folder} are those that this run would sample is unknown: {'; '.join(unknown)}."
        )


def _differ(then: list[dict[str, Any]], now: list[dict[str, Any]], unknown: list[str]) -> bool:
    """
    Return whether identities differ. Those that cannot be compared do if their names do; for equal names, why is added
    to `unknown`.
    """
    if len(then) != len(now):
        return True
    for before, here in zip(then, now, strict=True):
        same = is_same(before, here)
        if same is None and before["name"] == here["name"]:
            unknown.append(why_unknown(before, here))
        elif not same:
            return True
    return False


def _file(folder: str | Path, split: str) -> Path:
    return Path(folder) / f"{split}.parquet"


def write(folder: str | Path, splits: Mapping[str, Dataset], facts: dict[str, Any]) -> None:
    """Write the responses of every split, and last what they are, so that a folder with `facts.json` is whole."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / FACTS).unlink(missing_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(str(_file(folder, split)))
    (Path(folder) / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path) -> dict[str, Dataset]:
    """
    Return the responses of every split; `ValueError` for none at all, for a score or a reward at a token that is not
    finite, and for columns of different lengths.
    """
    splits = {}
    for split in SPLITS:
        file = _file(folder, split)
        rows = splits[split] = Dataset.from_parquet(str(file))
        if len(rows) == 0:
            raise ValueError(f"{file} holds no responses. Sample again: leave out `rollouts`.")
        for i, row in enumerate(rows.remove_columns("prompt_ids")):
            _check(row, f"Row {i} of {file}")
    return splits


def _check(row: dict[str, Any], which: str) -> None:
    """Raise `ValueError` for a row that `rows_of` has not written so."""
    wrong, tokens, paid = None, len(row["response_ids"]), row["paid"] or []
    for name in ("counts", "paid"):
        if row[name] is not None and len(row[name]) != tokens:
            wrong = f"has {len(row[name])} values in `{name}` for {tokens} tokens of the response"
    if row["score"] is not None and not math.isfinite(row["score"]):
        wrong = f"has the score {row['score']}; a score must be finite"
    if not all(map(math.isfinite, paid)):
        at = next(i for i, reward in enumerate(paid) if not math.isfinite(reward))
        wrong = f"is paid {paid[at]} at token {at}; a reward must be finite"
    if wrong is not None:
        raise ValueError(f"{which} {wrong}. Sample again: leave out `rollouts`.")


def rows_of(rollout: Rollout) -> list[dict[str, Any]]:
    """Return a row for each response, with the columns of `COLUMNS`."""
    prompts = zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)
    responses = zip(rollout.response_ids, rollout.mask, rollout.attended, strict=True)
    scores = rollout.scores.masked_fill(~rollout.scored, torch.nan).tolist()
    paid = [None] * len(rollout) if rollout.paid is None else list(rollout.paid)
    return [
        {
            "prompt_ids": prompt[is_real].tolist(),
            "response_ids": response[attended].tolist(),
            "counts": counts[attended].tolist(),
            "score": None if math.isnan(score) else score,
            "paid": None if by_token is None else by_token[attended].tolist(),
            "ended": ended,
        }
        for (prompt, is_real), (response, counts, attended), score, by_token, ended in zip(
            prompts, responses, scores, paid, rollout.has_eos.tolist(), strict=True
        )
    ]


def rollout_of(rows: Mapping[str, list[Any]], pad_id: int, device: torch.device) -> Rollout:
    """Return the rollout of a batch of rows, by column, as `rows_of` wrote them."""

    def padded(column: list[Any], value: Any, dtype: torch.dtype, side: str = "right") -> Tensor:
        sequences = [torch.tensor(row, dtype=dtype) for row in column]
        return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side).to(device)

    def ones(column: list[Any], side: str = "right") -> Tensor:
        return padded([[True] * len(row) for row in column], False, torch.bool, side)

    prompts, responses = rows["prompt_ids"], rows["response_ids"]
    scored = torch.tensor([score is not None for score in rows["score"]], device=device)
    scores = torch.tensor([score or 0.0 for score in rows["score"]], dtype=torch.float32, device=device)
    mask = padded(rows["counts"], False, torch.bool)
    paid, at_last = None, torch.tensor([tokens is None for tokens in rows["paid"]], device=device)
    if not at_last.all():
        by_token = [tokens or [0.0] * len(ids) for tokens, ids in zip(rows["paid"], responses, strict=True)]
        paid = padded(by_token, 0.0, torch.float32)
        paid = torch.where(at_last.unsqueeze(1), token_rewards(scores, mask), paid)
    return Rollout(
        prompt_ids=padded(prompts, pad_id, torch.long, "left"),
        prompt_mask=ones(prompts, "left"),
        response_ids=padded(responses, pad_id, torch.long),
        attended=ones(responses),
        mask=mask,
        scores=scores,
        scored=scored,
        has_eos=torch.tensor(rows["ended"], device=device),
        paid=paid,
    )
