"""The models and runs that packed rows are not exact for, and why. A trial decides; what is known here explains."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.noise import draws_noise, has_noise
from ..models.sharding import is_fsdp, is_partitioned


# Layers that read every token before them in the row, whatever a mask says; the names of `config.layer_types`.
RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid"}
# Families of models that bias attention by the distance in the row (ALiBi).
ALIBI = {"bloom", "mpt"}
# Fields of families whose attention chooses the keys of each token, in a mask of its own making.
CHOOSES_KEYS = ("index_topk", "keep_window_size")
# Families whose layers do not hand the packed rows on to their attention.
DROPS_ROWS = {"nemotron"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Adapters that look at the tokens beside a token, or at the row as a whole.
READS_THE_ROW = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}
# Lengths that masks of transformers' making count in positions of the sequence, and which layers have such a mask.
KINDS_OF_LAYERS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
POSITIONS = re.compile(r"n_ctx|n_positions|context_length|(original_)?max_(position|seq|sequence|target)\w*")
# Names of fields in a config, and of those that count something else.
COUNTS_TOKENS = re.compile(
    r"window|chunk|block|top_?k|budget|extent|distance|bucket|position|n_ctx|context|seq_|sequence|local|stride"
    r"|compress|span|max_.*len|mem_len"
)
COUNTS_OTHERS = re.compile(
    r"expert|moe|group|layer|vocab|vision|audio|image|^num_|_num_|conv|mamba|dim$|_token_id|type"
)


def why_not_run(args: Any, model: nn.Module) -> str | None:
    """
    Return why a run cannot use packed rows; `None` if it can.

    Args:
        args: the options of the run.
        model: what is trained, with its adapters.
    """
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "is_prompt_learning", False):
            return f"{kind} puts virtual tokens before every row"
        if getattr(config, "alora_invocation_tokens", None):
            return "an activated LoRA looks for its invocation tokens in every row"
        if kind in READS_THE_ROW:
            return f"{kind} reads the row as a whole"
    if args.neftune_noise_alpha is not None:
        return "`neftune_noise_alpha` adds noise to embeddings: shared tokens would share it"
    cannot_be_asked = is_partitioned(model) or is_fsdp(args.fsdp)
    if not args.disable_dropout and (has_noise(model) or (not cannot_be_asked and draws_noise(model))):
        return "dropout is active (`disable_dropout=False`): shared tokens would share their mask"
    return None


def why_not_model(model: PreTrainedModel) -> str | None:
    """Return why a model is known not to allow packed rows; `None` if nothing is known."""
    config, name = model.config.get_text_config(), type(model).__name__
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{name} takes no `position_ids`"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"rows are shared with the attention `sdpa` or `eager`; this model's is `{config._attn_implementation}`"
    # What no mask can mend
    recurrent = RECURRENT & set(getattr(config, "layer_types", None) or ())
    if recurrent or hasattr(config, "state_size"):
        return f"{name} is recurrent ({', '.join(sorted(recurrent)) or 'a state-space model'})"
    if getattr(config, "alibi", False) or config.model_type in ALIBI:
        return f"{name} biases attention by the distance in the row (ALiBi)"
    # RoBERTa's families count up from there themselves, unless they are given positions.
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    if any(table.padding_idx is not None for table in tables):
        return f"{name} begins its positions behind that of its pad token"
    return None


def attends_by_itself(model: PreTrainedModel) -> bool:
    """Return whether a family that asks transformers for its attention is known to do more, or less, than that."""
    config = model.config.get_text_config()
    return config.model_type in DROPS_ROWS or any(getattr(config, name, None) for name in CHOOSES_KEYS)


def length_limit(model: PreTrainedModel) -> int | None:
    """Return up to how many tokens the rotary embedding is the same in every batch; `None` for any number."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    # One set of parameters, or one for every kind of layer.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limits.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((limit for limit in limits if limit), default=None)


def lengths(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Return the fields of a config that may count tokens, the smallest first: windows, positions, an index's keys."""
    fields = model.config.get_text_config().to_dict()
    found = []
    for name, value in fields.items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = {each for each in values if type(each) is int and each > 1}
        if numbers and COUNTS_TOKENS.search(name) and not COUNTS_OTHERS.search(name):
            found += [(name, each) for each in numbers]
    return sorted(found, key=lambda field: field[1])


def is_harmless(model: PreTrainedModel, name: str, value: int) -> bool:
    """Return whether the model's structure shows that rows may be longer than this length of its config."""
    kind = KINDS_OF_LAYERS.get(name)
    if kind is not None:
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        return kinds is not None and kind not in kinds
    # Positions are looked up by their ids. Some models have a mask over all of them, too, such as GPT-Neo.
    mask = any(buffer.dim() > 1 and min(buffer.shape[-2:]) >= value for buffer in model.buffers())
    return POSITIONS.fullmatch(name) is not None and not mask


@contextmanager
def shrunk(model: PreTrainedModel, name: str, value: int, to: int) -> Iterator[None]:
    """Within the context, set the length `name` of the config to `to`, also where a layer has kept it by that name."""
    holders = [model.config.get_text_config()]
    holders += [module for module in model.modules() if vars(module).get(name) == value]
    if getattr(holders[0], name) != value:  # one of several values in a list
        holders = []
    for holder in holders:
        setattr(holder, name, to)
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, name, value)
