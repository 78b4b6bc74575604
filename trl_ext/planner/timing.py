"""
Estimate the seconds of a step, tokens per second and GPU-hours from FLOPs, bandwidths and assumed shares of both.

Generation reads every weight and the KV cache once per token, so bandwidth bounds it; learning is matrix products, so
FLOPs bound it, unless the network does. 2 FLOPs per weight and token forward, twice that backward (Kaplan et al. 2020,
§2.1). These are estimates: they are not fitted to runs.
"""

from dataclasses import dataclass

from . import memory
from .planning import Plan
from .shapes import ModelShape


# Shares of the hardware's stated speeds that are assumed to be reached: of FLOPs in forward and backward passes, of
# those with 4-bit weights, of memory bandwidth while generating, of links and network.
MFU, UNPACKING, BANDWIDTH, NETWORK = 0.4, 0.6, 0.5, 0.7


def assumed(trainer: str) -> str:
    """Return what an estimate for "ppo", "dpo" or "reward" assumes, in words."""
    generating = f"{BANDWIDTH:.0%} of memory bandwidth while generating, " if trainer == "ppo" else ""
    length = "response" if trainer == "ppo" else "pair"
    return (
        f"Assumed: MFU {MFU:.0%} (with 4-bit weights {MFU * UNPACKING:.0%}), {generating}{NETWORK:.0%} of link and "
        f"network speed; communication hides behind computation; every {length} has its full length."
    )


@dataclass(frozen=True)
class Speed:
    """Seconds of one rollout and what is learned from it; of pairs, of one optimizer step."""

    generate: float
    score: float
    learn: float
    tokens: float  # of prompts and responses that all GPUs take in meanwhile
    sequences: float  # responses, or pairs, meanwhile
    gpus: int

    @property
    def seconds(self) -> float:
        return self.generate + self.score + self.learn

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def gpu_hours(self, sequences: float) -> float:
        """Return the GPU-hours for a number of responses, or pairs."""
        return sequences / self.sequences * self.seconds * self.gpus / 3600


def speed(planned: Plan) -> Speed:
    """Return the estimate for a plan."""
    layout, gpus = planned.layout, planned.hardware.gpus
    run = _Run(planned)
    if layout.trainer != "ppo":
        pairs = layout.micro_batch * layout.accumulation
        seconds = layout.accumulation * run.learn_micro_batch()
        if layout.reference != "none":
            seconds += pairs * run.read(run.models.actor, layout.learned_tokens / layout.micro_batch)
        seconds += run.step()
        sequences = pairs * gpus
        return Speed(0.0, 0.0, seconds, sequences * 2 * layout.length, sequences, gpus)
    micro_batches = layout.epochs * layout.rollout / layout.micro_batch
    # A step whose last micro-batch is smaller is a whole step.
    steps = layout.epochs * max(round(layout.rollout / (layout.micro_batch * layout.accumulation)), 1)
    learn = micro_batches * run.learn_micro_batch() + steps * run.step()
    sequences = layout.rollout * gpus
    return Speed(run.generate(), run.score(), learn, sequences * layout.length, sequences, gpus)


class _Run:
    """The seconds of a plan's parts."""

    def __init__(self, planned: Plan):
        self.layout, self.hardware = planned.layout, planned.hardware
        self.models = models = planned.models
        self.shapes = [models.actor, *([models.critic] if models.critic is not None else [])]
        of_actor = models.actor.parameters if models.adapter is None else models.adapter.parameters
        self.trained = of_actor + (models.critic.parameters if models.critic is not None else 0)
        # Bytes per second between GPUs: the network's as soon as there are two nodes.
        self.wire = NETWORK * (self.hardware.network if self.hardware.nodes > 1 else self.hardware.link)

    def read(self, shape: ModelShape, tokens: float) -> float:
        """Return the seconds of a forward pass: two FLOPs per weight that a token meets, and causal attention's."""
        embedding = 0 if shape.tied else shape.hidden * shape.vocab
        matrices = shape.active - embedding
        flops = tokens * (2.0 * matrices + 2.0 * shape.layers * shape.query * self.layout.length)
        unpacking = UNPACKING if self.layout.method == "qlora" else 1.0
        return flops / (self.hardware.flops * (MFU * unpacking))

    def generate(self) -> float:
        layout, shape, hardware = self.layout, self.models.actor, self.hardware
        weights = memory.weight_bytes(shape, layout, 4 if layout.method == "qlora" else 16)
        if layout.vllm_share:
            weights = 2.0 * shape.parameters / layout.vllm_tensor_parallel
        elif layout.compute == "autocast" or (layout.method == "qlora" and layout.rollout > 1):
            weights += 4.0 * shape.linear  # every pass casts or unpacks the weights: 2 bytes written, 2 read
        cache = memory.kv_cache(shape, layout.rollout, layout.prompt + layout.response / 2, layout)
        by_memory = (weights + cache) / (hardware.bandwidth * BANDWIDTH)
        per_token = max(by_memory, self.read(shape, layout.rollout))
        if layout.zero_stage == 3 and not layout.gather_for_generation and not layout.vllm_share:
            per_token = max(per_token, weights / (hardware.pcie if layout.offload_parameters else self.wire))
        return layout.response * per_token + self.read(shape, layout.rollout * layout.prompt)

    def score(self) -> float:
        tokens, seconds = self.layout.rollout * self.layout.length, 0.0
        for role in ("critic", "reward", "reference"):
            kind = getattr(self.layout, role)
            shape = self.models.actor if kind in ("adapter", "head") else getattr(self.models, role)
            if kind != "none" and shape is not None:
                seconds += self.read(shape, tokens)
        return seconds

    def learn_micro_batch(self) -> float:
        """Return the seconds of a forward and backward pass, or of what it sends if that takes longer."""
        layout, models = self.layout, self.models
        learners = [(models.actor, layout.method == "full")]
        if layout.critic == "model" and models.critic is not None:
            learners.append((models.critic, True))
        elif layout.critic == "adapter":
            learners.append((models.actor, False))
        # Backward: as much as forward for the gradients of activations, and again for those of weights that learn.
        passes = [(shape, 1 + (2 if full else 1) + layout.gradient_checkpointing) for shape, full in learners]
        # A budget of tokens may leave room for a part of a sequence, which is not computed.
        tokens = layout.micro_batch * layout.length if layout.trainer == "ppo" else layout.learned_tokens
        compute = sum(n * self.read(shape, tokens) for shape, n in passes)
        return max(compute, self.sent() / self.wire, self.over_pcie())

    def step(self) -> float:
        """
        Return the seconds of an optimizer step: AdamW reads and writes 28 bytes per parameter, of which this GPU, or
        the host for all GPUs of its node, holds a part. A gradient goes to the host and a 16-bit weight comes back.
        """
        layout, hardware = self.layout, self.hardware
        if layout.offload_optimizer:
            on_host = 28 * (self.trained / hardware.nodes) / (hardware.host_bandwidth * BANDWIDTH)
            return on_host + 4 * self.trained / hardware.gpus / hardware.pcie
        part = self.trained / hardware.gpus if layout.zero_stage or layout.fsdp else self.trained
        return 28 * part / (hardware.bandwidth * BANDWIDTH)

    def over_pcie(self) -> float:
        """Return the seconds in which offloaded parameters reach the GPUs, each its part, in every pass."""
        if not self.layout.offload_parameters:
            return 0.0
        passes = 3 if self.layout.gradient_checkpointing else 2
        part = memory.element(self.layout) * sum(shape.parameters for shape in self.shapes) / self.hardware.gpus
        return passes * part / self.hardware.pcie

    def sent(self) -> float:
        """
        Return the bytes that one GPU sends in one micro-batch: gradients twice (all-reduce); ZeRO-3 and FSDP2 the
        weights twice and the gradients once (Rajbhandari et al. 2020, §7), FSDP2 these in the last one alone.
        """
        if self.hardware.gpus == 1:
            return 0.0
        size = memory.element(self.layout)
        if self.layout.zero_stage == 3:
            gathers = 3 if self.layout.gradient_checkpointing else 2
            return size * (gathers * sum(shape.parameters for shape in self.shapes) + self.trained)
        if self.layout.fsdp:
            gathers = 3 if self.layout.gradient_checkpointing else 2
            weights = gathers * sum(shape.parameters for shape in self.shapes)
            return memory.compute_bytes(self.layout) * (weights + self.trained / self.layout.accumulation)
        return 2.0 * size * self.trained / self.layout.accumulation
