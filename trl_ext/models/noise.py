"""
Switching off noise, so that a model computes the same twice: dropout, layer drop and router jitter are set to 0, and
modules that still draw random numbers are found by trial and kept in evaluation mode.

Ratio 1 and KL 0 at the start, and every log-ratio after it, assume a policy without noise.
"""

import logging
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .probe import in_mode, probe_rows


logger = logging.getLogger(__name__)

# Attributes with the probability of a dropout or the width of a jitter, one number or one per adapter. Not
# `router_jitter_noise`: Phi-MoE compares scores with it, in evaluation too.
STRENGTHS = re.compile(r"drop|^(input_)?jitter_noise$|^moe_jitter_eps$")

# How often noise is looked for: a module within one that draws shows only after the outer one has stopped.
ROUNDS = 5


def _strengths(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield module, name and value of each strength of noise: of every kind of `nn.Dropout`, and plain attributes."""
    for module in model.modules():
        of_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if STRENGTHS.search(name) or (of_dropout and name == "p"):
                yield module, name, value


def disable_noise(model: nn.Module) -> None:
    """Set the strength of every module's noise to 0."""
    for module, name, value in _strengths(model):
        if isinstance(value, float):
            setattr(module, name, 0.0)
        elif isinstance(value, dict) and all(isinstance(each, float) for each in value.values()):
            value.update(dict.fromkeys(value, 0.0))  # LoHa and LoKr, by adapter


def has_noise(model: nn.Module) -> bool:
    """Return whether the strength of some module's noise is above 0."""
    for _, _, value in _strengths(model):
        values = list(value.values()) if isinstance(value, dict) else [value]
        if any(isinstance(each, float) and each > 0 for each in values):
            return True
    return False


@torch.no_grad()
def draws_noise(model: nn.Module) -> bool:
    """Return whether a model draws random numbers in training mode, found by trying it."""
    row = probe_rows(model)[0]
    with in_mode(model, training=True):
        return bool(_drawing(model, lambda: model(input_ids=row, use_cache=False).logits))


@torch.no_grad()
def silence(model: nn.Module, name: str, answer: Callable[[], Tensor], allowed: float) -> None:
    """
    Switch off the noise of a model's training mode. Modules that still draw random numbers after [`disable_noise`]
    compute as in evaluation mode from now on; a warning names them. `answer` runs the model on the same rows each
    time, and rounding explains a mean difference of `allowed`.

    Raises:
        ValueError: when training mode still gives another answer than evaluation mode, or the answer is NaN.
    """
    disable_noise(model)
    with in_mode(model, training=True):
        for _ in range(ROUNDS):
            drawing = _drawing(model, answer)
            if not drawing:
                break
            kinds = ", ".join(sorted({type(module).__name__ for module in drawing.values()}))
            logger.warning(
                f"{name} draws random numbers while it is trained, in {kinds} ({len(drawing)} modules, the first is "
                f"`{next(iter(drawing))}`). These compute as in evaluation mode."
            )
            for module in drawing.values():
                module.register_forward_pre_hook(_as_in_evaluation)
        training, again = answer(), answer()
    with in_mode(model, training=False):
        evaluating = answer()
    require_numbers(evaluating, name)
    difference = max((training - evaluating).abs().mean().item(), (training - again).abs().mean().item())
    if not difference <= allowed:
        source = f", in {', '.join(drawing)[:200]}" if drawing else ""
        raise ValueError(
            f"{name} does not compute the same twice{source}: log-probabilities of training and evaluation mode, or "
            f"of two passes, differ by {difference:.2g} nats on average ({allowed:.2g} would be rounding). The ratio "
            "and the KL would measure that noise. Switch it off in the model's config."
        )


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.training = False  # before each forward pass, as every step calls `model.train()`; children keep their mode


def require_numbers(answer: Tensor, name: str) -> None:
    """Raise `ValueError` for NaN in a model's answer, before a comparison blames something else."""
    if answer.isnan().any():
        raise ValueError(f"{name} gives NaN before it has been trained here: look at its weights and its dtype.")


def _drawing(model: nn.Module, answer: Callable[[], Tensor]) -> dict[str, nn.Module]:
    """Return by name the modules that draw random numbers during `answer()` themselves, not through a child."""
    found: dict[str, nn.Module] = {}
    states: list[list[Any]] = []  # of the modules that are running: [random state on entry, a child has drawn]
    names = {module: name for name, module in model.named_modules()}
    device = next(model.parameters()).device

    def enter(module: nn.Module, args: Any) -> None:
        states.append([_random_state(device), False])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        before, child_has = states.pop()
        if _random_state(device) == before:
            return
        if states:
            states[-1][1] = True
        if not child_has:
            found[names[module] or type(module).__name__] = module

    handles = [module.register_forward_pre_hook(enter, prepend=True) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        answer()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _random_state(device: torch.device) -> tuple[Any, ...]:
    of_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), of_device, random.getstate()
