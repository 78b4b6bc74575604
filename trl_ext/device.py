"""Which arithmetic fits the device."""

from typing import Any

import torch
from torch import nn


def computes_in_bf16(use_cpu: bool = False) -> bool:
    """
    Whether the device is a GPU that computes in bfloat16. A CPU is about four times slower in it than in float32.
    """
    return torch.cuda.is_available() and not use_cpu and torch.cuda.is_bf16_supported()


def keep_4_bit_differentiable(model: nn.Module) -> None:
    """
    Keeps bitsandbytes from repacking 4-bit weights for a CPU with AVX512-BF16. It does so in the first pass in eval
    mode, for good, and no gradient goes through the repacked weights: an adapter below them would learn from the
    residual stream alone.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
