"""Checks of the adapters of actor, critic and reward model, before any weights are loaded."""

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from ..._trl import get_config_model_id
from ...models.adapter_copies import CHANGE_THE_BASE
from ...models.fingerprint import FILE, base_fingerprint, weights_fingerprint
from ...models.loading import adapter_config, adapter_configs, base_of, check_no_adapter, source_options
from ...models.sharding import is_fsdp
from ..config import PPOConfigX
from .adapters import CRITIC, REWARD


logger = logging.get_logger(__name__)


def check_adapters(
    args: PPOConfigX, model: Any, reward_model: Any, value_model: Any, peft_config: PeftConfig | None
) -> None:
    """Raise `ValueError` for adapters of actor, critic and reward model that cannot make a run."""
    for config in adapter_configs(model, peft_config):
        _check_actors_adapter(config, _head_name(model))
    has_adapter = peft_config is not None or isinstance(model, PeftModel)
    if args.critic == "adapter":
        _check_critic(value_model, has_adapter)
    if adapter_config(reward_model) is not None:
        _check_reward_task(reward_model, has_adapter)
    folders = {"reward_model": reward_model} | ({"value_model": value_model} if args.critic == "adapter" else {})
    on_base = {role: folder for role, folder in folders.items() if adapter_config(folder) is not None}
    if on_base or args.critic == "adapter":
        _check_base_is_shareable(args, model, peft_config)
    for role, folder in on_base.items():
        _check_score_adapter(role, folder)
        _check_same_base(role, folder, model, args)


def _head_name(model: Any) -> str:
    """Return the name of the module that makes logits: for a path, the usual one."""
    if not isinstance(model, nn.Module):
        return "lm_head"
    base: Any = base_of(model)
    head = base.get_output_embeddings()
    return next((name for name, module in base.named_modules() if module is head), "lm_head")


def _check_actors_adapter(config: PeftConfig, head: str) -> None:
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{type(config).__name__} learns virtual tokens, which shift every position; use LoRA.")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "The actor's adapter is an activated LoRA (`alora_invocation_tokens`). PEFT looks for these tokens in "
            "calls of its own wrapper, and PPO also calls what is below it. Leave `alora_invocation_tokens` out."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"The actor's adapter has task type {_name(config.task_type)}; an adapter that writes text has CAUSAL_LM. "
            'Set `task_type="CAUSAL_LM"` in the `peft_config`, or pass a model with such an adapter.'
        )
    if _adapts(config, head):
        raise ValueError(
            f"The actor's adapter changes `{head}` (`target_modules` or `modules_to_save`). Log-probabilities are "
            f"computed from the weight of `{head}` itself, so the change would be neither seen nor trained. Leave it "
            "out of `--lora_target_modules` and `--lora_modules_to_save`, in Python of the `peft_config`; if a saved "
            "adapter has it, merge that, `trl-ext merge ADAPTER --output_dir MERGED`, and start from MERGED."
        )


def _name(task_type: Any) -> str:
    return str(getattr(task_type, "value", task_type))


def _adapts(config: PeftConfig, module: str) -> bool:
    saved = getattr(config, "modules_to_save", None) or []
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return True
    targets = getattr(config, "target_modules", None)
    if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):  # which leaves the head out
        return False
    return bool(check_target_module_exists(config, module))


def _check_critic(value_model: Any, has_adapter: bool) -> None:
    if not has_adapter:
        raise ValueError(
            "`critic='adapter'` puts the critic's adapter on the actor's base, which has to stay as it is: pass a "
            "`peft_config` (`--use_peft`), so that the actor trains an adapter too, or choose `critic='model'` or "
            "`critic='head'`."
        )
    if value_model is None:
        return
    config = adapter_config(value_model)
    if config is None or config.task_type != "SEQ_CLS":
        what = type(value_model).__name__ if not isinstance(value_model, str) else repr(value_model)
        task = "" if config is None else f", an adapter of task type {_name(config.task_type)}"
        raise ValueError(
            f"`critic='adapter'` continues from the folder of an adapter with a score head, such as the `critic/` of "
            f"an earlier run; `value_model` is {what}{task}. Give such a folder, `None` for a new adapter, or "
            "choose `critic='model'`."
        )


def _check_reward_task(folder: str, has_adapter: bool) -> None:
    task = getattr(adapter_config(folder), "task_type", None)
    if task != "SEQ_CLS" and (task is not None or has_adapter):
        raise ValueError(
            f"The reward model's folder {folder} holds an adapter of task type {_name(task)}, which has no score "
            "head; a reward adapter has SEQ_CLS. Train one with `trl-ext reward --use_peft`."
        )
    if not has_adapter:  # the actor's base would move under it
        check_no_adapter(folder, "reward model")


def _check_base_is_shareable(args: PPOConfigX, model: Any, peft_config: PeftConfig | None) -> None:
    for config in adapter_configs(model, peft_config):
        init, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
        if bias != "none" or str(init).startswith(CHANGE_THE_BASE):
            what = f"bias={bias!r}" if bias != "none" else f"init_lora_weights={init!r}"
            raise ValueError(
                f"The actor's adapter has `{what}`, which changes the base that critic or reward model share with it. "
                "Leave it at its default, or give these roles whole models."
            )
    if is_fsdp(args.fsdp):
        raise ValueError(
            "FSDP cannot partition weights that several models hold, as critic and reward adapters on the actor's "
            "base do. Use DDP or DeepSpeed, or give these roles whole models."
        )
    if isinstance(model, PeftModel):
        name = args.model_adapter_name or model.active_adapter
        if name in (CRITIC, REWARD):
            raise ValueError(
                f"The actor's adapter is named {name!r}, the name that the trainer gives to an adapter of its own. "
                "Load it under another name: `PeftModel.from_pretrained(..., adapter_name=...)`."
            )


def _check_score_adapter(role: str, folder: str) -> None:
    """Raise `ValueError` unless the adapter's file has a score head of one label."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.exists():
        return
    with safe_open(file, framework="pt") as weights:
        heads = [name for name in weights.keys() if name.endswith("score.weight")]
        labels = [weights.get_slice(name).get_shape()[0] for name in heads]
    if labels != [1]:
        has = f"a score head with {labels[0]} labels" if labels else "no score head"
        raise ValueError(
            f"The adapter in {folder} (`{role}`) has {has}; a response gets one score. Train the adapter with "
            "`num_labels=1` and `modules_to_save=['score']`, as `trl-ext reward --use_peft` does."
        )


def _check_same_base(role: str, folder: str, model: Any, args: PPOConfigX) -> None:
    """Raise `ValueError` unless the adapter was trained on the actor's base, as far as files can tell."""
    named = getattr(adapter_config(folder), "base_model_name_or_path", None)
    if isinstance(model, str):
        path, revision = model, source_options(args).get("revision")
    else:
        path, revision = get_config_model_id(model.config), getattr(model.config, "_commit_hash", None)
    trained_on = base_fingerprint(folder, named)
    base = weights_fingerprint(path, revision) if path else None
    if trained_on is None or base is None:
        missing = f"{folder} has no {FILE}" if trained_on is None else "the actor's base is not on disk as safetensors"
        logger.warning(
            f"Whether the adapter in {folder} (`{role}`) was trained on the actor's base is unknown: {missing}. On "
            "another base its scores mean nothing."
        )
    elif trained_on != base:
        raise ValueError(
            f"The adapter in {folder} (`{role}`) was trained on other weights than those of the actor's base {path}: "
            f"{trained_on[:12]}… against {base[:12]}… It names {named!r}. Train it on the actor's base, or pass the "
            f"whole model: merge it there and save it. If the weights differ in their dtype alone, remove "
            f"{Path(folder) / FILE}."
        )
