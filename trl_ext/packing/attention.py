"""
Attention over shared rows: no score is computed between tokens that do not see each other. On CUDA one kernel does
it where FlexAttention works (`flex`), elsewhere SDPA does it piece by piece.

It stands in for transformers' `sdpa`, under that name, and hands on whatever is not over shared rows. Rows reach it as
an argument of the call: so no model is switched over and back, a block that gradient checkpointing runs again attends
as it did, and what a model decides by the name of its attention stays as it is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import flex
from .segments import SharedRows


_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

# What families pass to their attention beside the window, and what of it changes nothing here. Rotary embeddings are
# in queries and keys already; the rest are a model's own arguments, handed on.
HARMLESS = {"position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict", "layer_idx"}
HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"}


class Heads(NamedTuple):
    """What a layer asks of its attention: numbers of heads, their widths, scale and window."""

    queries: int
    keys: int
    width: int
    value_width: int
    scaling: float | None
    window: int | None


def placeholder(dtype: torch.dtype, device: torch.device) -> Tensor:
    """
    The mask (1, 1, 1, 1) that models are given together with shared rows. Of four dimensions, it is passed on as it
    is; and since it is NaN, a model that reads it cannot go unnoticed.
    """
    return torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=device)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_rows: SharedRows | None = None,
    shared_blocks: flex.Blocks | None = None,
    shared_heads: list[Heads] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    Args:
        query (R, heads, T, D), key (R, key-value heads, T, D), value (R, key-value heads, T, E).
        attention_mask: with `shared_rows`, which say who sees whom, the [`placeholder`].
        scaling: what the scores are multiplied by; `None`: 1/√D.
        shared_blocks: the rows for FlexAttention, if that is to be used.
        shared_heads: what is asked here is added to it.

    Returns:
        The attention's output (R, T, heads, E), and no weights.

    Raises:
        ValueError: for a mask or an argument that shared rows do not know.
    """
    if shared_rows is None:
        return _sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = _understood(module, query, key, attention_mask, shared_rows, kwargs)
    query, key, value = _in_one_dtype(query, key, value)
    if shared_heads is not None:
        sizes = query.size(1), key.size(1), query.size(3), value.size(3)
        shared_heads.append(Heads(*sizes, scaling, window))
    if shared_blocks is not None:
        return flex.attend(query, key, value, shared_blocks[window], scaling), None
    return pieces(query, key, value, shared_rows, scaling, window), None


def _understood(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, shared: SharedRows, kwargs: dict[str, Any]
) -> int | None:
    """The layer's window, in tokens, after a look at everything else that it passes."""
    name = type(module).__name__
    if mask is None or mask.shape != (1, 1, 1, 1):
        raise ValueError(f"{name} attends under a mask of its own")
    if query.shape[2] != shared.input_ids.shape[1] or key.shape[2] != query.shape[2]:
        raise ValueError(f"{name} attends over {key.shape[2]} keys in rows of {shared.input_ids.shape[1]} tokens")
    given = {key: value for key, value in kwargs.items() if value is not None and value is not False}
    window = given.pop("sliding_window", None)
    if window is not None and not (type(window) is int and window > 0):
        raise ValueError(f"{name} passes `sliding_window={window!r}`; a number of tokens is understood")
    if given.pop("is_causal", True) is not True or kwargs.get("is_causal") is False:
        raise ValueError(f"{name} attends to later tokens too")
    if not given.get("dropout", True):
        del given["dropout"]
    unknown = sorted(given.keys() - HARMLESS)
    if unknown:
        raise ValueError(f"{name} passes {', '.join(f'`{each}`' for each in unknown)} to its attention")
    return window


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """
    As autocast hands tensors to SDPA. Rotary embeddings leave queries and keys in float32, and neither FlexAttention
    nor SDPA under `causal_lower_right` is among what autocast knows.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: SharedRows,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention by SDPA, shapes as in `shared_attention`, to the last `window` tokens or all; 0 at padding."""
    groups = query.size(1) // key.size(1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = [
        _row(query[r : r + 1], key[r : r + 1], value[r : r + 1], spans, scaling, window)
        for r, spans in enumerate(shared.rows)
    ]
    return torch.cat(outputs).transpose(1, 2).contiguous()


def _row(query: Tensor, key: Tensor, value: Tensor, spans: tuple, scaling: float | None, window: int | None) -> Tensor:
    sizes = [size for span in spans for size in (span.common + span.chosen, span.rejected)]
    padding = query.size(2) - sum(sizes)
    # `split` has one backward for all pieces; slices would each fill a gradient of the whole row.
    q, k, v = (x.split([*sizes, padding], dim=2) for x in (query, key, value))
    outputs = []
    for i, span in enumerate(spans):
        first, second = 2 * i, 2 * i + 1
        outputs.append(_causal(q[first], k[first], v[first], scaling, window))
        if span.rejected:
            # Of the common part, what the first of the rejected tokens still sees.
            start = 0 if window is None else max(span.common + 1 - window, 0)
            keys = torch.cat([k[first][:, :, start : span.common], k[second]], dim=2)
            values = torch.cat([v[first][:, :, start : span.common], v[second]], dim=2)
            outputs.append(_causal(q[second], keys, values, scaling, window))
    outputs.append(torch.zeros_like(value[:, :1, :1]).expand(-1, query.size(1), padding, -1))
    return torch.cat(outputs, dim=2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """The queries are of the last tokens that there are keys of; each sees the last `window` tokens up to its own."""
    size, seen = query.size(2), key.size(2)
    if window is None or seen <= window:
        if size == seen:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        lower_right = causal_lower_right(size, seen)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=lower_right, scale=scaling)
    outputs = []
    for start in range(seen - size, seen, window):  # as many queries at a time as each of them sees keys
        stop, begin = min(start + window, seen), max(start + 1 - window, 0)
        queries = query[:, :, start - (seen - size) : stop - (seen - size)]
        tokens = torch.arange(begin, stop, device=query.device)
        distance = tokens[start - begin :, None] - tokens
        sees = (distance >= 0) & (distance < window)
        keys, values = key[:, :, begin:stop], value[:, :, begin:stop]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, scale=scaling))
    return torch.cat(outputs, dim=2)


AttentionInterface.register("sdpa", shared_attention)
