"""Which models and runs shared rows are not exact for, and why. A probe decides; what is known here explains."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..noise import has_noise
from . import attention


# Layers that read every token before them in the row, whatever a mask says; the names of `config.layer_types`.
RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid"}
# Families of models that bias attention by the distance in the row (ALiBi).
ALIBI = {"bloom", "mpt"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def why_not_run(args: Any, model: nn.Module, aux_loss: bool) -> str | None:
    """
    What in a run speaks against shared rows, `None` if nothing does.

    Args:
        args: the `DPOConfigX`.
        model: the actor, with its adapters.
        aux_loss: whether a mixture of experts' load-balancing loss is part of the loss; it counts tokens per row.
    """
    adapters = getattr(model, "peft_config", {})
    learnt = [config.peft_type for config in adapters.values() if getattr(config, "is_prompt_learning", False)]
    if learnt:
        return f"{learnt[0].value} puts virtual tokens before every row"
    if aux_loss:
        return "the load-balancing loss counts the tokens of every row"
    if args.neftune_noise_alpha is not None:
        return "`neftune_noise_alpha` adds noise to embeddings: shared tokens would share it"
    if not args.disable_dropout and has_noise(model):
        return "dropout is active (`disable_dropout=False`): shared tokens would share their mask"
    return None


def why_not_model(model: PreTrainedModel) -> str | None:
    """What in a model's interface speaks against shared rows, `None` if nothing does."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no `position_ids`"
    if config._attn_implementation not in ("sdpa", "eager", attention.NAME):
        return f"rows are shared with the attention `sdpa` or `eager`; this model's is `{config._attn_implementation}`"
    return explanation(model)


def explanation(model: PreTrainedModel) -> str | None:
    """What is known about a model that no mask can mend."""
    config = model.config.get_text_config()
    name = type(model).__name__
    recurrent = RECURRENT & set(getattr(config, "layer_types", None) or ())
    if recurrent or hasattr(config, "state_size"):
        return f"{name} is recurrent ({', '.join(sorted(recurrent)) or 'a state-space model'})"
    if getattr(config, "alibi", False) or config.model_type in ALIBI:
        return f"{name} biases attention by the distance in the row (ALiBi)"
    return None


def length_limit(model: PreTrainedModel) -> int | None:
    """
    Up to how many tokens in a sequence shared rows are exact; `None` for any number. Longer ones would leave a
    sliding window or an attention chunk, or change a rotary embedding that depends on the length.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    limits = []
    if kinds is None or "sliding_attention" in kinds:
        limits.append(getattr(config, "sliding_window", None))
    if kinds is None or "chunked_attention" in kinds:
        limits.append(getattr(config, "attention_chunk_size", None))
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for every kind of layer.
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limits.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((limit for limit in limits if limit), default=None)
