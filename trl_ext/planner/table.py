"""Show a plan in words and tables, for a terminal or a page."""

from collections.abc import Iterable

from .changes import Change, smallest_change
from .layout import GIB, Hardware, Layout
from .memory import PARTS
from .phases import ROLES
from .planning import Plan, plan
from .timing import assumed, speed


HEADERS = {"optimizer": "optimizer states", "kv_cache": "KV cache"}


def plan_text(planned: Plan) -> str:
    """Return the models' sizes, the table by phase and role, whether it fits, and what would make it fit."""
    parts = [sizes(planned), memory_table(planned), verdict(planned)]
    if not planned.fits:
        parts.append(change_text(smallest_change(planned), planned))
    return "\n\n".join(parts)


def sizes(planned: Plan) -> str:
    """Return the models by role, with their parameters, and how they are laid out."""
    layout, models = planned.layout, planned.models
    kinds = {"actor": layout.method, "critic": layout.critic, "reward": layout.reward, "reference": layout.reference}
    parts = []
    for role in ROLES:
        shape = getattr(models, role)
        if kinds[role] == "none":
            continue
        size = f"{shape.name} {shape.parameters / 1e9:.3f}B" if shape is not None else "on the actor's"
        if shape is not None and shape.tower:
            size += f", {shape.tower / 1e9:.2f}B of them to see or hear"
        packed = layout.method == "qlora" if role == "actor" else getattr(layout, f"{role}_bits", 16) < 16
        if shape is not None and shape.stacked and packed:
            size += f", {shape.stacked / 1e9:.1f}B of them experts, which stay in 16 bits"
        if role == "actor" and models.adapter is not None:
            size += f", {models.adapter.parameters / 1e6:.1f}M of an adapter"
        parts.append(f"{called(role, layout)} ({kinds[role]}) {size}")
    alone = "DDP" if planned.hardware.gpus > 1 else "one process"
    engine = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else "FSDP2" if layout.fsdp else alone
    budget = f" ({layout.micro_batch_tokens} tokens)" if layout.trainer == "ppo" and layout.micro_batch_tokens else ""
    tokens = f"{layout.prompt} + {layout.response} tokens, micro-batch {layout.micro_batch}{budget}"
    return f"{layout.trainer.upper()}: " + "; ".join(parts) + f".\n{engine}, {layout.compute}, {tokens}."


def called(role: str, layout: Layout) -> str:
    """Return what a role is called: the model that a reward run trains is no actor."""
    return "model" if layout.trainer == "reward" else role


def memory_table(planned: Plan) -> str:
    """Return the GiB on one GPU by phases, roles, parts."""
    headers = ["phase", "role", *(HEADERS.get(part, part) for part in PARTS), "total"]
    rows = []
    for phase in planned.phases:
        for role, usage in phase.roles.items():
            if usage.total:
                parts = [gib(getattr(usage, part)) for part in PARTS]
                rows.append([phase.name, called(role, planned.layout), *parts, gib(usage.total)])
        if phase.other:
            rows.append([phase.name, "vLLM", *[""] * len(PARTS), gib(phase.other)])
        rows.append([f"**{phase.name}**", phase.moment, *[""] * len(PARTS), f"**{gib(phase.total)}**"])
    return markdown(headers, rows)


def gib(value: float) -> str:
    """Return bytes as GiB with two decimals, an empty text for 0."""
    return "" if value == 0 else f"{value / GIB:.2f}"


def markdown(headers: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table whose columns are aligned in a terminal too; figures to the right."""
    cells = [headers, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    left = [all(not cell[:1].isdigit() for row in cells[1:] for cell in [row[i]]) for i in range(len(headers))]
    rule = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]
    padded = [
        [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left, strict=True)]
        for row in [headers, rule, *cells[1:]]
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def verdict(planned: Plan) -> str:
    """Return whether it fits, with what was added for the device."""
    hardware = planned.hardware
    where = place(hardware)
    added = host = ""
    if not hardware.is_cpu:
        host = f" {host_text(hardware, planned.host)}"
        added = (
            f" ({planned.peak.total / GIB:.1f} of tensors; assumed are {hardware.fragmentation:.0%} for the allocator "
            f"and {hardware.context / GIB:.1f} for context and workspaces)"
        )
    word = "It fits" if planned.fits else "It does not fit"
    return (
        f"{word}: {planned.needed / GIB:.1f} of {hardware.memory / GIB:.1f} GiB on {where}{added}, most when "
        f"{planned.peak.moment} ({planned.peak.name}).{host}"
    )


def place(hardware: Hardware) -> str:
    """Return whose memory is counted."""
    return "the process" if hardware.is_cpu else "each GPU"


def host_text(hardware: Hardware, needed: float | None = None) -> str:
    """Return the host memory of a node, and how much of it offloading needs."""
    of = "" if needed is None else f"{needed / GIB:.0f} of "
    assumed = f", assumed for {hardware.name} (`--host_memory`)" if hardware.host_for_each else ""
    return f"Host memory of a node: {of}{hardware.host_memory / GIB:.0f} GiB for what is offloaded{assumed}."


def change_text(found: list[Change], failed: Plan) -> str:
    """Return what would make it fit."""
    if not found:
        fewer = "sample fewer responses at a time (`accumulation`), " if failed.layout.trainer == "ppo" else ""
        return (
            f"No change that the planner knows makes it fit: {fewer}shorten prompts and answers, or take more or "
            "larger GPUs or a smaller model."
        )
    after = plan(failed.names, found[-1].layout, failed.hardware)
    lines = [f"- {change.setting} ({change.cost})" for change in found]
    opening = "The smallest change that makes it fit" if len(found) == 1 else "It fits with these changes together"
    return "\n".join([f"{opening}, at {after.needed / GIB:.1f} GiB on {place(failed.hardware)}:", *lines])


def speed_text(planned: Plan, sequences: float) -> str:
    """Return the estimated seconds of a step, tokens per second and, for a number of responses or pairs, GPU-hours."""
    estimate = speed(planned)
    unit, what, phases = "an optimizer step", "pairs", ""
    if planned.layout.trainer == "ppo":
        unit, what = "a rollout", "responses"
        phases = f" (generate {estimate.generate:.1f}, score {estimate.score:.1f}, learn {estimate.learn:.1f})"
    device = "process" if planned.hardware.is_cpu else "GPU"
    plural = "" if estimate.gpus == 1 else "es" if planned.hardware.is_cpu else "s"
    return (
        f"Estimated: {estimate.seconds:.1f} s for {unit} of {estimate.sequences:,.0f}{phases}; "
        f"{estimate.tokens_per_second:,.0f} tokens/s on {estimate.gpus} {device}{plural}. "
        f"{sequences:,.0f} {what}: {estimate.gpu_hours(sequences):,.1f} {device}-hours.\n"
        f"{assumed(planned.layout.trainer)}"
    )


def scale_table(planned: Plan, gpus: Iterable[int], sequences: float) -> str:
    """Return the same layout on several numbers of GPUs: what each needs, and how fast all are."""
    rows = []
    for count in gpus:
        there = plan(planned.names, planned.layout, planned.hardware.with_gpus(count))
        estimate = speed(there)
        fits = "yes" if there.fits else "no"
        rate, hours = f"{estimate.tokens_per_second:,.0f}", f"{estimate.gpu_hours(sequences):,.0f}"
        rows.append([str(count), f"{there.needed / GIB:.1f}", fits, rate, hours])
    return markdown(["GPUs", "GiB each", "fits", "tokens/s", f"GPU-hours for {sequences:,.0f}"], rows)


def suggestion_table(plans: list[Plan]) -> str:
    """Return the layouts that fit, one a row, the fastest first, those that offload the optimizer last."""
    if not plans:
        return (
            "No layout fits: take more or larger GPUs, a smaller model, or shorter sequences; for PPO of a model that "
            "one GPU cannot hold whole, sample with vLLM over several (`--vllm_share`, `--vllm_tensor_parallel`)."
        )
    is_ppo = plans[0].layout.trainer == "ppo"
    rows = []
    rates = [(planned, speed(planned).tokens_per_second) for planned in plans]
    for planned, rate in sorted(rates, key=lambda pair: (pair[0].layout.offload_optimizer, -pair[1])):
        layout = planned.layout
        roles = f"{layout.critic} / {layout.reward} / {layout.reference}" if is_ppo else layout.reference
        engine = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else "FSDP2" if layout.fsdp else "none"
        engine += " +offload" if layout.offload_optimizer else ""
        batch = f"{layout.micro_batch} × {layout.accumulation}"
        if is_ppo:
            batch += f" ({layout.micro_batch * layout.length} tokens)"
        options = "checkpointing" if layout.gradient_checkpointing else ""
        options += " offload_frozen" if layout.offload_frozen else ""
        memory, host = f"{planned.needed / GIB:.1f}", f"{planned.host / GIB:.0f}"
        rows.append([layout.method, roles, engine, batch, options.strip(), memory, host, f"{rate:,.0f}"])
    roles, batch = ("critic / reward / reference", "batch") if is_ppo else ("reference", "pairs")
    headers = ["method", roles, "engine", batch, "options", "GiB each", "host GiB", "tokens/s"]
    return f"{markdown(headers, rows)}\n\n{host_text(plans[0].hardware)}"
