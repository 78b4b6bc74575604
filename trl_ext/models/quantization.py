"""Frozen models in 8 or 4 bits, and the checks whether they can be moved or quantised."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from .loading import is_quantized, source_options
from .sharding import is_fsdp, is_stage3


QUANTIZATIONS = (None, "8bit", "4bit")


def quantization(bits: str, args: Any) -> BitsAndBytesConfig:
    """
    Return bitsandbytes' config of a frozen model: "8bit" (LLM.int8, Dettmers 2022) or "4bit" (NF4 with quantised
    constants, about 4.13 bits per weight; QLoRA, Dettmers 2023), computing in the dtype of the run.
    """
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
    )


def spread_by(args: Any) -> str | None:
    """Return what partitions every model of the run over the ranks, frozen ones too; `None` when nothing does."""
    if is_stage3(args.deepspeed_plugin):
        return "DeepSpeed ZeRO-3"
    return "FSDP" if is_fsdp(args.fsdp) else None


def check_quantizable(option: str, model: str | nn.Module, argument: str, args: Any) -> None:
    """
    Raise `ValueError` if a frozen model, given as `argument`, cannot be loaded in the bits that `option` asks for: it
    is in memory, an adapter, quantised already, or partitioned by ZeRO-3 or FSDP. `ImportError` without bitsandbytes.
    """
    asked = f"`{option}={getattr(args, option)!r}`"
    if not isinstance(model, str):
        raise ValueError(
            f"{asked} quantises a model while it is loaded, and `{argument}` is a {type(model).__name__} in memory. "
            f"Pass its path, or load it with a `quantization_config` yourself and leave `{option}` out."
        )
    if (Path(model) / "adapter_config.json").exists():
        raise ValueError(
            f"{asked} cannot quantise the adapter in {model!r}: it takes the bits of its base, which "
            f"`quantization_config` sets. Leave `{option}` out."
        )
    if spread_by(args) is not None:
        raise ValueError(
            f"{asked} does not go together with {spread_by(args)}, which partitions this frozen model over the ranks "
            f"already: it cannot cut a bitsandbytes weight. Leave `{option}` out, or use ZeRO-2 or DDP."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"{asked} needs bitsandbytes: `pip install 'trl-ext[qlora]'`.")
    if is_quantized(model, **source_options(args)):
        raise ValueError(f"{asked}: the checkpoint {model!r} is quantised already. Leave `{option}` out.")
