"""Check that a run fits, before anything is loaded."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..models.loading import adapter_config
from ..models.saved_adapter import adapter_folder
from ..planner import Hardware, Plan, layout_from_options, names_from_options, plan, plan_text, this_machine


def plan_run(trainer: str, options: Mapping[str, Any], hardware: Hardware, prompt: int | None = None) -> Plan:
    """Plan a run of "ppo", "dpo" or "reward"; `prompt` is the longest, if known. `ValueError` for what has no plan."""
    named = options.get("model_name_or_path") or options.get("sft_model_path")
    saved = adapter_config(named and adapter_folder(named, options.get("model_revision")))
    if saved is not None:  # planned as a new adapter of its rank on its base
        rank = {"lora_r": saved.r} if hasattr(saved, "r") else {}
        options = {**options, "model_name_or_path": saved.base_model_name_or_path, "use_peft": True, **rank}
    return plan(names_from_options(options), layout_from_options(trainer, options, hardware, prompt), hardware)


def require_fit(trainer: str, *arguments: Any, hardware: Hardware | None = None) -> None:
    """
    Plan the run on `hardware`, or on the GPUs of this launch; without a GPU, and for "critic", which needs less
    than PPO, nothing is checked. If it does not fit, end with the plan and the smallest change, unless
    `--force` is given.
    """
    options: dict[str, Any] = {name: value for part in arguments for name, value in vars(part).items()}
    if trainer == "critic" or options["force"]:
        return
    if hardware is None:
        if options["use_cpu"] or not torch.cuda.is_available():
            return
        hardware = this_machine()
    try:
        planned = plan_run(trainer, options, hardware)
    except Exception as reason:  # a failing plan must not end a run
        print(f"Whether the run fits has not been planned: {reason}", file=sys.stderr)
        return
    if not planned.fits:
        assumed = f"Prompts of {planned.layout.prompt} tokens are assumed. " if trainer == "ppo" else ""
        raise SystemExit(f"{plan_text(planned)}\n\n{assumed}Nothing has been loaded. `--force` trains all the same.")
