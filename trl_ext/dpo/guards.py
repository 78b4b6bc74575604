"""The checks of a DPO run's models and losses."""

from typing import Any

import torch
from torch import Tensor


def check_vocabularies(policy: Any, reference: Any, name: str = "ref_model") -> None:
    """Raise `ValueError` if policy and reference, by their text configs, do not share a vocabulary."""
    if policy.vocab_size != reference.vocab_size:
        raise ValueError(
            f"The policy has a vocabulary of {policy.vocab_size} tokens and `{name}` one of {reference.vocab_size}. "
            "The implicit reward compares the probabilities of the same tokens: give the model that the policy "
            "started from."
        )


def require_finite(
    loss: Tensor,
    logps: Tensor,
    logratios: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    tokenizer: Any,
    step: int,
) -> None:
    """
    Raise `FloatingPointError` for a loss that is NaN or infinite, with the step and the pair it comes from; logps and
    log-ratios to the reference are (2B,), of chosen, then rejected completions.
    """
    if torch.isfinite(loss):
        return
    if torch.isfinite(logps).all() and not torch.isfinite(logratios).all():
        cure = (
            "The policy's own log-probabilities are finite: it is the reference that gives others. It does not learn, "
            "so look at its weights and its dtype."
        )
    else:
        cure = (
            "A lower learning rate, or bfloat16 instead of float16, is the usual cure; before the first step, look at "
            "the weights that were loaded."
        )
    chosen, rejected = logratios.chunk(2)
    margins = chosen - rejected
    broken = (~torch.isfinite(margins)).nonzero().flatten().tolist()
    pair = broken[0] if broken else int(margins.abs().argmax())
    text = tokenizer.decode(input_ids[pair][attention_mask[pair].bool()][:64])
    raise FloatingPointError(
        f"The loss is {loss.item()} after {step} optimizer steps. Pair {pair} of the batch has log-ratios of "
        f"{chosen[pair].item():.4g} (chosen) and {rejected[pair].item():.4g} (rejected) to the reference; its chosen "
        f"sequence begins {text!r}. Nothing of this batch was learnt. {cure}"
    )
