"""Settings that fit the device and the model: arithmetic, 4-bit weights, gradient checkpointing, compilation."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, convert_outputs_to_fp32
from torch import nn


logger = logging.getLogger(__name__)

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # what transformers calls it, earlier and now


def computes_in_bf16(use_cpu: bool = False) -> bool:
    """Return whether the device is a GPU with bfloat16. A CPU is four times slower in it than in float32."""
    return torch.cuda.is_available() and not use_cpu and torch.cuda.is_bf16_supported()


def keep_4_bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU with AVX512-BF16: no gradient would go through them."""
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def below_autocast(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """
    Within the context, the forward of a prepared model has no autocast of accelerate's, so that a trial can run in
    float32. Afterwards autocast wraps the forward again, with whatever was put around it meanwhile.
    """
    unwrapped = vars(model).pop("_original_forward", None)
    if unwrapped is None:
        yield
        return
    model.forward = unwrapped
    try:
        yield
    finally:
        model._original_forward = model.forward
        model.forward = torch.compiler.disable(convert_outputs_to_fp32(accelerator.autocast()(model.forward)))


def compile_nothing(accelerator: Accelerator, why: str) -> None:
    """Switch off compilation, with a warning, if `torch_compile` or an accelerate file asks for it."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        plugin.backend = DynamoBackend.NO
        logger.warning("`torch_compile` compiles nothing here: %s.", why)


def drop_checkpointing(model: nn.Module, args: Any) -> None:
    """Switch off gradient checkpointing, TRL's default, with a warning, if transformers has none for the family."""
    names = [name for name in CHECKPOINTING if getattr(args, name, False)]
    if names and not getattr(model, "supports_gradient_checkpointing", True):
        for name in names:
            setattr(args, name, False)
        logger.warning(
            "transformers has no gradient checkpointing for %s: `gradient_checkpointing` is switched off. If memory "
            "runs short, take smaller batches per device and more `gradient_accumulation_steps`.",
            type(model).__name__,
        )
