"""
The trial of packed rows: random pairs both ways must give a model's own log-probabilities, as far apart as rounding
alone moves them on that model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._trl import FusedCausalLMOutput
from ..models.probe import arithmetic, rounded_once


# How many times as much as one rounding of the embeddings the two ways may be apart: every layer rounds, too. And in
# nats what is always let pass: the last digits of a log-probability.
ROUNDINGS = 3
LAST_DIGITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Pairs:
    """A batch in TRL's layout, (2B, L) each: chosen, then rejected sequences, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


Scored = Callable[[Pairs], ModelOutput]


def pairs(model: PreTrainedModel, sizes: list[tuple[int, int, int]]) -> Pairs:
    """Return random pairs of `sizes` (common, chosen, rejected) tokens; scored are those that are not common."""
    vocabulary = model.config.get_text_config().vocab_size
    length = max(common + max(tails) for common, *tails in sizes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, len(sizes), length), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (common, *tails) in enumerate(sizes):
        ids[1, i, :common] = ids[0, i, :common]
        for side, tail in enumerate(tails):
            mask[side, i, : common + tail] = 1
            labels[side, i, common : common + tail] = ids[side, i, common : common + tail]
    device = next(model.parameters()).device
    return Pairs(*(x.flatten(0, 1).to(device) for x in (ids, mask, labels)))


def seen(states: Tensor, scores: Tensor | float = 0.0) -> ModelOutput:
    """
    Return what a random direction sees of a trunk's states (2B, L - 1, H), plus scores (2B, 1) that are made of them:
    the answer to a trial of a model that gives no log-probabilities (2B, L - 1).
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    direction = torch.randn(wide.size(-1), generator=torch.Generator().manual_seed(0)).to(wide)
    return FusedCausalLMOutput(log_probs=wide @ (direction / len(direction) ** 0.5) + scores)


@torch.no_grad()
def what_differs(
    model: PreTrainedModel, batch: Pairs, plain: Scored, packed: Scored, gives: str = "log-probabilities"
) -> str | None:
    """
    Return what tells `packed` from `plain`, in words; `None` if it is no more than rounding.

    Args:
        model: what both call.
        plain, packed: the log-probabilities of a batch, (2B, L - 1), and where it is asked for the `aux_loss`.
        gives: what they are, if not log-probabilities, see [`seen`].
    """
    name = type(model).__name__
    expected = plain(batch)
    scored = batch.labels[:, 1:] != -100
    if not torch.isfinite(expected.log_probs[scored]).all():
        return f"{name} gives {gives} that are not finite"
    dtype = arithmetic(model)
    with rounded_once(model, unit_of(dtype, batch.input_ids.device)):
        rounded = plain(batch)
    try:
        got = packed(batch)
    except Exception as error:  # whatever it is, it is a reason
        return f"{name} cannot be run on shared rows ({type(error).__name__}: {error})"
    if got.log_probs[scored].isnan().any():  # as the mask of packed rows is
        return reads_whole_rows(model)
    digits = LAST_DIGITS[dtype]
    off, by_rounding = _apart(got, expected, scored), _apart(rounded, expected, scored)
    if not off <= max(ROUNDINGS * by_rounding, digits):
        unit = " nats" if gives == "log-probabilities" else ""
        return f"{name} gives other {gives} on shared rows ({off:.2g}{unit}; rounding: {by_rounding:.2g})"
    if expected.aux_loss is not None:
        off, by_rounding = ((x.aux_loss - expected.aux_loss).abs().item() for x in (got, rounded))
        if not off <= max(ROUNDINGS * by_rounding, digits):
            return f"{name} gives another load-balancing loss on shared rows ({off:.2g}; rounding: {by_rounding:.2g})"
    return None


def reads_whole_rows(model: PreTrainedModel) -> str:
    """Return what is wrong with a model that computes attention by the mask, in the words of a log line."""
    return f"{type(model).__name__} has an attention of its own, which reads whole rows"


def _apart(one: ModelOutput, other: ModelOutput, scored: Tensor) -> float:
    """Return the mean difference in nats of the chosen or of the rejected completions, whichever is larger."""
    apart = (one.log_probs - other.log_probs).abs().float() * scored
    sides = zip(apart.chunk(2), scored.chunk(2), strict=True)
    return max((side.sum() / counts.sum().clamp(min=1)).item() for side, counts in sides)


def unit_of(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative size of one rounding; TF32's, where products of float32 are computed in it."""
    if dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10
    return torch.finfo(dtype).eps
