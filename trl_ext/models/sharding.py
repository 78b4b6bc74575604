"""
Weights that are spread over the ranks. DeepSpeed's ZeRO: checks of its file against the options, and copies of models
that stage 3 has partitioned. FSDP2: what it cannot do here, and whole weights while a model generates.
"""

import copy
import functools
import inspect
import os
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .loading import base_of, is_quantized


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def check_batch_fields(args: Any, counting: str) -> None:
    """Raise `ValueError` when a DeepSpeed file's batch sizes differ from the options', which `counting` names."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    micro_batch, steps, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    needed = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro_batch * steps * ranks,
    }
    written = {name: plugin.hf_ds_config.config.get(name, "auto") for name in needed}
    wrong = {name: value for name, value in written.items() if value not in ("auto", needed[name])}
    if not wrong:
        return
    whole = written["train_batch_size"]
    uneven = f" {ranks} processes do not divide {whole}." if "train_batch_size" in wrong and whole % ranks else ""
    raise ValueError(
        f"The DeepSpeed file has {_listed(wrong)}, and the options make {_listed({k: needed[k] for k in wrong})}: "
        f"{micro_batch} at a time, {steps} times per optimizer step ({counting}), on {ranks} processes.{uneven} Write "
        '"auto" for these fields in the file (one that is missing counts as 1), or change the options.'
    )


def forget_gradients(parameters: Iterable[Any]) -> None:
    """
    Set what ZeRO-3 keeps of the last gradients to 0. It would count them where the next backward pass gives none, in
    the norm by which it clips.
    """
    from deepspeed.utils import safe_set_local_grad

    for parameter in parameters:
        if parameter.requires_grad:
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def check_own_sections(plugin: Any, **unread: dict[str, Any]) -> None:
    """
    Raise `ValueError` when the DeepSpeed file's own optimizer or scheduler would ignore options that are set.

    Args:
        unread: by section of the file, the options by name; None is not set.
    """
    for section, options in unread.items():
        ignored = [name for name, value in options.items() if value is not None]
        if plugin is not None and section in plugin.hf_ds_config.config and ignored:
            raise ValueError(
                f"The DeepSpeed file has an `{section}` of its own, which would ignore {ignored}. Remove `{section}` "
                "from the file; the options then choose it (`optim`, `learning_rate`, `lr_scheduler_type`)."
            )


def check_passes_of_a_step(plugin: Any, budget: int | None) -> None:
    """
    Raise `ValueError` where DeepSpeed would drop gradients: before 0.19, ZeRO-1 and ZeRO-2 with the optimizer's states
    in host memory keep those of several passes only if the file's `gradient_accumulation_steps` counts them.
    """
    if plugin is None or budget is None or is_stage3(plugin):
        return
    device = plugin.hf_ds_config.get_value("zero_optimization.offload_optimizer.device")
    if device not in (None, "none") and Version(version("deepspeed")) < Version("0.19"):
        raise ValueError(
            f"`micro_batch_tokens={budget}` with `offload_optimizer` in the DeepSpeed file: DeepSpeed "
            f"{version('deepspeed')} would learn from the last pass of each step alone. `pip install -U "
            "'deepspeed>=0.19'`, or leave one of the two out."
        )


def is_stage3(deepspeed_plugin: Any) -> bool:
    """Return whether training arguments with this plugin of accelerate ask for ZeRO-3."""
    return deepspeed_plugin is not None and deepspeed_plugin.zero_stage == 3


def check_unquantized(args: Any, quantization_config: Any, trained_in_full: dict[str, Any]) -> None:
    """
    Raise `ValueError`, under ZeRO-3 and before loading, if a quantized model is to be trained in full; it may be the
    base of an adapter. `quantization_config` is that of `model`; `trained_in_full` has, by argument, the models, paths
    or `None` of the roles without an adapter.
    """
    quantized = [
        name
        for name, model in trained_in_full.items()
        if is_quantized(model, trust_remote_code=args.trust_remote_code)
    ]
    config = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    if config is not None and "model" in trained_in_full:
        quantized.append("quantization_config")
    if quantized:
        raise ValueError(
            f"`{quantized[0]}` asks for a quantized model, and ZeRO-3 would partition and train all of it; packed "
            "weights cannot be trained. Train an adapter on it (`peft_config`, `--use_peft`), or load it without "
            "quantization: a share of ZeRO-3 is small as it is."
        )


def is_partitioned(model: nn.Module) -> bool:
    """
    Return whether ZeRO-3 or FSDP2 has partitioned the parameters: nothing can run before a gather, and each pass waits
    for one of the other ranks.
    """
    by_zero = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return by_zero or any(isinstance(module, FSDPModule) for module in model.modules())


def copy_of(model: AnyModule) -> AnyModule:
    """Copy a model. Under ZeRO-3, where `copy.deepcopy` would copy no weights, a new one is filled one by one."""
    if not is_partitioned(model):
        twin = copy.deepcopy(model)
        for module in twin.modules():  # what a trainer has put there may compute with the original's weights
            for name in ("forward", "_old_forward"):  # the second: behind accelerate's hooks
                if _leads_away(vars(module).get(name), module):
                    setattr(module, name, types.MethodType(type(module).forward, module))
        return twin
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Under ZeRO-3 a {type(model).__name__} cannot be copied: its weights are spread over the ranks. Pass the "
            "models of all roles yourself, as paths: `ref_model`, `value_model`."
        )
    twin = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    copy_weights(model, twin)
    return twin.train(model.training)


def _leads_away(function: Any, itself: nn.Module) -> bool:
    """Return whether a function refers to a module other than `itself`, by closure or as that module's method."""
    held, seen = [function], set()
    while held:
        each = held.pop()
        if isinstance(each, nn.Module) and each is not itself:
            return True
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, types.MethodType):
            held += [each.__self__, each.__func__]
        elif isinstance(each, functools.partial):
            held += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, types.FunctionType):
            held += inspect.getclosurevars(each).nonlocals.values()
    return False


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers between models with the same names in them, which ZeRO-3 may have partitioned."""
    if not is_partitioned(source) and not is_partitioned(target):
        target.load_state_dict(source.state_dict())
        return
    import deepspeed

    of_source = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        with deepspeed.zero.GatheredParameters([of_source[name], parameter], modifier_rank=0):
            parameter.data.copy_(of_source[name].data)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


def fill_zeros(parameter: nn.Parameter) -> None:
    """Set a parameter to 0, which ZeRO-3 may have partitioned."""
    if not hasattr(parameter, "ds_id"):
        nn.init.zeros_(parameter)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        nn.init.zeros_(parameter)


def declare_head(model: PreTrainedModel) -> None:
    """
    Tell DeepSpeed that `model.forward` reads the weights of its output head. ZeRO-3 would notice when that first
    happens; but PPO's first pass may ask for values alone, and the order of gathers that it records would be wrong for
    the next.
    """
    import deepspeed

    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


# ---- FSDP ----


def is_fsdp(fsdp: Any) -> bool:
    """Return whether training arguments, by their option `fsdp`, or accelerate's launcher ask for FSDP."""
    return bool(fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def check_fsdp(args: Any, quantization_config: Any, models: dict[str, Any]) -> None:
    """
    Raise `ValueError`, under FSDP and before loading, for what it cannot do here or nobody has tried: its first
    version, checkpoints in shards, and quantized weights. `models` has, by argument, models, paths or `None`.
    """
    written = args.fsdp_plugin_args or {}
    chosen = int(written.get("fsdp_version", os.environ.get("FSDP_VERSION", 1)))
    if chosen != 2:
        raise ValueError(
            f"FSDP of version {chosen} is not supported. Set `fsdp_version: 2` in the accelerate file, as "
            "configs/accelerate/fsdp2.yaml does, or `version` in `fsdp_config`."
        )
    kind = str(written.get("state_dict_type", os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")))
    if "FULL" not in kind.upper():
        raise ValueError(
            f"With FSDP's `state_dict_type` {kind} the run would end without a model that can be loaded. Set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate file, or `state_dict_type` in `fsdp_config`."
        )
    quantized = [
        name
        for name, model in models.items()
        if model is not None and is_quantized(model, trust_remote_code=args.trust_remote_code)
    ]
    if quantization_config is not None or (args.model_init_kwargs or {}).get("quantization_config") is not None:
        quantized.append("quantization_config")
    if quantized:
        raise ValueError(
            f"`{quantized[0]}` asks for a quantized model, and FSDP has not been tried with one. Use DDP, ZeRO-2 or "
            "ZeRO-3, or load it without quantization: a share of FSDP is small as it is."
        )


def leave_outputs(accelerator: Any) -> None:
    """
    Have FSDP2 return what a model computes in its own dtype. Accelerate has it cast to that of the run, and a
    log-probability in bfloat16 has three digits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


@contextmanager
def unsharded(model: Any, accelerator: Any, *but_not: nn.Module) -> Iterator[None]:
    """
    Within the context the weights of a model that FSDP2 has sharded are whole: gathered once, here, so that ranks may
    call it, and have it generate, differently often. Without FSDP2 nothing happens.

    Args:
        but_not: submodules whose layers stay sharded.
    """
    left_out = {module for each in but_not for module in each.modules()}
    shards: list[Any] = [m for m in model.modules() if m not in left_out and isinstance(m, FSDPModule)]
    if not shards:
        yield
        return
    freed = []
    if accelerator.state.fsdp_plugin.reshard_after_forward:
        # Accelerate keeps the root and what comes after the layers gathered from the forward to the backward pass.
        base: Any = base_of(model)
        kept = {_shared_state(module) for module in (model, base.get_output_embeddings())} if len(shards) > 1 else {}
        freed = [module for module in shards if _shared_state(module) not in kept]
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # adapters generate by their base, whose layers would each become a root
    for module in freed:
        module.set_reshard_after_forward(False, recurse=False)
    for module in shards:
        module.unshard()
    # As registered by transformers, `generate` frees the root at its end, and waits for other ranks at each token.
    registered = vars(model).get("generate")
    model.generate = functools.partial(types.MethodType(type(model).generate, model), synced_gpus=False)
    try:
        yield
    finally:
        del model.generate
        if registered is not None:
            model.generate = registered
        for module in freed:
            module.set_reshard_after_forward(True, recurse=False)
        for module in shards:
            module.reshard()


def _shared_state(module: Any) -> Any:
    """Return what modules have in common that FSDP2 gathers together."""
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None
