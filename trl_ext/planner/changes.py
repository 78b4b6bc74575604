"""Find what would make a plan fit: changes of its layout, from the cheapest to the dearest, alone and together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .layout import Hardware, Layout
from .planning import Plan, plan


@dataclass(frozen=True)
class Change:
    """What to set, what that costs, the layout with it, and whether the same parameters are trained."""

    setting: str
    cost: str
    layout: Layout
    keeps_training: bool


Proposal = tuple[str, str, dict[str, Any]]


def changes(layout: Layout, hardware: Hardware, keeping_training: bool = False) -> Iterator[Change]:
    """Yield changes, from the cheapest to the dearest; perhaps only those after which the same parameters train."""
    for proposals, keeps in ((_same_training, True), (_less_training, False)):
        if keeping_training and not keeps:
            return
        for setting, cost, fields in proposals(layout, hardware):
            try:
                changed = layout.change(**fields)
            except ValueError:
                continue
            if changed != layout:
                yield Change(setting, cost, changed, keeps)


def _same_training(layout: Layout, hardware: Hardware) -> Iterator[Proposal]:
    yield "gradient_checkpointing: true", "a third more learning time", {"gradient_checkpointing": True}
    if layout.micro_batch_tokens > layout.length:
        one = {"micro_batch_tokens": layout.length}
        yield f"micro_batch_tokens: {layout.length}", "smaller matrix products", one
    elif layout.micro_batch > 1:
        smaller = {"micro_batch": 1, "accumulation": layout.accumulation * layout.micro_batch}
        yield "a micro-batch of 1, accumulated", "smaller matrix products", smaller
    if layout.trainer == "ppo":
        yield from _of_ppo(layout)
    for bits in (8, 4):
        for role, name in (("reward", "reward_model"), ("reference", "ref_model")):
            if getattr(layout, role) == "model" and getattr(layout, f"{role}_bits") > bits:
                fields = {f"{role}_bits": bits}
                yield f"{name}_quantization: {bits}bit", f"what it says is rounded by {bits} bits", fields
    yield from _engines(layout, hardware)


def _of_ppo(layout: Layout) -> Iterator[Proposal]:
    if layout.score_batch_tokens > layout.length:
        one = {"score_batch_tokens": layout.length}
        yield f"score_batch_tokens: {layout.length}", "smaller matrix products while scoring", one
    elif layout.score_batch > layout.micro_batch:
        setting = f"local_rollout_forward_batch_size: {layout.micro_batch}"
        yield setting, "smaller matrix products while scoring", {"score_batch": layout.micro_batch}
    if layout.rollout > layout.micro_batch * layout.accumulation:
        half = {"rollout": layout.rollout // 2}
        yield "half as many responses per rollout", "noisier advantages", half
    if layout.vllm_share and not layout.vllm_sleeps:
        yield "vllm_enable_sleep_mode: true", "vLLM wakes up once per rollout", {"vllm_sleeps": True}
    if layout.zero_stage == 3 and layout.gather_for_generation:
        apart = {"gather_for_generation": False}
        yield "ds3_gather_for_generation: false", "weights are gathered for every token", apart

    if "model" in (layout.reward, layout.reference):
        yield "offload_frozen_models: true", "copies over PCIe, once per rollout", {"offload_frozen": True}


def _engines(layout: Layout, hardware: Hardware) -> Iterator[Proposal]:
    compute: dict[str, Any] = {"compute": "bf16"} if layout.compute == "autocast" else {}
    compute |= {"fsdp": False}
    stage = 3 if layout.fsdp else layout.zero_stage
    if hardware.gpus > 1 and stage < 2:
        yield "ZeRO-2", "none beside DDP; weights in bfloat16, with float32 masters", {"zero_stage": 2} | compute
    if hardware.gpus > 1 and stage < 3:
        yield "ZeRO-3", "half as much communication again", {"zero_stage": 3} | compute
        if layout.trainer == "ppo" and not layout.vllm_share:
            apart = {"zero_stage": 3, "gather_for_generation": False} | compute
            yield "ZeRO-3 with ds3_gather_for_generation: false", "weights are gathered for every token", apart
    offload = {"zero_stage": max(stage, 2), "offload_optimizer": True} | compute
    yield f"ZeRO-{max(stage, 2)} with the optimizer offloaded", "AdamW runs on the host's CPU", offload
    everything = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True} | compute
    yield "ZeRO-3 with optimizer and parameters offloaded", "every weight crosses PCIe in every pass", everything


def _less_training(layout: Layout, hardware: Hardware) -> Iterator[Proposal]:
    if layout.critic == "model":
        yield "critic: head", "actor and critic share a trunk", {"critic": "head"}
    compute = {"compute": "bf16"} if layout.compute == "autocast" else {}
    adapter: dict[str, Any] = {"method": "lora"} | compute
    adapter |= {"reference": "adapter"} if layout.reference == "model" else {}
    if layout.method == "full":
        yield "LoRA", "an adapter learns; the reference is the actor without it", adapter
    plain = {"zero_stage": min(layout.zero_stage, 2), "offload_parameters": False, "offload_optimizer": False}
    plain |= {"fsdp": False}
    packed = adapter | plain | {"method": "qlora"}
    if layout.method != "qlora":
        yield "QLoRA", "4-bit weights are unpacked in every pass", packed
    if layout.trainer == "ppo":
        shared = {"critic": "head"} | ({"reward": "adapter"} if layout.reward == "model" else {})
        cost = "the reward model is an adapter that was trained on that base"
        yield "QLoRA with all roles on one base", cost, packed | shared


def smallest_change(failed: Plan) -> list[Change]:
    """
    Return what makes a plan fit: the cheapest single change that leaves the training as it is, else the fewest of
    those together, else the cheapest that trains less, else all that is needed together. Empty where nothing does.
    """
    for keeping in (True, False):
        for change in changes(failed.layout, failed.hardware, keeping):
            if plan(failed.names, change.layout, failed.hardware).fits:
                return [change]
        together = _together(failed, keeping)
        if together:
            return together
    return []


def _together(failed: Plan, keeping: bool) -> list[Change]:
    """Return changes, the cheapest first, each if it lowers what is needed, until it fits; then as few as will do."""
    taken: list[str] = []
    current = failed
    for setting in [change.setting for change in changes(failed.layout, failed.hardware, keeping)]:
        applied = _apply(failed, [*taken, setting])
        changed = plan(failed.names, applied[-1].layout, failed.hardware) if applied else current
        if changed.needed < current.needed:
            taken, current = [*taken, setting], changed
        if current.fits:
            break
    else:
        return []
    for setting in taken[:-1]:  # needless ones
        rest = _apply(failed, [each for each in taken if each != setting])
        if rest and plan(failed.names, rest[-1].layout, failed.hardware).fits:
            taken.remove(setting)
    return _apply(failed, taken)


def _apply(failed: Plan, settings: list[str]) -> list[Change]:
    """Return the changes of these settings, one after the other; none where one cannot follow the others."""
    layout, applied = failed.layout, []
    for setting in settings:
        change = next((each for each in changes(layout, failed.hardware) if each.setting == setting), None)
        if change is None:
            return []
        layout = change.layout
        applied.append(change)
    return applied
