"""TRL's fused LM head on the scored positions alone: what both trainers score with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .._trl import scoring_head
from .cpu_head import TokenLogProbs


@contextmanager
def score_only(trunk: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """
    Within the context, `trunk` returns `select(last_hidden_state)`, (N, H), as one row (1, N, H), so that TRL's fused
    head scores these N states alone, in one pass; plain heads on CPU are scored by [`TokenLogProbs`]. Yields a list,
    to which the states (N, H) are appended.
    """
    kept: list[Tensor] = []

    def compact(module, args, output):
        states = select(output.last_hidden_state)
        kept.append(states)
        output.last_hidden_state = states[None]
        return output

    handle = trunk.register_forward_hook(compact)
    try:
        with scoring_head(TokenLogProbs):
            yield kept
    finally:
        handle.remove()
