"""The context of a model in tokens, as its config says: what families call it, and how they extend it."""

from typing import Any


# What configs call the context. GPT-2, GPT-J and CTRL give their `n_positions` under the first name too.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
WITHOUT_END = 1e9  # what some configs write for "no limit"

# Families whose table of positions begins behind the pad token's row.
BEHIND_PAD = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text"),
}


def context_limit(config: Any, *adapters: Any, generates: bool = False) -> int | None:
    """
    Return the tokens of the longest sequence that a model can read; `None` if there is no limit: with attention biased
    by distance (ALiBi), with a state (Mamba), and with a rotary embedding that adapts to the length (dynamic NTK). For
    other rotary embeddings it is the declared length with its scaling: longer sequences can be computed, but the model
    has not learnt to read them.

    Args:
        adapters: configs of the adapters in it; virtual tokens take positions too.
        generates: whether the model also writes. If so, the context ends where a dynamic rotary embedding begins to
            adapt: from there on the keys in the cache have another rotation than in one forward pass over the whole.
    """
    values = (getattr(config, name, None) for name in NAMES)
    declared = next((int(v) for v in values if isinstance(v, int | float) and 0 < v < WITHOUT_END), None)
    # MPT's ALiBi is a table as long as `max_seq_len`, so there the limit holds.
    has_alibi = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi"
    # The parameters of the rotary embeddings: one set, or one per kind of layer
    written = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [each for each in (written, *written.values()) if isinstance(each, dict)]
    kinds = [rope.get("rope_type") or rope.get("type") or "default" for rope in ropes]
    if declared is None or has_alibi or ("dynamic" in kinds and not generates):
        return None
    limit = declared
    for rope, kind in zip(ropes, kinds, strict=True):  # YaRN, linear scaling, Llama 3's: they extend the context
        if kind not in ("default", "dynamic"):
            original = rope.get("original_max_position_embeddings") or declared
            limit = max(limit, int(original * (rope.get("factor") or 1)))
    if config.model_type in BEHIND_PAD:
        limit -= (config.pad_token_id or 0) + 1
    return limit - max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
