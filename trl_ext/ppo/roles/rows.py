"""
The rows in which a model reads the sequences of a batch: side by side without padding where that is exact, else each
padded in a row of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...models.sharding import is_partitioned
from ...packing.forward import PackedForward
from .padding import LeftPadding


@contextmanager
def reading(
    trunk: nn.Module,
    packing: PackedForward,
    padding: LeftPadding,
    groups: Sequence[Sequence[int]],
    positions: Tensor,
    inputs: dict[str, Any],
    trial: bool = False,
) -> Iterator[tuple[dict[str, Any], Callable[[Tensor], Tensor]]]:
    """
    Within the context `trunk` reads packed rows; where these are off, or a sequence is too long for them, each
    sequence in a row of its own, with no more padding than the longest needs.

    Args:
        groups: the sequences by their prompts; those of a group stand in one row.
        positions (B, L - 1): which states are read.
        inputs: `input_ids` and `attention_mask` (B, L), and what else the model takes.
        trial: whether packed rows are tried out, which leaves no other way.

    Yields:
        What to call the model with, and the function from the trunk's last states to those N that are read, (N, H).
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if is_partitioned(trunk):  # the passes of the trial: another rank may pad this batch already
        padding.settle()
    rows = packing.lay_out(ids, mask, groups) if packing.on or trial else None
    if rows is not None:
        places = rows.packed_index[:, :-1][positions]
        with packing.reading(trunk, rows) as of_rows:
            yield inputs | of_rows, lambda states: states.flatten(0, 1)[places]
        return
    if trial:
        raise ValueError("the sequences that are tried out are longer than the limits found so far")
    needed = mask.any(0)
    needed[:-1] |= positions.any(0)
    needed[1:] |= positions.any(0)  # the token that a state predicts
    first, last = int(needed.int().argmax()), len(needed) - int(needed.flip(0).int().argmax())
    trimmed = {
        name: x[:, first:last] if isinstance(x, Tensor) and x.shape[:2] == ids.shape else x
        for name, x in inputs.items()
    }
    read = positions[:, first : last - 1]
    yield padding.inputs(trimmed), lambda states: states[:, :-1][read]
