"""
Count the bytes of each part of a run on one GPU: weights, gradients, optimizer states, activations, KV cache, logits,
buffers.

Pure functions of sizes. Sources: Rajbhandari et al. 2020 (ZeRO), §3 and §5, and DeepSpeed's own estimators for what
its stages hold; Korthikanti et al. 2022, "Reducing Activation Recomputation", §4, for the way of counting
activations, here for a gated MLP and attention that keeps no scores; Dettmers et al. 2023 (QLoRA), §3, for 4-bit
blocks.
"""

from dataclasses import dataclass, fields

from .layout import Hardware, Layout
from .optimizers import Learned, state_bytes
from .shapes import AdapterShape, ModelShape


# bitsandbytes: one scale for 64 weights; nested, that scale has 8 bits and 256 of them share one of 32 bits.
BLOCK, NESTED_BLOCK = 64, 256
# Logits of one tile: TRL's kernel takes 4096 tokens by 32768 ids; trl_ext/models/cpu_head.py 2**21 elements, and
# it keeps up to 2**28 logits for the backward pass.
KERNEL_TILE, CPU_TILE, CPU_KEPT = (4096, 32768), 2**21, 2**28
# Copies of the last position's logits that transformers' sampling holds at a time: logits, scores, probabilities.
SAMPLING_COPIES = 3
# DeepSpeed's estimators: "additional_buffer_factor" of host memory.
HOST_FACTOR = 1.5


@dataclass(frozen=True)
class Usage:
    """Bytes on one GPU, by what they are. `buffers`: communication buckets, gathered or cast copies of weights."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


PARTS = tuple(part.name for part in fields(Usage))


def element(layout: Layout) -> int:
    """Return the bytes of one unquantised weight."""
    return 2 if layout.compute == "bf16" else 4


def compute_bytes(layout: Layout) -> int:
    """Return the bytes of one element that a matrix product reads or writes."""
    return 4 if layout.compute == "fp32" else 2


# ------------------------------------------------------------------------------------------------------------ weights


def weight_bytes(shape: ModelShape, layout: Layout, bits: int = 16) -> float:
    """Return the bytes of a whole model's weights; with `bits` 4 or 8, linear layers but the head are quantised."""
    if bits == 16:
        return element(layout) * shape.parameters
    if bits == 8:
        scales = 0.0  # rows share one, which is next to nothing
    else:
        scales = 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK) if layout.nested_quantisation else 4 / BLOCK
    return (bits / 8 + scales) * shape.linear + element(layout) * (shape.parameters - shape.linear)


# ------------------------------------------------------------------------------------- weights, gradients, optimizer


def trained_states(frozen: float, trained: Learned, size: int, layout: Layout, hardware: Hardware) -> Usage:
    """
    Return what a model that learns holds all the time: `frozen` bytes of weights that do not learn, and `trained`
    parameters that do, each of `size` bytes without DeepSpeed.
    """
    if layout.zero_stage:
        return _zero_states(frozen, trained.parameters, layout, hardware)
    if layout.fsdp:
        return _fsdp_states(frozen, trained, layout, hardware)
    whole = size * trained.parameters
    buckets = whole if hardware.gpus > 1 else 0  # DDP copies gradients into its buckets
    return Usage(frozen + whole, whole, state_bytes(layout.optimizer, trained, size), buffers=buckets)


def adapter_element(layout: Layout, role: str) -> int:
    """Return 4: PEFT keeps adapters in float32; or 2: TRL casts the actor's on a quantised base to bfloat16."""
    return 2 if layout.method == "qlora" and role == "actor" else 4


def _zero_states(frozen: float, trained: int, layout: Layout, hardware: Hardware) -> Usage:
    """
    Count as DeepSpeed's estimators do: of a trained parameter its 16-bit value, a 16-bit gradient (in stages 1 and 2),
    a gradient of 32 bits for the step, a master weight of 32 bits, and the optimizer's states. What is partitioned is
    the optimizer (1), the gradients too (2), the weights too (3). Partitions are flat: no embedding, no matrix.
    """
    size, share, stage = element(layout), 1 / hardware.gpus, layout.zero_stage
    weights = (frozen + size * trained) * (share if stage == 3 else 1)
    gradients = {1: size + 4 * share, 2: (size + 4) * share, 3: 4 * share}[stage] * trained
    optimizer = (4 * trained + state_bytes(layout.optimizer, Learned(trained, factored=trained), 4)) * share
    if layout.offload_optimizer:
        gradients, optimizer = (size * trained if stage == 1 else 0), 0.0
    if layout.offload_parameters:
        weights = 0.0
    return Usage(weights, gradients, optimizer)


def _fsdp_states(frozen: float, trained: Learned, layout: Layout, hardware: Hardware) -> Usage:
    """Count the shares of FSDP2: accelerate makes what learns float32, and its gradients and states with it."""
    share, whole = 1 / hardware.gpus, 4.0 * trained.parameters
    optimizer = state_bytes(layout.optimizer, trained, 4) * share
    return Usage((frozen + whole) * share, whole * share, optimizer)


def accumulated_gradients(trained: int, layout: Layout) -> float:
    """
    Return the bytes of the gradients that FSDP2 holds whole until the last micro-batch of a step, where accelerate has
    them exchanged, unless `sync_each_batch` is on.
    """
    return compute_bytes(layout) * float(trained) if layout.fsdp and layout.accumulation > 1 else 0.0


def fsdp_buffers(shapes: list[ModelShape], layout: Layout, hardware: Hardware) -> float:
    """
    Return FSDP2's working space: two layers gathered, one of which is read while the other arrives, the gradient of
    one, and what stays gathered.
    """
    if not layout.fsdp or hardware.gpus == 1 or not shapes:
        return 0.0
    layer = max((shape.linear + shape.stacked) / shape.layers for shape in shapes)
    return compute_bytes(layout) * 3 * layer + sum(kept_gathered(shape, layout, hardware) for shape in shapes)


def kept_gathered(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """
    Return the most bytes that FSDP2 keeps whole beside layers: embedding, head and norms. Between passes a frozen
    model keeps the head alone.
    """
    if not layout.fsdp or hardware.gpus == 1:
        return 0.0
    return compute_bytes(layout) * float(outside_layers(shape))


def outside_layers(shape: ModelShape) -> int:
    """Return the parameters of a model's embedding, head and norms."""
    return shape.parameters - shape.linear - shape.stacked


def gathered_to_generate(
    actor: ModelShape, adapter: AdapterShape | None, critic: ModelShape | None, layout: Layout
) -> float:
    """Return the bytes that FSDP2 gathers for a rollout: all of the actor, and what of a critic is in no layer."""
    elements = actor.parameters + (adapter.parameters if adapter else 0) + (outside_layers(critic) if critic else 0)
    return compute_bytes(layout) * float(elements)


def zero_buffers(shapes: list[ModelShape], layout: Layout, hardware: Hardware) -> float:
    """
    Return DeepSpeed's working space: the reduce bucket and, in stages 1 and 2, the all-gather bucket of the same size;
    in stage 3 the gathered weights, `stage3_max_live_parameters` or the largest module if that is more, and the
    gradient of the largest module.
    """
    if not layout.zero_stage or not shapes:
        return 0.0
    size, total = element(layout), sum(shape.parameters for shape in shapes)
    bucket = size * min(layout.reduce_bucket, total)
    if layout.zero_stage < 3:
        return 2 * bucket if hardware.gpus > 1 else bucket
    largest = max(shape.largest_module for shape in shapes)
    return bucket + size * min(total, max(layout.live_parameters, largest)) + size * largest


def cast_buffers(shape: ModelShape, layout: Layout) -> float:
    """Return the bytes of copied weights: autocast's of a whole model that trains, or those of one 4-bit layer."""
    if layout.compute == "autocast" and layout.method == "full" and not layout.fsdp:  # which gathers 16 bits
        return 2.0 * (shape.linear + shape.head)
    return compute_bytes(layout) * shape.largest_linear if layout.method == "qlora" else 0.0


def host_states(trained: int, frozen: float, layout: Layout, hardware: Hardware) -> float:
    """Return the bytes of one node's host memory that offloading holds, DeepSpeed's estimate."""
    if not layout.offload_optimizer:
        return 0.0
    if layout.zero_stage < 3:
        return HOST_FACTOR * trained * max(4 * hardware.gpus, 16)
    each = 18 if layout.offload_parameters else 16
    base = frozen if layout.offload_parameters else 0.0
    return HOST_FACTOR * (each * trained + base) / hardware.nodes


# -------------------------------------------------------------------------------------------------------- activations


def layer_activations(shape: ModelShape, layout: Layout, adapter: AdapterShape | None = None) -> float:
    """
    Return the bytes per token that one layer keeps for its backward pass: a pre-norm layer with RMS norms and a gated
    MLP, and attention that keeps queries, keys, values, output and the log of the softmax's sum, not the scores. If
    only an adapter learns, the inputs of the weights are kept only where it reads them.
    """
    h, q, f, size = shape.hidden, shape.query, shape.inner, compute_bytes(layout)
    # A mask of (L, L) is turned into numbers in every layer, and with a mask shared keys are repeated for every head.
    shared = layout.trainer != "ppo" and layout.share_prefixes
    keys = q if layout.padded or shared else shape.key
    mask = size * layout.length if layout.padded and not shared else 0
    attention: float = size * (2 * q + 2 * keys) + 4 * shape.heads + mask
    if shared:  # packing/attention.py: the pieces' outputs before they are joined, and the keys and values that the
        # rejected completion reads, its prompt's in front of its own
        tokens = layout.prompt + 2 * layout.response
        attention += compute_bytes(layout) * shape.query * (1 + 2 * layout.length / tokens)
    if adapter is None:
        # A norm keeps its input, in float32, and what it multiplies by its weight; the projections keep its output,
        # which autocast casts for each of the five that read one.
        norms = {"fp32": 24 * h, "bf16": 16 * h, "autocast": 16 * h + 5 * 2 * h}[layout.compute]
        return norms + attention + 4 * f * size
    # Whether each adapted module casts its input to the adapter's dtype, or autocast's, and keeps the copy.
    casts = layout.compute == "fp32"
    if layout.method == "lora":
        casts = layout.compute == "bf16" and layout.zero_stage == 0
    read = 2 * adapter.modules if casts else size * adapter.inputs
    return 8 * h + attention + 3 * f * size + read + size * adapter.ranks


def trunk_activations(shape: ModelShape, layout: Layout, adapter: AdapterShape | None = None) -> float:
    """Return the bytes that one micro-batch keeps from a trunk's forward to its backward pass."""
    h, tokens = shape.hidden, layout.learned_tokens
    residual = h * (2 if layout.compute == "bf16" else 4)
    each = residual if layout.gradient_checkpointing else layer_activations(shape, layout, adapter)
    norm = (4 if adapter else 8) * h + residual
    scored = layout.scored_tokens * h * (8 if layout.compute == "fp32" else 2)
    return tokens * (shape.layers * each + norm) + scored


def backward_activations(shape: ModelShape, layout: Layout, adapter: AdapterShape | None = None) -> float:
    """Return the bytes that one layer's backward pass adds: gradients inside its MLP, and what it computes again."""
    again = layer_activations(shape, layout, adapter) if layout.gradient_checkpointing else 0.0
    return layout.learned_tokens * (again + compute_bytes(layout) * (2 * shape.inner + shape.hidden))


def forward_activations(shape: ModelShape, tokens: float, layout: Layout) -> float:
    """Return the peak bytes of a forward pass without gradient: the residual, a norm's output, the MLP's three."""
    residual = 2 if layout.compute == "bf16" else 4
    return tokens * (2 * shape.hidden * residual + 3 * shape.inner * compute_bytes(layout))


# ------------------------------------------------------------------------------------------------ KV cache and logits


def kv_cache(shape: ModelShape, sequences: float, length: float, layout: Layout) -> float:
    """Return the bytes of keys and values; one layer has them twice while a token is appended."""
    return 2 * shape.key * (shape.layers + 1) * sequences * length * compute_bytes(layout)


def vllm(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Return the bytes of a colocated vLLM: its share, or 16-bit weights and one sequence's cache if that is more."""
    if not layout.vllm_share:
        return 0.0
    of_sequence = 4 * shape.key * shape.layers * layout.length
    least = (2 * shape.parameters + of_sequence) / layout.vllm_tensor_parallel
    return max(layout.vllm_share * hardware.memory, least)


def head_tile(shape: ModelShape, tokens: float, is_cpu: bool) -> float:
    """Return the bytes of logits at a time if nothing is kept for a backward pass."""
    if is_cpu:
        return 4.0 * min(tokens * shape.vocab, max(CPU_TILE, tokens))
    return 2.0 * min(tokens, KERNEL_TILE[0]) * min(shape.vocab, KERNEL_TILE[1])


def kept_logits(shape: ModelShape, tokens: float, layout: Layout, is_cpu: bool) -> float:
    """Return the bytes of logits kept for the head's backward pass: none on a GPU, which computes them again."""
    if not (is_cpu and layout.compute == "fp32" and not layout.zero_stage):
        return 0.0
    return 4.0 * tokens * shape.vocab if tokens * shape.vocab <= CPU_KEPT else 0.0


def head_gradient(shape: ModelShape, layout: Layout, is_cpu: bool) -> float:
    """Return the bytes of the LM head's gradient while it is computed: TRL's kernel sums in float32, then casts."""
    if layout.method != "full":
        return 0.0
    plain = is_cpu and layout.compute == "fp32" and not layout.zero_stage
    return shape.head * (4.0 if plain else 4.0 + element(layout))
