"""
Attention over shared rows in one kernel: FlexAttention, on CUDA.

The blocks of a row that hold no visible score are never computed, and those that hold only visible ones need no mask.
Both follow from the spans alone, without a mask of T × T. Whether the kernel can be compiled, and computes what the
pieces compute, forward and backward, is tried out once for every model.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .prefix_sharing import SharedRows, Span, membership


BLOCK = 128
# The largest relative difference in norm that rounding explains; on CUDA float32 may be multiplied as TF32.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-8}
TOLERANCE_16_BIT = 3e-2


def block_mask_of(shared: SharedRows) -> BlockMask:
    """The mask of `prefix_sharing.attention_mask_of` in blocks of 128 × 128 scores."""
    width = shared.input_ids.size(1)
    device = shared.input_ids.device
    touched, whole = zip(*(_blocks(row, width) for row in shared.rows), strict=True)
    seen_in_part = torch.stack(touched) & ~torch.stack(whole)
    pair, tail = membership(shared)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_sequence = (tail[row, key] == -1) | (tail[row, query] == tail[row, key])
        return (query >= key) & (pair[row, query] == pair[row, key]) & in_sequence

    return BlockMask.from_kv_blocks(
        *_indices(seen_in_part, device),
        *_indices(torch.stack(whole), device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(width, width),
    )


def _blocks(row: tuple[Span, ...], width: int) -> tuple[Tensor, Tensor]:
    """(n, n) each, n blocks of a row: which hold a visible score, and which hold no other."""
    count = -(-width // BLOCK)
    touched, whole = torch.zeros(2, count, count, dtype=torch.bool)
    lower = torch.ones(count, count, dtype=torch.bool).tril()
    start = 0
    for span in (*row, Span(width - sum(span.size for span in row), 0, 0)):  # the last one is padding
        tail, end = start + span.common + span.chosen, start + span.size
        for first, last in ((start, tail), (tail, end)):  # two triangles
            if last > first:
                near, inner = _covering(first, last), _inside(first, last)
                touched[near, near] |= lower[near, near]
                whole[inner, inner] |= lower[inner, inner].tril(-1)
        if span.rejected and span.common:  # and between them a rectangle
            touched[_covering(tail, end), _covering(start, start + span.common)] = True
            whole[_inside(tail, end), _inside(start, start + span.common)] = True
        start = end
    return touched, whole


def _covering(first: int, last: int) -> slice:
    return slice(first // BLOCK, -(-last // BLOCK))


def _inside(first: int, last: int) -> slice:
    return slice(-(-first // BLOCK), max(last // BLOCK, -(-first // BLOCK)))


def _indices(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, n, n) -> how many key blocks each query block reads (R, 1, n), and which, these first (R, 1, n, n)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[:, None].to(device), order.int()[:, None].to(device)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)  # rows have another length every time


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float | None = None) -> Tensor:
    """Query (R, heads, T, D), key and value (R, key-value heads, T, D) -> (R, T, heads, D)."""
    grouped = query.size(1) != key.size(1)
    output = _kernel()(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


def why_not(model: Any, device: torch.device, pieces: Callable[..., Tensor]) -> str | None:
    """
    Why FlexAttention cannot stand in for `pieces` at the heads of `model`; `None` if it gives the same outputs and
    gradients.

    Args:
        pieces: (query, key, value, shared rows) -> (R, T, heads, D).
    """
    rows, leaves = _example(model, device)
    try:
        blocks = block_mask_of(rows)
        got = _output_and_gradients(lambda q, k, v: attend(q, k, v, blocks), leaves)
    except Exception as error:  # a kernel that cannot be compiled here is no reason to stop
        return f"{type(error).__name__}: {error}"
    expected = _output_and_gradients(lambda q, k, v: pieces(q, k, v, rows), leaves)
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    return None if off <= tolerance else f"it is off by {off:.2g}, more than {tolerance}"


def _example(model: Any, device: torch.device) -> tuple[SharedRows, list[Tensor]]:
    """A pair over several blocks, with padding behind it, and random queries, keys and values for it."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    span = Span(common=150, chosen=150, rejected=280)
    width = span.size + 20
    ids = torch.zeros(1, width, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, count, width, size, generator=generator).to(device, model.dtype).requires_grad_()
        for count in (heads, *[getattr(config, "num_key_value_heads", None) or heads] * 2)
    ]
    return SharedRows(ids, ids, ((span,),), ids), leaves


def _output_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        output = function(*leaves)[:, :-20]  # without padding
        return [x.float() for x in (output.detach(), *torch.autograd.grad(output.square().sum(), leaves))]
