"""Make the layout of a run from its options, so that what is planned is what is run."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..packing.budget import size_of_parts
from ..runs.folder import is_local
from .layout import Hardware, Layout
from .machines import CPU, GPUS, find_gpu
from .planning import ModelNames
from .shapes import model_shape


# What the scripts start from when no model is named (trl_ext/data/demo.py).
EMBEDDED = "smollm2-135m-instruct"
DEFAULT_PROMPT, DEFAULT_LENGTH = 512, 1024


def names_from_options(options: Mapping[str, Any]) -> ModelNames:
    """Return the models that `trl-ext ppo`, `dpo` or `trl-ext reward` would load."""
    actor = options.get("model_name_or_path") or options.get("sft_model_path") or EMBEDDED
    reward = options.get("reward_model_path")
    has_config = reward is not None and (Path(reward) / "config.json").is_file()
    # A reward model that is still to be trained has, in the recipes, the actor's base.
    return ModelNames(actor, reward=reward if has_config or (reward and not is_local(reward)) else None)


def layout_from_options(
    trainer: str, options: Mapping[str, Any], hardware: Hardware, prompt: int | None = None
) -> Layout:
    """
    Return the layout of a run.

    Args:
        options: option names and values, as in a recipe; what is not there has its default.
        hardware: the device decides the dtype where the options do not.
        prompt: length of the longest prompt in tokens; unset: 512, and of pairs half of `max_length`.

    Raises:
        ValueError: when the options do not go together.
    """
    checkpointing, optimizer = options.get("gradient_checkpointing"), options.get("optim") or "adamw_torch_fused"
    common: dict[str, Any] = {
        "optimizer": getattr(optimizer, "value", optimizer),  # a name, or a member of transformers' OptimizerNames
        "gradient_checkpointing": True if checkpointing is None else checkpointing,
    }
    common |= _adapters(options) | _deepspeed(options)
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    common["fsdp"] = bool(options.get("fsdp")) or by_launcher
    common["compute"] = _compute(options, hardware, bool(common.get("zero_stage")))
    if common["method"] == "qlora" and options.get("ref_model_quantization") is None:
        common["reference_bits"] = 4  # a reference of its own is loaded like the actor
    of_trainer = _ppo(options, prompt) if trainer == "ppo" else _pairs(trainer, options, prompt)
    return Layout(trainer=trainer, **(common | of_trainer))


def _adapters(options: Mapping[str, Any]) -> dict[str, Any]:
    packed = bool(options.get("load_in_4bit"))
    method = "qlora" if options.get("use_peft") and packed else "lora" if options.get("use_peft") else "full"
    targets = options.get("lora_target_modules") or ("q_proj", "v_proj")
    if not isinstance(targets, str):
        # One word that is no module's name is a regular expression, or PEFT's "all-linear".
        targets = targets[0] if len(targets) == 1 and not targets[0].isidentifier() else tuple(targets)
    chosen: dict[str, Any] = {"method": method, "rank": options.get("lora_r") or 16, "targets": targets}
    chosen["nested_quantisation"] = bool(options.get("use_bnb_nested_quant"))
    bits = {"4bit": 4, "8bit": 8, None: 16}
    for name, option in (("reward_bits", "reward_model_quantization"), ("reference_bits", "ref_model_quantization")):
        chosen[name] = bits.get(options.get(option), 16)
    return chosen


def _compute(options: Mapping[str, Any], hardware: Hardware, has_deepspeed: bool) -> str:
    bf16 = options.get("bf16")
    bf16 = (not hardware.is_cpu and not options.get("fp16")) if bf16 is None else bf16
    half = bool(bf16 or options.get("fp16"))
    if has_deepspeed:
        return "bf16" if half else "fp32"
    dtype = options.get("dtype") or ("bfloat16" if options.get("use_peft") and not hardware.is_cpu else "float32")
    if dtype in ("bfloat16", "float16"):
        return "bf16"
    return "autocast" if half else "fp32"


def _deepspeed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return stage, offloading and buckets of a DeepSpeed file; "auto" is what transformers fills in."""
    given = options.get("deepspeed") or getattr(options.get("deepspeed_plugin"), "deepspeed_config", None)
    if not given:
        return {}
    config = given if isinstance(given, Mapping) else json.loads(Path(given).read_text())
    zero = config.get("zero_optimization", {})
    chosen: dict[str, Any] = {"zero_stage": zero.get("stage", 0)}
    for name, section in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
        chosen[name] = (zero.get(section) or {}).get("device", "none") not in ("none", None)
    bucket = zero.get("reduce_bucket_size", 5e8)
    if bucket == "auto":
        bucket = model_shape(names_from_options(options).actor).hidden ** 2
    live = zero.get("stage3_max_live_parameters", 1e9)
    return chosen | {"reduce_bucket": float(bucket), "live_parameters": float(live)}


def _ppo(options: Mapping[str, Any], prompt: int | None) -> dict[str, Any]:
    per_device = options.get("per_device_train_batch_size") or 8
    rollout = per_device * (options.get("gradient_accumulation_steps") or 1)
    mini_batch = max(rollout // (options.get("num_mini_batches") or 1), 1)
    micro_batch = size_of_parts(per_device, mini_batch, options.get("num_generations") or 1)
    response = options.get("max_completion_length") or options.get("response_length") or 53
    score_batch = options.get("local_rollout_forward_batch_size") or 64
    budget, score_budget = options.get("micro_batch_tokens") or 0, options.get("score_batch_tokens") or 0
    # Prompts of unknown length are not longer than the budgets leave room for.
    rooms = [each - response for each in (budget, score_budget) if each > response]
    prompt = prompt or min([DEFAULT_PROMPT, *rooms])
    kl_coef = options.get("beta") if options.get("beta") is not None else options.get("kl_coef")
    has_reference = kl_coef is None or kl_coef != 0
    judge: Any = options.get("reward_model_path")
    is_adapter = bool(judge) and (Path(judge) / "adapter_config.json").is_file()
    if judge and not Path(judge).is_dir():  # still to be trained, as an adapter where the critic is one
        is_adapter = options.get("critic") == "adapter"
    colocated = options.get("use_vllm") and options.get("vllm_mode", "colocate") == "colocate"
    return {
        "critic": options.get("critic") or "model",
        "reference": "none" if not has_reference else "adapter" if options.get("use_peft") else "model",
        "reward": "adapter" if is_adapter else "none" if options.get("reward_funcs") and not judge else "model",
        "micro_batch": micro_batch,
        "accumulation": -(-mini_batch // micro_batch),
        "rollout": rollout,
        "score_batch": score_batch,
        "micro_batch_tokens": budget,
        "score_batch_tokens": score_budget,
        "epochs": options.get("num_ppo_epochs") or 4,
        "prompt": prompt,
        "response": response,
        "vllm_share": options.get("vllm_gpu_memory_utilization") or 0.3 if colocated else 0.0,
        "vllm_tensor_parallel": options.get("vllm_tensor_parallel_size") or 1,
        "vllm_sleeps": bool(options.get("vllm_enable_sleep_mode")),
        "gather_for_generation": options.get("ds3_gather_for_generation") is not False,
        "offload_frozen": bool(options.get("offload_frozen_models")),
    }


def _pairs(trainer: str, options: Mapping[str, Any], prompt: int | None) -> dict[str, Any]:
    length = options.get("max_length") or DEFAULT_LENGTH
    prompt = prompt or length // 2
    if not prompt < length:
        raise ValueError(f"A prompt of {prompt} tokens leaves no room for an answer in `max_length={length}`.")
    has_none = trainer == "reward" or options.get("precompute_ref_log_probs")
    reference = "none" if has_none else "adapter" if options.get("use_peft") else "model"
    return {
        "critic": "none",
        "reward": "none",
        "reference": reference,
        "micro_batch": options.get("per_device_train_batch_size") or 8,
        "accumulation": options.get("gradient_accumulation_steps") or 1,
        "prompt": prompt,
        "response": length - prompt,
        "share_prefixes": options.get("packing") is not False,
    }


def this_machine() -> Hardware:
    """Return the devices that this process and the others of its launch see."""
    import torch  # takes seconds, which a plan for another machine need not wait for

    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    if not torch.cuda.is_available():
        return replace(CPU, memory=host, host_memory=host, gpus=gpus)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    card = find_gpu(device.name)
    options = ({} if card is None else GPUS[card] | {"name": card}) | {
        "memory": float(device.total_memory),
        "host_memory": host,
        "host_for_each": 0.0,
        "gpus": gpus,
        "gpus_per_node": on_node,
    }
    return Hardware(**options)  # type: ignore[arg-type]
