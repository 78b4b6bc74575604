"""
Attention over shared rows: no score is computed between tokens that do not see each other. On CUDA one kernel does
it where FlexAttention works (`flex`), elsewhere SDPA does it piece by piece.

It stands in for SDPA, under a name of its own in transformers' registry of attention functions, and is SDPA wherever
no shared rows are given (generation, ordinary rows).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from . import flex
from .prefix_sharing import SharedRows


NAME = "sdpa_shared_rows"


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_rows: SharedRows | None = None,
    shared_blocks: BlockMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Args:
        query (R, heads, T, D), key, value (R, key-value heads, T, D).
        attention_mask: not read where `shared_rows` says who sees whom.
        shared_blocks: the same for FlexAttention, if that is to be used.
        scaling: what the scores are multiplied by; `None`: 1/√D.

    Returns:
        The attention's output (R, T, heads, D), and no weights.
    """
    if shared_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if shared_blocks is not None:
        return flex.attend(query, key, value, shared_blocks, scaling), None
    return pieces(query, key, value, shared_rows, scaling), None


def pieces(query: Tensor, key: Tensor, value: Tensor, shared: SharedRows, scaling: float | None = None) -> Tensor:
    """Attention by SDPA, shapes as in `shared_attention`; 0 at padding."""
    groups = query.size(1) // key.size(1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = [
        _row(query[r : r + 1], key[r : r + 1], value[r : r + 1], spans, scaling) for r, spans in enumerate(shared.rows)
    ]
    return torch.cat(outputs).transpose(1, 2).contiguous()


def _row(query: Tensor, key: Tensor, value: Tensor, spans: tuple, scaling: float | None) -> Tensor:
    sizes = [size for span in spans for size in (span.common + span.chosen, span.rejected)]
    padding = query.size(2) - sum(sizes)
    # `split` has one backward for all pieces; slices would each fill a gradient of the whole row.
    q, k, v = (x.split([*sizes, padding], dim=2) for x in (query, key, value))
    outputs = []
    for i, span in enumerate(spans):
        first, second = 2 * i, 2 * i + 1
        outputs.append(F.scaled_dot_product_attention(q[first], k[first], v[first], is_causal=True, scale=scaling))
        if span.rejected:
            keys = torch.cat([k[first][:, :, : span.common], k[second]], dim=2)
            values = torch.cat([v[first][:, :, : span.common], v[second]], dim=2)
            sees = causal_lower_right(span.rejected, keys.size(2))
            outputs.append(F.scaled_dot_product_attention(q[second], keys, values, attn_mask=sees, scale=scaling))
    outputs.append(torch.zeros_like(value[:, :1, :1]).expand(-1, query.size(1), padding, -1))
    return torch.cat(outputs, dim=2)


AttentionInterface.register(NAME, shared_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use(model: Any) -> None:
    """Lets `model` attend piece by piece where it attends with SDPA; eager attention stays, with a mask."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def in_use(model: Any) -> bool:
    return model.config.get_text_config()._attn_implementation == NAME


def stop_using(model: Any) -> None:
    if in_use(model):
        model.set_attn_implementation("sdpa")
