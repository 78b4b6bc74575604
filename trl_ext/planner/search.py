"""Search the layouts that fit given hardware, for the fastest of each kind of training."""

import itertools
from collections.abc import Iterator
from typing import Any

from .layout import Hardware, Layout
from .planning import ModelNames, Plan, plan
from .timing import speed


MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


def suggest(names: ModelNames | str, start: Layout, hardware: Hardware) -> list[Plan]:
    """
    Return the fastest plan that fits for each method (full, LoRA, QLoRA) and, in PPO, each kind of critic, in that
    order. One that offloads the optimizer is taken where no other fits; of those equally fast one that offloads no
    frozen model, with the largest micro-batch that fits. Trainer, lengths, rollout and optimizer are `start`'s; all
    else is searched.
    """
    best: dict[tuple[str, str], tuple[tuple[bool, float, bool, int], Plan]] = {}
    for layout in layouts(start, hardware):
        planned = plan(names, layout, hardware)
        if not planned.fits:
            continue
        kind, rate = (layout.method, layout.critic), float(f"{speed(planned).tokens_per_second:.6g}")
        rank = not layout.offload_optimizer, rate, not layout.offload_frozen, layout.micro_batch
        if kind not in best or rank > best[kind][0]:
            best[kind] = rank, planned
    return [_with_largest_micro_batch(names, planned, start, hardware) for _, planned in best.values()]


def _with_largest_micro_batch(names: ModelNames | str, planned: Plan, start: Layout, hardware: Hardware) -> Plan:
    """Return the plan with as many more sequences in a micro-batch as fit, found by bisection."""
    sequences = start.micro_batch * start.accumulation
    low, high = planned.layout.micro_batch, sequences
    while low < high:
        size = (low + high + 1) // 2
        larger = plan(names, planned.layout.change(micro_batch=size, accumulation=-(-sequences // size)), hardware)
        if larger.fits:
            low, planned = size, larger
        else:
            high = size - 1
    return planned


def layouts(start: Layout, hardware: Hardware) -> Iterator[Layout]:
    """Yield every layout that `suggest` looks at; those whose parts do not go together are left out."""
    sequences = start.micro_batch * start.accumulation
    sizes = [size for size in MICRO_BATCHES if size <= sequences]
    engines = _engines(hardware)
    for roles, engine, checkpointing, size, away in itertools.product(
        _roles(start), engines, (False, True), sizes, (False, True)
    ):
        batches = {"micro_batch": size, "accumulation": -(-sequences // size)}
        options = roles | engine | batches | {"gradient_checkpointing": checkpointing, "offload_frozen": away}
        full_alone = roles["method"] == "full" and engine["zero_stage"] == 0
        options["compute"] = "fp32" if hardware.is_cpu else "autocast" if full_alone else "bf16"
        if away and (start.trainer == "dpo" or "model" not in (roles["reward"], roles["reference"])):
            continue
        try:
            yield start.change(**options)
        except ValueError:
            continue


def _roles(start: Layout) -> Iterator[dict[str, str]]:
    """Yield method, critic, reward and reference that go together."""
    ppo = start.trainer == "ppo"
    for method in ("full", "lora", "qlora"):
        reference = start.reference if method == "full" or start.reference == "none" else "adapter"
        if method == "full" and reference == "adapter":
            reference = "model"
        for critic in ("model", "head", "adapter") if ppo else ("none",):
            if critic == "adapter" and method == "full":
                continue
            reward = "none" if start.reward == "none" else "model"
            if reward == "model" and critic == "adapter":
                reward = "adapter"
            yield {"method": method, "critic": critic, "reference": reference, "reward": reward}


def _engines(hardware: Hardware) -> list[dict[str, Any]]:
    found = [(0, False, False)]
    if hardware.gpus > 1:
        found += [(2, False, False), (3, False, False)]
    if not hardware.is_cpu:
        found += [(2, True, False), (3, True, True)]
    return [dict(zip(("zero_stage", "offload_optimizer", "offload_parameters"), each, strict=True)) for each in found]
