"""The layout of a run, which is planned, and the hardware that it is to fit."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from ..ranges import COUNT, POSITIVE, Range, check_ranges, one_of
from .optimizers import OPTIMIZERS


GIB = 2**30
BITS = one_of(4, 8, 16)
WHOLE = Range("an integer of at least 0", lambda value: type(value) is int and value >= 0)


@dataclass(frozen=True)
class Hardware:
    """
    The machine. Speeds are those of one GPU, as its maker states them; `timing.py` says what share of them is assumed.

    Args:
        gpus: in all.
        memory: bytes of one GPU.
        gpus_per_node: at most `gpus`.
        host_memory: bytes of one node.
        flops: 16-bit floating-point operations per second.
        bandwidth: bytes per second from the GPU's memory.
        link, network: bytes per second that one GPU sends to others of its node, and of other nodes.
        pcie: bytes per second between one GPU and the host.
        host_bandwidth: bytes per second from one node's host memory.
        context: bytes that the CUDA context, its libraries' workspaces and the driver take: an assumption until it has
            been measured. 0 on a CPU, where memory is counted from a process that has imported everything.
        fragmentation: share of what is allocated that the allocator holds beside it: an assumption, 0 on a CPU.
        is_cpu: whether the run computes on a CPU.
        name: the card's, if it is known.
        host_for_each: bytes of host memory that are assumed for each GPU of a node; 0 where `host_memory` is known.
    """

    gpus: Annotated[int, POSITIVE] = 1
    memory: Annotated[float, POSITIVE] = 80 * GIB
    gpus_per_node: Annotated[int, POSITIVE] = 8
    host_memory: Annotated[float, POSITIVE] = 512 * GIB
    flops: Annotated[float, POSITIVE] = 312e12
    bandwidth: Annotated[float, POSITIVE] = 2.0e12
    link: Annotated[float, POSITIVE] = 300e9
    network: Annotated[float, POSITIVE] = 25e9
    pcie: float = 25e9
    host_bandwidth: float = 200e9
    context: float = 1.0 * GIB
    fragmentation: float = 0.03
    is_cpu: bool = False
    name: str = ""
    host_for_each: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def on_node(self) -> int:
        """Return the GPUs of a full node."""
        return min(self.gpus, self.gpus_per_node)

    def with_gpus(self, gpus: int) -> "Hardware":
        """Return the same machine, or machines, with another number of GPUs and the host memory that goes with it."""
        other = replace(self, gpus=gpus)
        return replace(other, host_memory=self.host_for_each * other.on_node) if self.host_for_each else other


def says(default: Any, text: str) -> Any:
    """Return a field with what it is, for `trl-ext plan --help`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Layout:
    """
    How a run is laid out. Lengths are tokens, batches are per GPU; each field says what it is.

    In PPO a budget of tokens takes the place of the batch: `micro_batch` and `accumulation` of the same step, or
    `score_batch`, become what it holds of the longest sequences.
    """

    trainer: Annotated[str, one_of("ppo", "dpo", "reward")] = says("ppo", '"ppo", "dpo" or "reward".')
    method: Annotated[str, one_of("full", "lora", "qlora")] = says(
        "full", 'how the actor is trained: "full", "lora", or "qlora" (a base in 4 bits).'
    )
    critic: Annotated[str, one_of("model", "head", "adapter", "none")] = says(
        "model", '"model", "head" on the actor\'s trunk, "adapter" on its base; "none" in DPO and reward runs.'
    )
    reference: Annotated[str, one_of("model", "adapter", "none")] = says(
        "model",
        '"model" of its own; "adapter": the actor with its adapter off, or a frozen one; "none": no KL, or '
        "precomputed.",
    )
    reward: Annotated[str, one_of("model", "adapter", "none")] = says(
        "model", '"model", "adapter" on the actor\'s base, "none": functions. "none" in DPO and reward runs.'
    )
    compute: Annotated[str, one_of("fp32", "autocast", "bf16")] = says(
        "autocast",
        '"fp32"; "autocast": float32 weights, computation in bfloat16; "bf16": weights and computation in bfloat16, '
        "as with adapters or DeepSpeed.",
    )
    optimizer: str = says("adamw_torch_fused", "transformers' `optim`.")
    zero_stage: Annotated[int, one_of(0, 1, 2, 3)] = says(
        0, "DeepSpeed's ZeRO stage. 0: no DeepSpeed, but DDP if there are several GPUs."
    )
    fsdp: bool = says(False, "let FSDP2 shard weights, gradients and optimizer states of all models.")
    offload_optimizer: bool = says(False, "let DeepSpeed offload the optimizer to the host.")
    offload_parameters: bool = says(False, "let DeepSpeed offload the parameters to the host.")
    micro_batch: Annotated[int, COUNT] = says(
        1, "sequences (PPO) or pairs (DPO, reward) in one forward and backward pass."
    )
    accumulation: Annotated[int, COUNT] = says(1, "micro-batches in one optimizer step.")
    rollout: Annotated[int, COUNT] = says(1, "responses that are sampled at the same time (PPO).")
    score_batch: Annotated[int, COUNT] = says(64, "sequences in one scoring pass (PPO).")
    micro_batch_tokens: Annotated[int, WHOLE] = says(
        0, "most tokens in one forward and backward pass, in place of `micro_batch` (PPO). 0: none."
    )
    score_batch_tokens: Annotated[int, WHOLE] = says(0, "the same of one scoring pass (PPO).")
    epochs: Annotated[int, COUNT] = says(1, "passes over a rollout (PPO).")
    prompt: Annotated[int, COUNT] = says(512, "longest prompt.")
    response: Annotated[int, COUNT] = says(512, "longest response, or completion of a pair.")
    gradient_checkpointing: bool = says(True, "keep only the inputs of layers for the backward pass.")
    vllm_share: Annotated[float, Range("from 0 to below 1", lambda share: 0 <= share < 1)] = says(
        0.0, "share of the GPU that a colocated vLLM uses."
    )
    vllm_sleeps: bool = says(False, "vLLM frees its share while learning.")
    vllm_tensor_parallel: Annotated[int, COUNT] = says(1, "GPUs that share one copy of vLLM's weights.")
    gather_for_generation: bool = says(True, "under ZeRO-3, gather all weights for generation.")
    offload_frozen: bool = says(False, "reward and reference are on the GPU only while they score.")
    reward_bits: Annotated[int, BITS] = says(16, "bits of the reward model: 4, 8, or 16 for not quantised.")
    reference_bits: Annotated[int, BITS] = says(16, "bits of the reference: 4, 8, or 16 for not quantised.")
    nested_quantisation: bool = says(False, "quantise the scales of 4-bit blocks too.")
    rank: Annotated[int, COUNT] = says(16, "rank of LoRA.")
    targets: str | tuple[str, ...] = says("all-linear", "target modules of LoRA.")
    share_prefixes: bool = says(True, "a pair's prompt is computed once (DPO, reward).")
    padded: bool = says(True, "batches contain padding, so attention gets a mask.")
    reduce_bucket: float = says(5e8, "DeepSpeed's `reduce_bucket_size`, in elements.")
    live_parameters: float = says(1e9, "DeepSpeed's `stage3_max_live_parameters`, in elements.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.optimizer not in OPTIMIZERS:
            near = difflib.get_close_matches(self.optimizer, OPTIMIZERS, n=3)
            meant = (
                f"Did you mean {' or '.join(near)}?" if near else "There are adamw_torch_fused, adamw_8bit and more."
            )
            raise ValueError(
                f"`optimizer` is {self.optimizer!r}, and transformers has no `optim` of that name. {meant}"
            )
        if self.trainer == "ppo":
            self._fill_budgets()
        if self.trainer == "reward" and {self.critic, self.reward, self.reference} != {"none"}:
            raise ValueError(
                f"A reward model is trained without other models; critic={self.critic!r}, reward={self.reward!r}, "
                f"reference={self.reference!r} were given. Set all three to 'none'."
            )
        if self.trainer == "dpo" and (self.critic, self.reward) != ("none", "none"):
            raise ValueError(
                f"DPO has no critic and no reward model; critic={self.critic!r}, reward={self.reward!r} were given. "
                "Set both to 'none'."
            )
        if self.trainer == "ppo" and self.critic == "none":
            raise ValueError("PPO has a critic: set `critic` to 'model', 'head' or 'adapter'.")
        adapters = [name for name in ("critic", "reference", "reward") if getattr(self, name) == "adapter"]
        if self.method == "full" and adapters:
            raise ValueError(
                f"method='full' moves the base, on which {adapters} would be adapters. Set method='lora' or 'qlora', "
                "or give them models of their own."
            )
        if self.method == "qlora" and self.zero_stage == 3:
            raise ValueError(
                "A base in 4 bits under ZeRO-3 cannot be planned yet: set `zero_stage` to 2, or method='lora'."
            )
        for role in ("reward", "reference"):
            if self.zero_stage == 3 and getattr(self, f"{role}_bits") < 16:
                raise ValueError(f"ZeRO-3 cannot partition a quantised {role}: set `{role}_bits` to 16.")
        if self.offload_frozen and self.zero_stage == 3:
            raise ValueError("ZeRO-3 partitions frozen models; `offload_frozen` is for the other stages.")
        if self.offload_frozen and 8 in (self.reward_bits, self.reference_bits):
            raise ValueError("bitsandbytes' 8-bit layers cannot be moved: with `offload_frozen` take 4 or 16 bits.")
        if self.fsdp:
            self._check_fsdp(adapters)
        if (self.offload_optimizer or self.offload_parameters) and self.zero_stage == 0:
            raise ValueError("Offloading the optimizer or parameters is DeepSpeed's: set `zero_stage` to 1, 2 or 3.")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"Parameters are offloaded by ZeRO-3 alone; `zero_stage` is {self.zero_stage}.")
        if self.zero_stage and self.compute == "autocast":
            raise ValueError("DeepSpeed computes in the dtype of its weights: set `compute` to 'bf16' (or 'fp32').")

    def _fill_budgets(self) -> None:
        given = {name: getattr(self, name) for name in ("micro_batch_tokens", "score_batch_tokens")}
        small = [f"{name}={budget}" for name, budget in given.items() if 0 < budget < self.length]
        if small:
            raise ValueError(
                f"A sequence has {self.length} tokens, prompt={self.prompt} and response={self.response}, for which "
                f"{' and '.join(small)} is too small. Set at least {self.length}, or plan shorter sequences."
            )
        filled: dict[str, int] = {}
        if self.micro_batch_tokens:
            step = self.micro_batch * self.accumulation
            tokens = min(self.micro_batch_tokens, step * self.length)
            size = tokens // self.length
            filled |= {"micro_batch_tokens": tokens, "micro_batch": size, "accumulation": -(-step // size)}
        if self.score_batch_tokens:
            filled |= {"score_batch": self.score_batch_tokens // self.length}
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check_fsdp(self, adapters: list[str]) -> None:
        if self.zero_stage:
            raise ValueError(f"`fsdp` and `zero_stage={self.zero_stage}` are two engines: leave one of them out.")
        roles = [role for role in adapters if role != "reference"]
        if roles:
            raise ValueError(
                f"FSDP cannot shard the base that {roles} share with the actor as adapters: give them models of their "
                "own, or `critic` a head, or set `zero_stage`."
            )
        bits = [name for name in ("reward_bits", "reference_bits") if getattr(self, name) < 16]
        if self.method == "qlora" or bits:
            what = "method='qlora'" if self.method == "qlora" else bits[0]
            raise ValueError(f"FSDP has not been tried with quantised weights ({what}): set `zero_stage`, or 16 bits.")
        if self.offload_frozen:
            raise ValueError("FSDP shards frozen models; `offload_frozen` is for runs without it.")

    @property
    def shards_weights(self) -> bool:
        """Return whether each GPU keeps a share of every model's weights."""
        return self.fsdp or self.zero_stage == 3

    def change(self, **changes: object) -> "Layout":
        """Return the layout with `changes`; raise `ValueError` where they do not go together."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def learned_tokens(self) -> int:
        """
        Return the most tokens that one micro-batch puts through the trunk. A pair has its prompt once, or twice.
        """
        if self.trainer == "ppo":
            return self.micro_batch_tokens or self.micro_batch * self.length
        prompts = 1 if self.share_prefixes else 2
        return self.micro_batch * (prompts * self.prompt + 2 * self.response)

    @property
    def scored_tokens(self) -> int:
        """
        Return the most tokens of one micro-batch whose log-probability is read; a reward model reads none. Where a
        micro-batch is so many tokens, the prompts may be short: then nearly all of them are answers.
        """
        if self.trainer == "reward":
            return 0
        if self.trainer == "dpo":
            return 2 * self.micro_batch * self.response
        at_once = self.micro_batch * self.accumulation * self.response
        return max(min(self.micro_batch_tokens, at_once), self.micro_batch * self.response)

    @property
    def scoring(self) -> tuple[int, int]:
        """Return the tokens of one scoring pass, and those of answers among them; see `scored_tokens`."""
        sequences = min(self.score_batch, self.rollout)
        tokens, of_answers = (self.score_batch_tokens or sequences * each for each in (self.length, self.response))
        return min(tokens, self.rollout * self.length), min(of_answers, self.rollout * self.response)
