"""
Attention over shared rows in one kernel: FlexAttention, on CUDA.

The blocks of a row that hold no visible score are never computed, and those that hold only visible ones need no mask.
Both follow from the spans alone, without a mask of T × T. Whether the kernel can be compiled, and computes what the
pieces compute, forward and backward, is tried out once for every model.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .segments import SharedRows, Span, membership


BLOCK = 128
# The largest relative difference in norm that rounding explains; on CUDA float32 may be multiplied as TF32.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-8}
TOLERANCE_16_BIT = 3e-2


class Blocks:
    """The block masks of some rows, one for each window that a layer asks for; `None` is none."""

    def __init__(self, shared: SharedRows):
        self.shared = shared
        self.masks: dict[int | None, BlockMask] = {}

    def __getitem__(self, window: int | None) -> BlockMask:
        if window is not None and self.shared.longest <= window:
            window = None
        if window not in self.masks:
            self.masks[window] = block_mask_of(self.shared, window)
        return self.masks[window]


def block_mask_of(shared: SharedRows, window: int | None = None) -> BlockMask:
    """The mask of `segments.attention_mask_of` in blocks of 128 × 128 scores."""
    width = shared.input_ids.size(1)
    device = shared.input_ids.device
    touched, whole = zip(*(_blocks(row, width, window) for row in shared.rows), strict=True)
    seen_in_part = torch.stack(touched) & ~torch.stack(whole)
    (pair, tail), position = membership(shared), shared.position_ids

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_sequence = (tail[row, key] == -1) | (tail[row, query] == tail[row, key])
        return (query >= key) & (pair[row, query] == pair[row, key]) & in_sequence

    def sees_near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = position[row, query] - position[row, key] < window  # type: ignore[operator]
        return sees(row, head, query, key) & near

    return BlockMask.from_kv_blocks(
        *_indices(seen_in_part, device),
        *_indices(torch.stack(whole), device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if window is None else sees_near,
        seq_lengths=(width, width),
    )


def _blocks(row: tuple[Span, ...], width: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """(n, n) each, n blocks of a row: which hold a visible score, and which hold no other."""
    count = -(-width // BLOCK)
    touched, whole = torch.zeros(2, count, count, dtype=torch.bool)
    lower = torch.ones(count, count, dtype=torch.bool).tril()
    start = 0
    padding = Span(width - sum(span.size for span in row), 0, 0)
    for span in (*row, padding):
        window = None if span is padding else window  # padding is at position 0 throughout
        tail, end = start + span.common + span.chosen, start + span.size
        for first, last in ((start, tail), (tail, end)):  # two triangles
            if last > first:
                near, inner = _covering(first, last), _inside(first, last)
                touched[near, near] |= (lower & _nearer(count, window, 1 - BLOCK))[near, near]
                whole[inner, inner] |= (lower.tril(-1) & _nearer(count, window, BLOCK - 1))[inner, inner]
        if span.rejected and span.common:  # and between them a rectangle, which the chosen tokens hold apart
            reach = None if window is None else window + span.chosen
            near, inner = _covering(tail, end), _inside(tail, end)
            common, whole_common = _covering(start, start + span.common), _inside(start, start + span.common)
            touched[near, common] |= _nearer(count, reach, 1 - BLOCK)[near, common]
            whole[inner, whole_common] = _nearer(count, reach, BLOCK - 1)[inner, whole_common]
        start = end
    return touched, whole


def _nearer(count: int, window: int | None, apart: int) -> Tensor:
    """(count, count): whether query and key are less than `window` places apart, `apart` more than their blocks."""
    first = torch.arange(count) * BLOCK
    return first[:, None] - first + apart < (window if window is not None else count * BLOCK * 2)


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


def why_not(
    heads: Iterable[tuple], dtype: torch.dtype, device: torch.device, pieces: Callable[..., Tensor]
) -> str | None:
    """
    Why FlexAttention cannot stand in for `pieces` at these heads; `None` if it gives the same outputs and gradients.

    Args:
        heads: what the layers of a model ask for, each an `attention.Heads`.
        dtype: of queries, keys and values.
        pieces: (query, key, value, shared rows, scaling, window) -> (R, T, heads, E).
    """
    return next(filter(None, (_why_not_for(each, dtype, device, pieces) for each in dict.fromkeys(heads))), None)


def _why_not_for(heads: tuple, dtype: torch.dtype, device: torch.device, pieces: Callable[..., Tensor]) -> str | None:
    queries, keys, width, value_width, scaling, window = heads
    rows, leaves = _example(queries, keys, width, value_width, dtype, device)
    try:
        blocks = block_mask_of(rows, window)
        got = _output_and_gradients(lambda q, k, v: attend(q, k, v, blocks, scaling), leaves)
    except Exception as error:  # a kernel that cannot be compiled here is no reason to stop
        return f"{type(error).__name__}: {error}"
    expected = _output_and_gradients(lambda q, k, v: pieces(q, k, v, rows, scaling, window), leaves)
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    return None if off <= tolerance else f"it is off by {off:.2g}, more than {tolerance}"


def _example(
    queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, device: torch.device
) -> tuple[SharedRows, list[Tensor]]:
    """A pair over several blocks, with padding behind it, and random queries, keys and values for it."""
    span = Span(common=150, chosen=150, rejected=280)
    size = span.size + 20
    ids = torch.zeros(1, size, dtype=torch.long, device=device)
    positions = torch.arange(size, device=device)
    positions[span.common + span.chosen :] -= span.chosen
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, count, size, dim, generator=generator).to(device, dtype).requires_grad_()
        for count, dim in ((queries, width), (keys, width), (keys, value_width))
    ]
    return SharedRows(ids, positions[None], ((span,),), ids), leaves


def _output_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        output = function(*leaves)[:, :-20]  # without padding
        return [x.float() for x in (output.detach(), *torch.autograd.grad(output.square().sum(), leaves))]
