"""
Estimate the seconds of a step, tokens per second and GPU-hours from FLOPs, bandwidths and assumed shares of both.

Generation reads every weight and the KV cache once per token, so bandwidth bounds it; learning is matrix products, so
FLOPs bound it, unless the network does. 2 FLOPs per weight and token forward, twice that backward (Kaplan et al. 2020,
§2.1). These are estimates: they are not fitted to runs.
"""

from dataclasses import dataclass

from . import memory
from .layout import Hardware, Layout
from .phases import Models
from .planning import Plan
from .shapes import ModelShape


@dataclass(frozen=True)
class Assumptions:
    """
    Shares of the hardware's stated speeds that are reached.

    Args:
        mfu: of the FLOPs, in forward and backward passes.
        unpacking: of `mfu`, with 4-bit weights.
        bandwidth: of memory bandwidth, while generating.
        network: of the speed of links and network.
    """

    mfu: float = 0.4
    unpacking: float = 0.6
    bandwidth: float = 0.5
    network: float = 0.7

    def __str__(self) -> str:
        return (
            f"MFU {self.mfu:.0%} (with 4-bit weights {self.mfu * self.unpacking:.0%}), {self.bandwidth:.0%} of memory "
            f"bandwidth while generating, {self.network:.0%} of link and network speed; communication hides behind "
            "computation; every response has its full length"
        )


@dataclass(frozen=True)
class Speed:
    """
    Args:
        generate, score, learn: seconds of one rollout and what is learned from it; in DPO, of one optimizer step.
        tokens: prompt and response tokens that all GPUs take in meanwhile.
        sequences: responses, or pairs, meanwhile.
        gpus: how many.
    """

    generate: float
    score: float
    learn: float
    tokens: float
    sequences: float
    gpus: int

    @property
    def seconds(self) -> float:
        return self.generate + self.score + self.learn

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def gpu_hours(self, sequences: float) -> float:
        """GPU-hours for a number of responses, or pairs."""
        return sequences / self.sequences * self.seconds * self.gpus / 3600


def speed(planned: Plan, assumptions: Assumptions | None = None) -> Speed:
    """Return the estimate for a plan."""
    assumed = assumptions or Assumptions()
    layout, models, hardware = planned.layout, planned.models, planned.hardware
    if layout.trainer == "dpo":
        pairs = layout.micro_batch * layout.accumulation
        seconds = layout.accumulation * _learn_micro_batch(layout, models, hardware, assumed)
        if layout.reference != "none":
            tokens = layout.learned_tokens / layout.micro_batch
            seconds += pairs * _read(models.actor, tokens, layout, hardware, assumed)
        seconds += _step(layout, models, hardware, assumed)
        sequences = pairs * hardware.gpus
        return Speed(0.0, 0.0, seconds, sequences * 2 * layout.length, sequences, hardware.gpus)
    micro_batches = layout.epochs * layout.rollout / layout.micro_batch
    learn = micro_batches * _learn_micro_batch(layout, models, hardware, assumed)
    learn += micro_batches / layout.accumulation * _step(layout, models, hardware, assumed)
    return Speed(
        _generate(layout, models.actor, hardware, assumed),
        _score(layout, models, hardware, assumed),
        learn,
        layout.rollout * layout.length * hardware.gpus,
        layout.rollout * hardware.gpus,
        hardware.gpus,
    )


def _read(shape: ModelShape, tokens: float, layout: Layout, hardware: Hardware, assumed: Assumptions) -> float:
    """Return the seconds of a forward pass: two FLOPs per weight that a token meets, and causal attention's."""
    embedding = 0 if shape.tied else shape.hidden * shape.vocab
    matrices = shape.active - embedding
    flops = tokens * (2.0 * matrices + 2.0 * shape.layers * shape.query * layout.length)
    return flops / (hardware.flops * assumed.mfu * (assumed.unpacking if layout.method == "qlora" else 1.0))


def _generate(layout: Layout, shape: ModelShape, hardware: Hardware, assumed: Assumptions) -> float:
    bits = 4 if layout.method == "qlora" else 16
    weights = memory.weight_bytes(shape, layout, bits)
    if layout.vllm_share:
        weights = 2.0 * shape.parameters / layout.vllm_tensor_parallel
    elif layout.compute == "autocast" or (layout.method == "qlora" and layout.rollout > 1):
        weights += 4.0 * shape.linear  # every pass casts or unpacks the weights: 2 bytes written, 2 read
    cache = memory.kv_cache(shape, layout.rollout, layout.prompt + layout.response / 2, layout)
    by_memory = (weights + cache) / (hardware.bandwidth * assumed.bandwidth)
    by_flops = _read(shape, layout.rollout, layout, hardware, assumed)
    per_token = max(by_memory, by_flops)
    if layout.zero_stage == 3 and not layout.gather_for_generation and not layout.vllm_share:
        way = hardware.pcie if layout.offload_parameters else _wire(hardware, assumed)
        per_token = max(per_token, weights / way)
    return layout.response * per_token + _read(shape, layout.rollout * layout.prompt, layout, hardware, assumed)


def _score(layout: Layout, models: Models, hardware: Hardware, assumed: Assumptions) -> float:
    tokens = layout.rollout * layout.length
    readers = [
        models.actor if getattr(layout, role) in ("adapter", "head") else getattr(models, role)
        for role in ("critic", "reward", "reference")
        if getattr(layout, role) != "none"
    ]
    return sum(_read(shape, tokens, layout, hardware, assumed) for shape in readers if shape is not None)


def _learn_micro_batch(layout: Layout, models: Models, hardware: Hardware, assumed: Assumptions) -> float:
    """Seconds of a forward and backward pass, or of what it sends if that takes longer."""
    learners = [(models.actor, layout.method == "full")]
    if layout.critic == "model" and models.critic is not None:
        learners.append((models.critic, True))
    elif layout.critic == "adapter":
        learners.append((models.actor, False))
    # Backward: as much as forward for the gradients of activations, and again for those of weights that learn.
    passes = [(shape, 1 + (2 if full else 1) + layout.gradient_checkpointing) for shape, full in learners]
    compute = sum(n * _read(shape, layout.learned_tokens, layout, hardware, assumed) for shape, n in passes)
    return max(
        compute, _sent(layout, models, hardware) / _wire(hardware, assumed), _over_pcie(layout, models, hardware)
    )


def _step(layout: Layout, models: Models, hardware: Hardware, assumed: Assumptions) -> float:
    """Seconds of an optimizer step: AdamW reads and writes 28 bytes per parameter, of which this GPU, or the host for
    all GPUs of its node, holds a part. A gradient goes to the host and a 16-bit weight comes back."""
    trained = _trained(layout, models)
    if layout.offload_optimizer:
        of_node = trained / hardware.nodes
        return (
            28 * of_node / (hardware.host_bandwidth * assumed.bandwidth) + 4 * trained / hardware.gpus / hardware.pcie
        )
    part = trained / hardware.gpus if layout.zero_stage else trained
    return 28 * part / (hardware.bandwidth * assumed.bandwidth)


def _trained(layout: Layout, models: Models) -> int:
    of_actor = models.actor.parameters if models.adapter is None else models.adapter.parameters
    return of_actor + (models.critic.parameters if models.critic is not None else 0)


def _over_pcie(layout: Layout, models: Models, hardware: Hardware) -> float:
    """Seconds in which offloaded parameters reach the GPUs, each its part, in every forward and backward pass."""
    if not layout.offload_parameters:
        return 0.0
    shapes = [models.actor, *([models.critic] if models.critic is not None else [])]
    passes = 3 if layout.gradient_checkpointing else 2
    part = memory.element(layout) * sum(shape.parameters for shape in shapes) / hardware.gpus
    return passes * part / hardware.pcie


def _sent(layout: Layout, models: Models, hardware: Hardware) -> float:
    """Bytes that one GPU sends in one micro-batch: gradients twice (all-reduce); ZeRO-3 the weights twice and the
    gradients once (Rajbhandari et al. 2020, §7)."""
    if hardware.gpus == 1:
        return 0.0
    shapes = [models.actor, *([models.critic] if models.critic is not None else [])]
    size, trained = memory.element(layout), _trained(layout, models)
    if layout.zero_stage == 3:
        gathers = 3 if layout.gradient_checkpointing else 2
        return size * (gathers * sum(s.parameters for s in shapes) + trained)
    return 2.0 * size * trained / layout.accumulation


def _wire(hardware: Hardware, assumed: Assumptions) -> float:
    """Bytes per second between GPUs: the network's as soon as there are two nodes."""
    return assumed.network * (hardware.network if hardware.nodes > 1 else hardware.link)
