"""The runs of two processes that the default tests look at, in one launch: DPO and PPO under DDP, PPO under ZeRO."""

from pathlib import Path
from typing import Any

import dpo_layouts
import four_roles
import layout_worker
import layouts
import tiny
import vllm_layouts
import zero_runs
from accelerate_files import ACCELERATE, launch


def prepare(folder: Path) -> dict[str, Any]:
    """Writes the models and the pairs; returns the layouts of ZeRO, as `accelerate launch` starts them."""
    zero_runs.save(folder)
    dpo_layouts.save(folder)
    four_roles.save_adapter(str(folder / "actor"), folder / "adapter", "CAUSAL_LM", 2)
    started = {
        name: launch(ACCELERATE / f"{name}.yaml", "--num_processes", "2").environment for name in ("zero2", "zero3")
    }
    options = {"max_steps": 2, "micro_batch_tokens": 24}
    runs = {name: {"environment": each, "options": options, "only": "ppo"} for name, each in started.items()}
    return runs | {"adapter, zero3": runs["zero3"] | {"start": "adapter", "options": {"max_steps": 1}}}


def measure(folder: Path, layouts_of_zero: dict[str, Any]) -> dict[str, Any]:
    measured = {"dpo": dpo_layouts.measure(folder)}  # first, since it measures a peak of memory
    measured["ppo"] = layouts.measure()
    measured["held out"] = {f"{shards} shards": layouts.held_out(2, shards) for shards in layouts.SHARDS}
    measured["ahead"] = vllm_layouts.ahead(tiny.tiny_prompts(10))
    with layout_worker.step_in_every_pass():
        mistaken = layout_worker.measure(folder, {"mistake": layouts_of_zero["zero2"]})
    return measured | mistaken | layout_worker.measure(folder, layouts_of_zero)
