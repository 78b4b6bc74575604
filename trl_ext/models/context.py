"""How many tokens a model takes, as its config says: what the families call it, and how they extend it."""

from typing import Any


# The field's names. GPT-2's, GPT-J's and CTRL's `n_positions` answers to the first one too.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
WITHOUT_END = 1e9  # what some configs write for "no limit"

# Families whose table of positions begins behind the pad token's row.
BEHIND_PAD = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text"),
}


def context_limit(config: Any, *adapters: Any, generates: bool = False) -> int | None:
    """
    Args:
        config: the text part of a language model's config.
        adapters: configs of the adapters in it; virtual tokens take positions too.
        generates: whether the model also writes what it reads. With a rotary embedding that adapts to the length, the
            keys in the cache then have another rotation than in a forward pass over the whole, which ends the context
            where the adapting begins.

    Returns:
        The tokens of the longest sequence, or `None` where there is no limit: attention biased by the distance
        (ALiBi), a state (Mamba), a rotary embedding that adapts to the length (dynamic NTK). For other rotary
        embeddings it is the length that they are declared for, with their scaling; longer sequences can be computed,
        but the model has not learnt to read them.
    """
    declared, ropes = _declared(config), _ropes(config)
    adapts = any(_type(rope) == "dynamic" for rope in ropes)
    if declared is None or _biases_by_distance(config) or (adapts and not generates):
        return None
    limit = max([declared, *(_stretched(rope, declared) for rope in ropes)])
    if config.model_type in BEHIND_PAD:
        limit -= (config.pad_token_id or 0) + 1
    return limit - max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)


def _declared(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in NAMES)
    return next((int(v) for v in values if isinstance(v, int | float) and 0 < v < WITHOUT_END), None)


def _biases_by_distance(config: Any) -> bool:
    # MPT's ALiBi is a table as long as `max_seq_len`, so there the limit holds.
    return bool(getattr(config, "alibi", False)) or getattr(config, "position_embedding_type", None) == "alibi"


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Parameters of the rotary embeddings: one set, or one for every kind of layer; in older code `rope_scaling`."""
    written = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [each for each in (written, *written.values()) if isinstance(each, dict)]


def _type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _stretched(rope: dict[str, Any], declared: int) -> int:
    """The original length times the factor: YaRN, linear scaling, Llama 3's."""
    if _type(rope) in ("default", "dynamic"):
        return declared
    return int((rope.get("original_max_position_embeddings") or declared) * (rope.get("factor") or 1))
