"""
Attention over rows of segments in one kernel: FlexAttention, on CUDA.

The blocks of a row that hold no visible score are never computed, and those that hold only visible ones need no mask.
Both follow from the segments, without a mask of T × T. Whether the kernel can be compiled, and computes what the
pieces compute, forward and backward, is tried out once for every model.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .segments import PackedRows, Segment


BLOCK = 128
# The largest relative difference in norm that rounding explains; on CUDA float32 may be multiplied as TF32.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-8}
TOLERANCE_16_BIT = 3e-2


class Blocks:
    """The block masks of some rows, one for each window that a layer asks for; `None` is none."""

    def __init__(self, rows: PackedRows):
        self.rows = rows
        self.masks: dict[int | None, BlockMask] = {}

    def __getitem__(self, window: int | None) -> BlockMask:
        if window is not None and self.rows.longest <= window:
            window = None
        if window not in self.masks:
            self.masks[window] = block_mask_of(self.rows, window)
        return self.masks[window]


def block_mask_of(rows: PackedRows, window: int | None = None) -> BlockMask:
    """Return the mask of `segments.attention_mask_of` in blocks of 128 × 128 scores."""
    width = rows.input_ids.size(1)
    until, position = rows.until, rows.position_ids
    touched, whole = _blocks(until, position, window)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < until[row, key])

    def sees_near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = position[row, query] - position[row, key] < window  # type: ignore[operator]
        return sees(row, head, query, key) & near

    return BlockMask.from_kv_blocks(
        *_indices(touched & ~whole),
        *_indices(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if window is None else sees_near,
        seq_lengths=(width, width),
    )


def _blocks(until: Tensor, position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """
    (R, T) each -> (R, n, n) each, n blocks of a row: which blocks of queries and keys may hold a visible score, and
    which hold no other.
    """
    rows, width = until.shape
    count = -(-width // BLOCK)
    until, position = (F.pad(x, (0, count * BLOCK - width)).view(rows, count, BLOCK) for x in (until, position))
    places = torch.arange(count * BLOCK, device=until.device).view(count, BLOCK)
    first = places[:, 0]
    later = first[:, None] > first  # the queries stand behind the keys
    # Of a block of keys, the latest place that sees one of them, and the last that sees them all.
    touched = later & (until.amax(-1)[:, None, :] > first[:, None])
    whole = later & (until.amin(-1)[:, None, :] >= first[:, None] + BLOCK)
    if window is not None:
        # Only queries that see one of the keys tell how near they are: another sequence may begin in the same block.
        may_see = places[:, None] < until.amax(-1)[:, None, :, None]
        lowest = position[:, :, None].where(may_see, count * BLOCK).amin(-1)
        touched &= lowest - position.amax(-1)[:, None, :] < window
        whole &= position.amax(-1)[:, :, None] - position.amin(-1)[:, None, :] < window
    return touched | torch.eye(count, dtype=torch.bool, device=until.device), whole


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(R, n, n) -> how many key blocks each query block reads (R, 1, n), and which, these first (R, 1, n, n)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[:, None], order.int()[:, None]


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)  # rows have another length every time


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    return lambda score, *_: softcap * torch.tanh(score / softcap)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend: query (R, heads, T, D), key and value (R, key-value heads, T, D) -> (R, T, heads, D)."""
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.size(1) != key.size(1)}
    if softcap is not None:
        options["score_mod"] = _capped(softcap)
    if sinks is None:
        output = _kernel()(query, key, value, block_mask=blocks, **options)
    else:  # a sink adds to the sum that the weights are divided by
        asked = torch.nn.attention.flex_attention.AuxRequest(lse=True)  # of torch 2.9
        output, beside = _kernel()(query, key, value, block_mask=blocks, return_aux=asked, **options)
        output = output * torch.sigmoid(beside.lse - sinks[:, None]).unsqueeze(3).to(output.dtype)
    return output.transpose(1, 2).contiguous()


def why_not(
    heads: Iterable[tuple], dtype: torch.dtype, device: torch.device, pieces: Callable[..., Tensor]
) -> str | None:
    """
    Say why FlexAttention cannot stand in for `pieces` at these heads; `None` if outputs and gradients are the same.

    Args:
        heads: what the layers of a model ask for, each an `attention.Heads`.
        dtype: of queries, keys and values.
        pieces: (query, key, value, rows, scaling, window, softcap, sinks) -> (R, T, heads, E).
    """
    rows = example(device)
    for queries, keys, width, value_width, scaling, window, softcap, has_sinks in dict.fromkeys(heads):
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(1, count, rows.input_ids.size(1), dim, generator=generator).to(device, dtype).requires_grad_()
            for count, dim in ((queries, width), (keys, width), (keys, value_width))
        ]
        sinks = torch.randn(queries, generator=generator).to(device, dtype) if has_sinks else None
        try:
            blocks = block_mask_of(rows, window)
            got = _output_and_gradients(attend, leaves, blocks, scaling, softcap, sinks)
        except Exception as error:  # a kernel that cannot be compiled here is no reason to stop
            return f"{type(error).__name__}: {error}"
        expected = _output_and_gradients(pieces, leaves, rows, scaling, window, softcap, sinks)
        off = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
        tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BIT)
        if not off <= tolerance:
            return f"it is off by {off:.2g}, more than {tolerance}"
    return None


def example(device: torch.device) -> PackedRows:
    """Return a pair over several blocks, with 20 tokens of padding behind it."""
    ids = torch.zeros(1, 600, dtype=torch.long, device=device)
    return PackedRows(ids, ((Segment(150), Segment(150, 0), Segment(280, 0)),), ids)


def _output_and_gradients(attend: Callable[..., Tensor], leaves: list[Tensor], *args: Any) -> list[Tensor]:
    with torch.enable_grad():
        output = attend(*leaves, *args)[:, :-20]  # without padding
        return [x.float() for x in (output.detach(), *torch.autograd.grad(output.square().sum(), leaves))]
