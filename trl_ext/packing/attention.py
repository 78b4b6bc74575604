"""
Attention over rows of segments: no score is computed between tokens that do not see each other. On CUDA one kernel
does it where FlexAttention works (`flex`), elsewhere SDPA does it piece by piece.

It stands in for transformers' `sdpa`, under that name, and for the eager attention of transformers' families, some of
which cap their scores (Gemma 2) or have sinks (GPT-OSS). Whatever is not over packed rows is handed on. Rows reach it
as an argument of the call: so no model is switched over and back, a block that gradient checkpointing runs again
attends as it did, and what a model decides by the name of its attention stays as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import flex
from .segments import PackedRows


_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

# What families pass to their attention beside the window, and what of it changes nothing here. Rotary embeddings are
# in queries and keys already; the rest are a model's own arguments, handed on.
HARMLESS = {"position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict", "layer_idx"}
HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"}


class Heads(NamedTuple):
    """What a layer asks of its attention: numbers of heads, their widths, scale, window, cap and sinks."""

    queries: int
    keys: int
    width: int
    value_width: int
    scaling: float | None
    window: int | None
    softcap: float | None = None
    has_sinks: bool = False


def placeholder(dtype: torch.dtype, device: torch.device) -> Tensor:
    """
    Return the mask (1, 1, 1, 1) that models are given together with packed rows. Of four dimensions, it is passed on
    as it is; and since it is NaN, a model that reads it cannot go unnoticed.
    """
    return torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    packed_blocks: flex.Blocks | None = None,
    packed_heads: list[Heads] | None = None,
    is_eager: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    Attend over packed rows, or as transformers does where there are none.

    Args:
        query (R, heads, T, D), key (R, key-value heads, T, D), value (R, key-value heads, T, E).
        attention_mask: with `packed_rows`, which say who sees whom, the [`placeholder`].
        scaling: what the scores are multiplied by; `None`: 1/√D.
        packed_blocks: the rows for FlexAttention, if that is to be used.
        packed_heads: what is asked here is added to it.
        is_eager: whether it stands in for an eager attention, which reads two more arguments: `softcap` caps scores s
            at softcap · tanh(s / softcap), `s_aux` (heads,) adds to each head a score that is of no key.

    Returns:
        The attention's output (R, T, heads, E), and no weights.

    Raises:
        ValueError: for a mask or an argument that packed rows do not know.
    """
    if packed_rows is None:
        return _sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    softcap, sinks = (kwargs.pop("softcap", None), kwargs.pop("s_aux", None)) if is_eager else (None, None)
    window = _understood(module, query, key, attention_mask, packed_rows, kwargs)
    query, key, value = _in_one_dtype(query, key, value)
    if packed_heads is not None:
        sizes = query.size(1), key.size(1), query.size(3), value.size(3)
        packed_heads.append(Heads(*sizes, scaling, window, softcap, sinks is not None))
    if packed_blocks is not None:
        return flex.attend(query, key, value, packed_blocks[window], scaling, softcap, sinks), None
    return pieces(query, key, value, packed_rows, scaling, window, softcap, sinks), None


def _attention_named(interface: AttentionInterface, name: str, default: Callable) -> Callable:
    """Return transformers' choice; where that is the family's eager attention, with packed rows handed over here."""
    found = _choose(interface, name, default)
    # What the eager attention of other code computes is not known.
    if found is not default or not default.__module__.startswith("transformers."):
        return found

    def eager(*args: Any, packed_rows: PackedRows | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if packed_rows is None:
            return default(*args, **kwargs)
        return packed_attention(*args, **kwargs | {"packed_rows": packed_rows, "is_eager": True})

    return eager


def _understood(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, rows: PackedRows, kwargs: dict[str, Any]
) -> int | None:
    """Return the layer's window, in tokens, after a look at everything else that it passes."""
    name = type(module).__name__
    if mask is None or mask.shape != (1, 1, 1, 1):
        raise ValueError(f"{name} attends under a mask of its own")
    if query.shape[2] != rows.input_ids.shape[1] or key.shape[2] != query.shape[2]:
        raise ValueError(f"{name} attends over {key.shape[2]} keys in rows of {rows.input_ids.shape[1]} tokens")
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
    Return tensors as autocast hands them to SDPA. Rotary embeddings leave queries and keys in float32, and neither
    FlexAttention nor SDPA under `causal_lower_right` is among what autocast knows.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PackedRows,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend piece by piece, shapes as in `packed_attention`, to the last `window` tokens or all; 0 at padding."""
    groups = query.size(1) // key.size(1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    for r, of_row in enumerate(rows.pieces):
        sizes = [piece.size for piece in of_row]
        padding = query.size(2) - sum(sizes)
        # `split` has one backward for all pieces; slices would each fill a gradient of the whole row.
        q, k, v = (x[r : r + 1].split([*sizes, padding], dim=2) for x in (query, key, value))
        of_pieces = []
        for i, (size, before) in enumerate(of_row):
            if not size:
                continue
            # Of the ancestors, what the first token of the piece still sees.
            beyond = 0 if window is None else sum(count for _, count in before) + 1 - window
            seen, read = [], []
            for j, count in before:
                first = min(max(beyond, 0), count)
                seen.append(k[j][:, :, first:count])
                read.append(v[j][:, :, first:count])
                beyond -= count
            keys = torch.cat([*seen, k[i]], dim=2) if before else k[i]
            values = torch.cat([*read, v[i]], dim=2) if before else v[i]
            of_pieces.append(_causal(q[i], keys, values, scaling, window, softcap, sinks))
        outputs.append(torch.cat([*of_pieces, torch.zeros_like(v[-1])], dim=2))
    return torch.cat(outputs).transpose(1, 2).contiguous()


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend causally with the queries of the last tokens of the keys; each sees `window` tokens up to its own."""
    size, seen = query.size(2), key.size(2)
    is_plain = softcap is None and sinks is None
    if is_plain and (window is None or seen <= window):
        if size == seen:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        lower_right = causal_lower_right(size, seen)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=lower_right, scale=scaling)
    outputs = []
    window = seen if window is None else window
    for start in range(seen - size, seen, window):  # as many queries at a time as each of them sees keys
        stop, begin = min(start + window, seen), max(start + 1 - window, 0)
        queries = query[:, :, start - (seen - size) : stop - (seen - size)]
        tokens = torch.arange(begin, stop, device=query.device)
        distance = tokens[start - begin :, None] - tokens
        sees = (distance >= 0) & (distance < window)
        keys, values = key[:, :, begin:stop], value[:, :, begin:stop]
        if is_plain:
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, scale=scaling)
        else:
            output = _eager(queries, keys, values, sees, scaling, softcap, sinks)
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """
    Attend as the eager attention of Gemma 2 and GPT-OSS does, to the keys that each query `sees`; scores and weights
    are in float32, as within SDPA.
    """
    dtype, wide = value.dtype, torch.promote_types(value.dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(2, 3) * (query.size(3) ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~sees, -torch.inf)
        if sinks is not None:
            of_no_key = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, of_no_key], dim=3)
        return (scores.softmax(dim=3)[..., : key.size(2)] @ value).to(dtype)


_choose = AttentionInterface.get_interface
AttentionInterface.get_interface = _attention_named
AttentionInterface.register("sdpa", packed_attention)
