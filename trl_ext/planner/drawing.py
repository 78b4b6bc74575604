"""Draw how cost grows: with the size of the model, the length of the sequences, and the number of GPUs."""

from pathlib import Path
from typing import Any

from .layout import GIB, Layout
from .planning import Plan, plan
from .timing import speed


SIZES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "llama-7b", "llama-13b", "llama-33b", "llama-65b")
LENGTHS = tuple(512 * 2**i for i in range(7))
COUNTS = tuple(2**i for i in range(13))


def picture(planned: Plan, path: str | Path) -> None:
    """
    Draw three panels around a plan: GiB on each GPU by model size and method, GiB by length in each phase, with and
    without gradient checkpointing, and GiB and tokens per second of a GPU by number of GPUs. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_size, by_length, by_gpus) = pyplot.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    _sizes(by_size, planned)
    _lengths(by_length, planned)
    _counts(by_gpus, planned)
    for axes in (by_size, by_length):
        axes.axhline(planned.hardware.memory / GIB, color="grey", linestyle=":", label="one GPU has")
        axes.set(ylabel="GiB on each GPU", yscale="log")
    for axes in (by_size, by_length, by_gpus):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def methods(layout: Layout) -> dict[str, Layout]:
    """Return the layout as it is, with LoRA, and with QLoRA and all roles on one base."""
    on_base: dict[str, Any] = {"compute": "bf16" if layout.compute == "autocast" else layout.compute}
    if layout.reference == "model":
        on_base["reference"] = "adapter"
    plain = {"zero_stage": min(layout.zero_stage, 2), "offload_parameters": False, "offload_optimizer": False}
    plain |= {"fsdp": False}
    head = {"critic": "head"} if layout.trainer == "ppo" else {}
    reward = {"reward": "adapter"} if layout.reward == "model" else {}
    return {
        layout.method: layout,
        "LoRA": layout.change(method="lora", **(on_base | head)),
        "QLoRA, one base": layout.change(method="qlora", **(on_base | plain | head | reward)),
    }


def _sizes(axes: Any, planned: Plan) -> None:
    for label, layout in methods(planned.layout).items():
        plans = [plan(name, layout, planned.hardware) for name in SIZES]
        billions = [p.models.actor.parameters / 1e9 for p in plans]
        axes.plot(billions, [p.needed / GIB for p in plans], "o-", label=label)
    axes.set(xlabel="billion parameters of the actor", xscale="log", title=f"Model size, {planned.hardware.gpus} GPUs")


def _lengths(axes: Any, planned: Plan) -> None:
    lines: dict[str, list[float]] = {}
    for length in LENGTHS:
        for checkpointing in (True, False):
            layout = planned.layout.change(
                prompt=length // 2, response=length // 2, gradient_checkpointing=checkpointing
            )
            for phase in plan(planned.names, layout, planned.hardware).phases:
                how = (", checkpointing" if checkpointing else ", all kept") if phase.name == "learn" else ""
                if how or checkpointing:
                    lines.setdefault(phase.name + how, []).append(phase.total / GIB)
    where = f"{planned.models.actor.name} on {planned.hardware.gpus} GPUs"
    for label, needed in lines.items():
        axes.plot(LENGTHS, needed, "o-", label=label)
    axes.set(xlabel="tokens of prompt and response", xscale="log", title=f"Length, {where}")


def _counts(axes: Any, planned: Plan) -> None:
    plans = [plan(planned.names, planned.layout, planned.hardware.with_gpus(n)) for n in COUNTS]
    axes.plot(COUNTS, [p.needed / GIB for p in plans], "o-", label="GiB on each GPU")
    rates = [speed(p).tokens_per_second / p.hardware.gpus for p in plans]
    axes.plot(COUNTS, rates, "s--", label="tokens/s of each GPU")
    axes.set(xlabel="GPUs", xscale="log", yscale="log", title=f"GPUs, {planned.models.actor.name}")
