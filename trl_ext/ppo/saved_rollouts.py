"""
Responses with their scores, kept as Parquet beside `facts.json`, which says whose they are: of which policy, tokenizer
and rewards, sampled with which options. They are read again only by a run that would sample the same.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._trl import get_callable_name, get_config_model_id
from ..models.fingerprint import model_fingerprint
from ..models.loading import source_options
from .config import PPOConfigX
from .rewards import token_rewards
from .rollout import Rollout


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
    *("num_generations", "num_generations_eval", "mask_truncated_completions", "reward_weights"),
)


def facts_of(
    args: PPOConfigX, model: Any, tokenizer: PreTrainedTokenizerBase, reward_model: Any, reward_funcs: list[Any]
) -> dict[str, Any]:
    """Return what decides which responses a run samples and how it scores them, before any model is loaded."""
    options = source_options(args)
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    sources = [source for source in (reward_model, *reward_funcs) if source is not None]
    return {
        "policy": {"name": _name(model), "weights": model_fingerprint(model, options.get("revision"))},
        "tokenizer": hashlib.sha256(json.dumps(vocabulary, default=str).encode()).hexdigest(),
        "rewards": [{"name": _name(source), "weights": _weights(source)} for source in sources],
        "options": {name: getattr(args, name) for name in OPTIONS},
    }


def _name(source: Any) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, nn.Module):
        return (get_config_model_id(source.config) if hasattr(source, "config") else None) or type(source).__name__
    return get_callable_name(source)


def _weights(source: Any) -> str | None:
    adapter = Path(source) / "adapter_model.safetensors" if isinstance(source, str) else None
    if adapter is not None and adapter.is_file():
        return hashlib.sha256(adapter.read_bytes()).hexdigest()
    return model_fingerprint(source) if isinstance(source, str | nn.Module) else None


def require_same(folder: str | Path, now: dict[str, Any]) -> None:
    """Raise `ValueError`, naming what differs, unless the responses kept in a folder are those of `now`."""
    file = Path(folder) / FACTS
    files = [file, *(_file(folder, split) for split in SPLITS)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"`rollouts` is {folder}, which has no {' and no '.join(missing)}. Give the folder `{FOLDER}` in the "
            "output folder of an earlier run, or leave it out to sample."
        )
    then = json.loads(file.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    differing = []
    if _identity([then["policy"]]) != _identity([now["policy"]]):
        differing.append(f"of the policy {then['policy']['name']}, whose weights are not those of this run's")
    if then["tokenizer"] != now["tokenizer"]:
        differing.append("of another tokenizer, or another chat template")
    if _identity(then["rewards"]) != _identity(now["rewards"]):
        before, here = (", ".join(source["name"] for source in facts["rewards"]) or "none" for facts in (then, now))
        differing.append(f"scored by {before}, and this run has {here}, or other weights of that name")
    options = [name for name in OPTIONS if then["options"].get(name) != now["options"][name]]
    if options:
        before, here = (", ".join(f"{n}={f['options'].get(n)}" for n in options) for f in (then, now))
        differing.append(f"sampled with {before}, and this run has {here}")
    if differing:
        raise ValueError(
            f"The responses in {folder} are {'; and '.join(differing)}. Their returns would teach the critic of "
            "another run: make these the same, or leave out `rollouts` to sample."
        )


def _identity(sources: list[dict[str, Any]]) -> list[str]:
    """Return what policy and rewards are known by: the weights, wherever they lie, else the name."""
    return [source["weights"] or source["name"] for source in sources]


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
    """Return the responses of every split; `ValueError` for none at all, or a score that is not finite."""
    splits = {}
    for split in SPLITS:
        file = _file(folder, split)
        rows = splits[split] = Dataset.from_parquet(str(file))
        if len(rows) == 0:
            raise ValueError(f"{file} holds no responses. Sample again: leave out `rollouts`.")
        bad = [i for i, score in enumerate(rows["score"]) if score is not None and not math.isfinite(score)]
        if bad:
            raise ValueError(
                f"Row {bad[0]} of {file} has the score {rows[bad[0]]['score']}; a score must be finite. Sample again: "
                "leave out `rollouts`."
            )
    return splits


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
