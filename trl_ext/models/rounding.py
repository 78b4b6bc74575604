"""Warnings about 16-bit weights: in full training most steps of a usual size round to nothing."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)

SAMPLED = 4096  # elements of a parameter that are looked at
ENOUGH = 0.5


@torch.no_grad()
def moving_share(parameters: Iterable[nn.Parameter], step: float) -> float | None:
    """
    Return the share of 16-bit elements that a change of `step` moves: those whose neighbouring numbers are less than 2
    · `step` away; `None` without such elements. Adam's steps seldom exceed the learning rate.
    """
    moving = total = 0.0
    for parameter in parameters:
        if parameter.dtype not in (torch.bfloat16, torch.float16) or parameter.numel() == 0:
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED)]
        stays = (values.float() - step).to(values.dtype) == values
        stays &= (values.float() + step).to(values.dtype) == values
        moving += parameter.numel() * (1 - stays.float().mean().item())
        total += parameter.numel()
    return moving / total if total else None


def warn_of_casting(trainer: Any) -> None:
    """Warn before an evaluation outside of training for which the Trainer will cast the model for good."""
    names = [name for name in ("fp16_full_eval", "bf16_full_eval") if getattr(trainer.args, name)]
    is_wide = any(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    if names and is_wide and not trainer.is_in_train:
        logger.warning(
            "`%s` casts the weights to 16 bits for good in an evaluation outside of training: what is trained or "
            "saved after it has them. Leave it out, or evaluate after saving.",
            names[0],
        )


def warn_of_rounding(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    has_master_weights: bool,
    what: str,
    option: str = "learning_rate",
) -> None:
    """
    Warn if a step of the learning rate, set by `option`, moves less than half of the 16-bit weights that the role
    `what` trains; not where the optimizer keeps float32 weights of its own, as DeepSpeed's does.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if has_master_weights or not learning_rate > 0:
        return
    share = moving_share(trained, learning_rate)
    if share is None or share >= ENOUGH:
        return
    dtype = str(next(p.dtype for p in trained if p.dtype in (torch.bfloat16, torch.float16))).removeprefix("torch.")
    logger.warning(
        f"The weights of the {what} are trained in {dtype}, and a step of {option}={learning_rate:.2g} moves "
        f"{share:.0%} of them: for the rest it is less than half the distance to the next number, and rounds to "
        "nothing. Keep the weights in float32 (`dtype='float32'`) and compute in bfloat16 (`bf16=True`), or train an "
        "adapter, or raise the learning rate."
    )
