"""Search the layouts that fit given hardware, for the fastest of each kind of training."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from .layout import Hardware, Layout
from .planning import ModelNames, Plan, plan
from .timing import speed


def suggest(names: ModelNames | str, start: Layout, hardware: Hardware) -> list[Plan]:
    """
    Return the fastest plan that fits for each method (full, LoRA, QLoRA) and, in PPO, each kind of critic, in that
    order; of those equally fast the one with the largest micro-batch. One that offloads frozen models is taken where
    none without fits, and one that offloads the optimizer where no other does. Trainer, lengths, rollout and optimizer
    are `start`'s; all else is searched.
    """
    best: dict[tuple[str, str], tuple[tuple[int, float, int], Plan]] = {}
    for layout in layouts(start, hardware):
        planned = _with_largest_micro_batch(names, layout, hardware)
        if planned is None:
            continue
        layout, rate = planned.layout, float(f"{speed(planned).tokens_per_second:.6g}")
        kind = layout.method, layout.critic
        rank = -(2 * layout.offload_optimizer + layout.offload_frozen), rate, layout.micro_batch
        if kind not in best or rank > best[kind][0]:
            best[kind] = rank, planned
    return [planned for _, planned in best.values()]


def _with_largest_micro_batch(names: ModelNames | str, layout: Layout, hardware: Hardware) -> Plan | None:
    """Return the plan with as many sequences in a micro-batch as fit, found by bisection; `None` if not even one."""
    sequences = layout.micro_batch * layout.accumulation
    # PPO cuts a step anywhere, by `micro_batch_tokens`; pairs make the same step only in equal parts.
    sizes = [n for n in range(1, sequences + 1) if layout.trainer == "ppo" or sequences % n == 0]

    def of(size: int) -> Plan:
        batches = {"micro_batch": size, "accumulation": -(-sequences // size)}
        if layout.trainer == "ppo":
            batches["micro_batch_tokens"] = size * layout.length
        return plan(names, layout.change(**batches), hardware)

    # A single micro-batch holds no gradients of earlier ones, so it may fit where a smaller one does not.
    whole = of(sequences)
    if whole.fits:
        return whole
    fitting = bisect_left(sizes, True, hi=len(sizes) - 1, key=lambda size: not of(size).fits)
    return of(sizes[fitting - 1]) if fitting else None


def layouts(start: Layout, hardware: Hardware) -> Iterator[Layout]:
    """Yield every layout that `suggest` looks at; those whose parts do not go together are left out."""
    for roles, engine, checkpointing, away in itertools.product(
        _roles(start), _engines(hardware), (False, True), (False, True)
    ):
        if away and (start.trainer != "ppo" or "model" not in (roles["reward"], roles["reference"])):
            continue
        full_alone = roles["method"] == "full" and engine["zero_stage"] == 0
        compute = "fp32" if hardware.is_cpu else "autocast" if full_alone else "bf16"
        options = roles | engine | {"gradient_checkpointing": checkpointing, "offload_frozen": away}
        try:
            yield start.change(**options, compute=compute)
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
