"""
The only file that imports TRL's private names, and the range of TRL versions they were checked with.

When a new TRL release changes one of them, change this file and its test, `tests/test_trl_seams.py`.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import trl
from accelerate import PartialState
from accelerate.utils import fsdp2_prepare_model
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.data_utils import _tokenize
from trl.generation import vllm_generation
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.models.utils import add_hooks, disable_gradient_checkpointing, remove_hooks
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    create_model_from_path,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)


__all__ = [
    "FusedCausalLMOutput",
    "FusedHead",
    "add_fused_lm_head",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "engines_of_dtype",
    "exclude_from_weight_sync",
    "gathered_for_generation",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
    "pad",
    "prepare_frozen",
    "require_vllm",
    "reward_ids",
    "scoring_head",
    "server_info",
    "tokenised_pair",
    "unwrap_model_for_generation",
    "use_adapter",
]

SUPPORTED = (Version("1.16"), Version("1.17"))
_INSTALL = f"Install a supported TRL with `pip install 'trl>={SUPPORTED[0]},<{SUPPORTED[1]}'`."

if not SUPPORTED[0] <= Version(Version(trl.__version__).base_version) < SUPPORTED[1]:
    raise ImportError(
        f"trl_ext works with trl>={SUPPORTED[0]},<{SUPPORTED[1]}; version {trl.__version__} is installed. {_INSTALL}"
    )


class FusedHead:
    """
    TRL's fused head of a causal LM that `add_fused_lm_head` has patched: what it hands to its kernel, seen in a call
    that ends there. TRL finds the soft cap and the scale of the logits in the config under the names that most
    architectures use; those of other architectures are put in.

    Attributes:
        temperature: what divides the logits.
        outputs: names of the requested statistics.
        soft_cap: c of c·tanh(logit / c), or `None`.
        scale: factor of the logits before the cap.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        given = _handed_to_kernel(model)
        self.temperature: float = given["temperature"]
        self.outputs: tuple[str, ...] = given["outputs"]
        self.soft_cap: float | None = given["final_logit_softcapping"]
        self.scale: float = given["logit_scale"]
        config = model.config.get_text_config()
        if (soft_cap := getattr(config, "logits_soft_cap", None)) is not None:
            self.soft_cap = soft_cap
        if (divisor := getattr(config, "logits_mup_width_multiplier", None)) is not None:
            self.scale = 1 / divisor
        self._is_trls = (self.soft_cap, self.scale) == (given["final_logit_softcapping"], given["logit_scale"])

    def kernel(self) -> AbstractContextManager[None]:
        """Within the context, the kernel gets this head's soft cap and scale."""
        if self._is_trls:
            return nullcontext()
        return _kernel(_corrected(trl_utils._ChunkedLogProbFunction, self.soft_cap, self.scale))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, V) of trunk states (n, H), float32 and divided by the temperature."""
        head = self.model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            scaled = head(states).float() * self.scale
        if self.soft_cap is not None:
            scaled = self.soft_cap * torch.tanh(scaled / self.soft_cap)
        return scaled / self.temperature


# The kernel's parameters, in the order in which TRL's fused head gives them.
KERNEL = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()


class _Handed(Exception):
    """Ends a call of the fused head at its kernel, with what that was given."""


class _Unread:
    """A trunk that is not run: the hooks of one that is spread over ranks must not be called here."""

    def __init__(self, trunk: nn.Module):
        self._trunk = trunk

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=torch.zeros(1, 2, 1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


def _handed_to_kernel(model: PreTrainedModel) -> dict[str, Any]:
    """
    Return what TRL's fused head of a model gives its kernel, by name, from a call without the trunk.

    Raises:
        RuntimeError: when the model has none, or TRL has changed it or its kernel.
    """
    found = list(inspect.signature(trl_utils._ChunkedLogProbFunction.forward).parameters)[1:]
    if found != KERNEL:
        raise RuntimeError(f"The kernel of TRL's fused head takes {found}; {KERNEL} is what trl_ext knows. {_INSTALL}")

    class Kernel:
        @staticmethod
        def apply(*given: Any) -> None:
            raise _Handed(given)

    ids = torch.zeros((1, 2), dtype=torch.long)
    its_class: Any = type(model)
    own = vars(its_class).get("base_model")
    its_class.base_model = _Unread(model.base_model)
    try:
        # Nothing is read of the head: it may be quantized or not be partitioned yet, and then cannot be gathered.
        with _kernel(Kernel), _ungathered(), torch.no_grad():
            model.forward(input_ids=ids, labels=ids, fused_lm_head=True)
    except _Handed as handed:
        (given,) = handed.args
        if len(given) == len(KERNEL):
            return dict(zip(KERNEL, given, strict=True))
    finally:
        if own is None:
            del its_class.base_model
        else:
            its_class.base_model = own
    raise RuntimeError(
        f"{type(model).__name__} has no fused head of TRL's, or one that no longer calls its kernel with {KERNEL}. "
        f"{_INSTALL}"
    )


@contextmanager
def _ungathered() -> Iterator[None]:
    """Within the context, TRL's fused heads are not gathered under ZeRO-3."""
    original = trl_utils.maybe_gather_lm_head_ctx
    trl_utils.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
    try:
        yield
    finally:
        trl_utils.maybe_gather_lm_head_ctx = original


@contextmanager
def _kernel(function: Any) -> Iterator[None]:
    """Within the context, TRL's fused heads call `function.apply`."""
    original = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = function
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


@functools.cache  # one class, not one for every call: torch.compile would compile for each of them
def _corrected(inner: Any, soft_cap: float | None, scale: float) -> type:
    class Corrected:
        @staticmethod
        def apply(*given: Any) -> tuple[torch.Tensor | None, ...]:
            before, (_, _, outputs) = given[:-3], given[-3:]
            return inner.apply(*before, soft_cap, scale, outputs)

    return Corrected


def prepare_frozen(model: nn.Module, accelerator: Any, is_quantized: bool = False) -> nn.Module:
    """
    Freeze a model and place it: ZeRO-3 or FSDP partitions it, everything else puts it on the device. A quantised model
    stays as bitsandbytes has made it: DeepSpeed would cast what is not quantised in it.

    FSDP shards layer by layer, as the actor; TRL's `prepare_fsdp` would gather the whole model at once.
    """
    model.requires_grad_(False)
    model.eval()
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None and not is_quantized:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None and not is_quantized:
        plugin = accelerator.state.fsdp_plugin
        policy = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
        try:
            return fsdp2_prepare_model(accelerator, model)
        finally:  # which holds the names of this model's layers, and the next may be of another family
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy
    return accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)


@contextmanager
def gathered_for_generation(
    engine: nn.Module,
    accelerator: Any,
    parameters: Iterable[nn.Parameter],
    gradient_checkpointing_kwargs: dict[str, Any] | None,
) -> Iterator[None]:
    """
    Within the context, GRPO's generation under ZeRO-3 uses the full weights of `parameters`, gathered once, here. GRPO
    would gather every parameter in each turn of a conversation with tools, of which ranks have different numbers, and
    `generate` would wait for the other ranks at each token.
    """
    import deepspeed

    model = accelerator.unwrap_model(engine)
    gathering, own = grpo_trainer.unwrap_model_for_generation, vars(model).get("generate")  # the user may have set one

    @contextmanager
    def already_gathered(*args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        yield model

    with (
        disable_gradient_checkpointing(model, gradient_checkpointing_kwargs),
        deepspeed.zero.GatheredParameters(parameters),
    ):
        remove_hooks(engine)
        model.generate = functools.partial(model.generate, synced_gpus=False)
        grpo_trainer.unwrap_model_for_generation = already_gathered
        try:
            yield
        finally:
            grpo_trainer.unwrap_model_for_generation = gathering
            if own is None:
                del model.generate
            else:
                model.generate = own
            add_hooks(engine)


def require_vllm() -> None:
    """Raise `ImportError` unless a vLLM is installed whose version is in TRL's range, which TRL itself names."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        is_there = vllm_generation.is_vllm_available()
    if not is_there:
        raise ImportError(
            "`use_vllm` needs vLLM, which is not installed here; a run with a vLLM server needs it too, to send "
            "weights. Install it with `pip install 'trl[vllm]'`, or leave `use_vllm` out."
        )
    if warned:
        raise ImportError(f"`use_vllm`: {warned[0].message} Install one with `pip install 'trl[vllm]'`.")


@contextmanager
def engines_of_dtype(dtype: str) -> Iterator[None]:
    """
    Within the context, a colocated engine that TRL starts computes in `dtype`. TRL leaves that to vLLM, which serves a
    folder of float32 weights in 16 bits.
    """
    original = vllm_generation.LLM
    vllm_generation.LLM = functools.partial(original, dtype=dtype)
    try:
        yield
    finally:
        vllm_generation.LLM = original


def server_info(base_url: str, timeout: float) -> dict[str, Any]:
    """
    Return the configuration of the vLLM server at an address, for which TRL's client waits `timeout` seconds; raise
    `ValueError` if there is none, or it does not say.
    """
    try:
        client = vllm_generation.VLLMClient(base_url=base_url, connection_timeout=timeout)
        return client.get_server_info()
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
        raise ValueError(f"{error} `trl-ext serve RECIPE` starts a server that fits.") from error


def exclude_from_weight_sync(vllm_generation: Any, *submodules: nn.Module) -> None:
    """
    Leave submodules of the actor out of what is sent to vLLM, which does not know them. They are taken off the model
    while TRL walks the parameters, so ZeRO-3 does not gather them either, which with PEFT would happen for all
    parameters at once, and no wrapper's prefix can hide them.
    """
    iterate = vllm_generation._iter_named_params

    def _iter_named_params() -> Iterator[tuple[str, torch.Tensor]]:
        left_out = set(submodules)
        owners = [module for module in vllm_generation.model.modules() if left_out & set(module._modules.values())]
        whole = [owner._modules for owner in owners]
        for owner in owners:
            owner._modules = {name: each for name, each in owner._modules.items() if each not in left_out}
        try:
            yield from iterate()
        finally:
            for owner, modules in zip(owners, whole, strict=True):
                owner._modules = modules

    vllm_generation._iter_named_params = _iter_named_params


@contextmanager
def scoring_head(cpu_head: type[torch.autograd.Function]) -> Iterator[None]:
    """Within the context, `cpu_head` scores plain float32 heads on CPU; every other head is scored by TRL's."""
    with _kernel(_chosen_head(trl_utils._ChunkedLogProbFunction, cpu_head)):
        yield


@functools.cache  # one class, not one for every call: torch.compile would compile for each of them
def _chosen_head(original: Any, cpu_head: type[torch.autograd.Function]) -> type:
    class Chosen:
        @staticmethod
        def apply(
            states: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            softcap: float | None,
            scale: float,
            outputs: tuple[str, ...],
        ) -> tuple[torch.Tensor | None, ...]:
            plain = states.device.type == "cpu" and states.dtype == weight.dtype == torch.float32
            plain = plain and bias is None and softcap is None and not hasattr(weight, "ds_id")
            if not plain or torch.is_autocast_enabled("cpu"):
                return original.apply(states, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
            with_grad = torch.is_grad_enabled()
            return cpu_head.apply(states, weight, targets, scale / temperature, outputs, with_grad)

    return Chosen


def tokenised_pair(trainer: Any, row: dict[str, Any], tokenizer: Any, args: Any) -> dict[str, list[int]]:
    """Return token ids by column, as `trainer`, TRL's DPOTrainer or RewardTrainer, prepares a row, without a model."""
    PartialState()  # accelerate's logger, by which TRL warns of a row, asks for it where no trainer has been built
    preparer: Any = object.__new__(trainer)
    preparer._tokenizer = tokenizer
    only = IterableDataset(ExamplesIterable(lambda: iter([(0, dict(row))]), {}))  # Python's objects, as they are
    module: Any = sys.modules[trainer.__module__]
    in_turns = module.global_then_local_main_first
    module.global_then_local_main_first = nullcontext
    try:
        rows = list(trainer._prepare_dataset(preparer, only, tokenizer, args, "first"))
    finally:
        module.global_then_local_main_first = in_turns
    return {name: ids for name, ids in (rows[0] if rows else {}).items() if name.endswith("_ids")}


def reward_ids(
    tokenizer: Any, prompt: Any, answer: Any, tools: Any = None, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a prompt and an answer, as TRL's RewardTrainer makes them of a row."""
    whole = prompt + answer
    if isinstance(whole, list):
        return _tokenize(tokenizer, whole, tools=tools, **(template_kwargs or {}))["input_ids"]
    eos = tokenizer.eos_token or ""
    return _tokenize(tokenizer, whole if answer.endswith(eos) else whole + eos)["input_ids"]
