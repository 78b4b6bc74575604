"""
The reference of a DPO run, where it is made here and not by TRL: from a path, in fewer bits, or as a copy of the
policy; and the proof that training starts where it stands.
"""

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._trl import create_model_from_path, get_config_model_id, use_adapter
from ..models.adapter_copies import check_copyable
from ..models.loading import init_kwargs, is_quantized
from ..models.probe import ROUNDINGS, apart_in_float32, arithmetic, plain_logps, probe_rows, rounded_once
from ..models.quantization import check_quantizable, quantization
from ..models.sharding import copy_of, is_fsdp, is_partitioned
from .config import DPOConfigX


logger = logging.getLogger(__name__)

# What rounding explains of |log π/π_ref| of a sequence before the first step, in nats per √token: the errors of single
# tokens have either sign. References that were computed in other batches differ by that much; others hardly at all.
# In 16 bits it is measured, by what one rounding does to the model, and lies between two bounds.
ROUNDING, LEAST_16_BIT, MOST_16_BIT = 1e-3, 0.02, 0.2


def check_quantized_reference(args: DPOConfigX, model: Any, ref_model: Any, has_adapters: bool) -> None:
    """Raise `ValueError`, before loading, if `ref_model_quantization` has no reference to quantise."""
    asked = f"`ref_model_quantization={args.ref_model_quantization!r}`"
    if ref_model is None and has_adapters:
        raise ValueError(
            f"{asked} has nothing to quantise: the reference is the policy under another adapter or none. Leave it "
            "out; `quantization_config` quantises their base."
        )
    if ref_model is None and args.precompute_ref_log_probs:
        raise ValueError(
            f"{asked} has nothing to quantise: with `precompute_ref_log_probs` the policy itself is the reference, "
            "before the first step. Switch one of them off."
        )
    name, source = ("model", model) if ref_model is None else ("ref_model", ref_model)
    check_quantizable("ref_model_quantization", _path(source) if ref_model is None else source, name, args)


def load_reference(
    args: DPOConfigX, model: Any, ref_model: str | None, quantization_config: Any = None
) -> PreTrainedModel:
    """Load the reference from the path `ref_model`, or else from the policy's path, with the policy's options."""
    kwargs = init_kwargs(args)
    if ref_model is not None:
        kwargs.pop("revision", None)  # the policy's
    if not isinstance(model, str):
        kwargs.setdefault("dtype", model.dtype)
        kwargs.setdefault("attn_implementation", model.config._attn_implementation)
    if args.ref_model_quantization is not None:
        quantization_config = quantization(args.ref_model_quantization, args)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return create_model_from_path(ref_model or _path(model), **kwargs)


def check_adapter_to_copy(model: Any) -> None:
    """Raise `ValueError` unless TRL can copy a `PeftModel`'s adapter "default" under the name "ref"."""
    if not isinstance(model, PeftModel):
        return
    names, active = list(model.peft_config), list(model.active_adapters)
    found = f"`model` is a {type(model).__name__} with the adapters {names}, of which {active} are active. "
    if active != ["default"]:
        raise ValueError(
            f"{found}Without a `ref_model` the reference is a frozen copy of the adapter that training starts from, "
            "which must be named 'default' and be the active one: leave `adapter_name` out where it is made or "
            "loaded, or pass a `ref_model`."
        )
    if "ref" in names:
        raise ValueError(
            f"{found}The name 'ref' is needed for a frozen copy of 'default', the reference. Remove what an earlier "
            "run has left with `model.delete_adapter('ref')`, or pass a `ref_model`."
        )
    check_copyable(model.peft_config["default"])


def copy_at_start(model: Any, args: DPOConfigX, has_adapters: bool) -> PreTrainedModel | None:
    """
    Return a frozen copy of a policy in memory, to be its reference: TRL would load its folder, which may hold another
    model. `None` where TRL needs none: the policy comes from a path, trains an adapter, or is asked before training.
    """
    is_asked_before = args.precompute_ref_log_probs and not is_fsdp(args.fsdp)
    if isinstance(model, str) or has_adapters or is_asked_before:
        return None
    return copy_of(model).requires_grad_(False).eval()


def require_same_start(
    logratios: Tensor, lengths: Tensor, policy: nn.Module, reference: nn.Module | None, args: DPOConfigX
) -> None:
    """
    Raise `ValueError` if a reference that was not given is another model than the one that training starts from: by
    log-ratios (N,) of completions before the first step, in nats, and their tokens. `reference` is given where it is a
    model of its own.
    """
    typical = (logratios.square() / lengths.clamp(min=1)).mean().sqrt().item()
    if not typical > ROUNDING:  # what is not finite is reported elsewhere
        return
    tolerance = ROUNDING
    is_short = any(p.is_floating_point() and p.element_size() < 4 for p in policy.parameters())
    rounds_to_16_bits = args.bf16 or args.fp16 or args.tf32 or is_quantized(policy) or is_short
    if rounds_to_16_bits and not _differ_in_float32(policy, reference, args):
        tolerance = _rounding_in_16_bits(policy, args) if typical > LEAST_16_BIT else LEAST_16_BIT
    if not typical > tolerance:
        return
    found = (
        f"before the first step log π/π_ref of {len(logratios)} completions is {logratios.abs().mean().item():.3g} "
        f"nats in the mean, where rounding explains {tolerance * lengths.float().sqrt().mean().item():.2g}"
    )
    if reference is None and _has_virtual_tokens(policy):
        logger.warning("The adapter's virtual tokens change the model before they have learnt anything: %s.", found)
        return
    raise ValueError(
        "Without a `ref_model` the reference must be the model that training starts from; but "
        f"{found}. " + _what_differs(policy, reference, args)
    )


def _differ_in_float32(policy: Any, reference: nn.Module | None, args: DPOConfigX) -> bool:
    """Return whether policy and reference are seen to be two models without the rounding of the run."""
    is_spread = is_fsdp(args.fsdp) or is_partitioned(policy)
    if is_spread or args.precompute_ref_log_probs or _has_virtual_tokens(policy):
        return False
    if reference is not None:
        return bool(apart_in_float32(policy, reference))
    adapter = "ref" if "ref" in policy.peft_config else None
    return bool(apart_in_float32(policy, policy, lambda: use_adapter(policy, adapter)))


@torch.no_grad()
def _rounding_in_16_bits(policy: Any, args: DPOConfigX) -> float:
    """Return what rounding explains, in nats per √token, in the arithmetic of the run."""
    if is_fsdp(args.fsdp) or is_partitioned(policy):
        return MOST_16_BIT
    rows = probe_rows(policy)
    try:
        expected = plain_logps(policy, rows)
        with rounded_once(policy, torch.finfo(arithmetic(policy)).eps):
            moved = (plain_logps(policy, rows) - expected).square().mean().sqrt().item()
    except Exception:  # of the family's own code, which asks for more than ids
        return MOST_16_BIT
    return min(max(ROUNDINGS * moved, LEAST_16_BIT), MOST_16_BIT)


def _what_differs(policy: Any, reference: nn.Module | None, args: DPOConfigX) -> str:
    if isinstance(policy, PeftModel) and "ref" not in policy.peft_config:
        starts = {name: getattr(config, "init_lora_weights", None) for name, config in policy.peft_config.items()}
        adapters = ", ".join(
            f"{name!r}: {type(policy.peft_config[name]).__name__}"
            + ("" if start is None else f" with `init_lora_weights={start!r}`")
            for name, start in starts.items()
        )
        return (
            f"It is the policy without its adapter ({adapters}), which changes the model before it has learnt "
            "anything. Start from an adapter that is 0 (LoRA's default), or give `ref_model`: the path or a copy of "
            "the model to hold the policy to."
        )
    if reference is None:
        made = "computed" if args.precompute_ref_log_probs else "made"
        return (
            f"It was {made} when the trainer was made, so the policy was changed after that, or its forward pass is "
            "not deterministic. Change a model before it is given to the trainer."
        )
    names = [] if is_partitioned(policy) else _other_weights(policy, reference)
    if names:
        return (
            f"{len(names)} weights differ, the first is {names[0]}: the checkpoint lacks it, so that it is drawn at "
            "random each time it is loaded, or the policy was changed after the trainer was made. Load and change the "
            "policy first and pass it as `model`; the reference is then a copy of it."
        )
    return (
        "Their weights are equal, so the forward pass is not deterministic, or another one in training than in "
        "evaluation: look for noise in the model's config, such as a router's jitter, and switch it off."
    )


def _has_virtual_tokens(policy: Any) -> bool:
    return any(config.is_prompt_learning for config in getattr(policy, "peft_config", {}).values())


def _other_weights(policy: nn.Module, reference: nn.Module) -> list[str]:
    own = dict(policy.named_parameters())
    return [
        name
        for name, weight in reference.named_parameters()
        if name not in own
        or own[name].shape != weight.shape
        or not torch.equal(own[name].detach().to(weight.device, weight.dtype), weight)
    ]


def _path(model: Any) -> Any:
    """Return the path that a policy comes from; the policy itself when it comes from none."""
    return model if isinstance(model, str) else get_config_model_id(model.config) or model
