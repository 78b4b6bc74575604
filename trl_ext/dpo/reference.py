"""The reference of a DPO run, where it is loaded here and not by TRL: from a path, or in fewer bits."""

from typing import Any

from transformers import PreTrainedModel

from .._trl import create_model_from_path, get_config_model_id
from ..frozen import check_quantizable, quantization
from .config import DPOConfigX


def check_quantized_reference(args: DPOConfigX, model: Any, ref_model: Any, has_adapters: bool) -> None:
    """
    Raises `ValueError`, before anything is loaded, when `ref_model_quantization` has no reference to quantise.

    Args:
        model, ref_model: as given to the trainer.
        has_adapters: whether the policy trains an adapter, so that without a `ref_model` it is its own reference.
    """
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
    """
    The reference from the path `ref_model`, or else from the policy's path, with the policy's options.

    Args:
        quantization_config: the policy's, for a reference without `ref_model_quantization`, as TRL has it.
    """
    kwargs = dict(args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:  # as TRL: these need device_map=None
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if not isinstance(model, str):
        kwargs.setdefault("dtype", model.dtype)
        kwargs.setdefault("attn_implementation", model.config._attn_implementation)
    if args.ref_model_quantization is not None:
        quantization_config = quantization(args.ref_model_quantization, args)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return create_model_from_path(ref_model or _path(model), **kwargs)


def _path(model: Any) -> Any:
    """The path that a policy comes from; the policy itself when it comes from none."""
    return model if isinstance(model, str) else get_config_model_id(model.config) or model
