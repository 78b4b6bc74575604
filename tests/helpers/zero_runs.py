"""Short runs of PPO, DPO and reward models in two processes, from saved models: under ZeRO-3 each loads its share."""

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import load_from_disk
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import dpo_runs
import ppo_runs
import reward_runs
import tiny


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROLES = ("actor", "reward_model", "reference", "critic")


def save(folder: Path) -> None:
    """The models that the runs load, in folders named after their roles, and the pairs of DPO."""
    models = (tiny.tiny_actor(), tiny.tiny_reward_model(), tiny.tiny_actor(5), tiny.tiny_reward_model(7))
    for role, model in zip(ROLES, models, strict=True):
        model.save_pretrained(folder / role)
        tiny.tiny_tokenizer().save_pretrained(folder / role)
    tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained(folder / "wide")
    tiny.tiny_tokenizer().save_pretrained(folder / "wide")
    dpo_runs.tiny_pairs(16, 0).save_to_disk(str(folder / "pairs"))


@contextmanager
def launched(environment: dict[str, str]) -> Iterator[None]:
    """Within the context, this process is as a launcher would have started it with `environment`."""
    with mock.patch.dict(os.environ, environment):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()


def ppo(folder: Path, output: Path, models: dict[str, Any], **options: Any) -> Any:
    """A PPO trainer, untrained, of the actor and reward model in `folder`."""
    arguments = {
        "processing_class": None,
        "model": str(folder / "actor"),
        "reward_model": str(folder / "reward_model"),
    }
    defaults = {"num_sample_generations": 0}
    return ppo_runs.ppo_trainer(output, arguments | models, **(defaults | options))


def dpo(folder: Path, output: Path, models: dict[str, Any], **options: Any) -> Any:
    """A DPO trainer, untrained, of the actor in `folder`, which is also the reference."""
    # Pairs from files: TRL hands precomputed references from process to process in the cache beside them.
    pairs = load_from_disk(str(folder / "pairs"))
    arguments = {"model": str(folder / "actor"), "ref_model": None, "train_dataset": pairs}
    defaults = {"use_cpu": False, "optim": "adamw_torch", "learning_rate": 1e-3}
    return dpo_runs.dpo_trainer(output, arguments | models, **(defaults | options))


def only_stage(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration that names a stage, and leaves weights in float32."""
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": stage}, **dict.fromkeys(sizes, "auto")}


def reward(folder: Path, output: Path, models: dict[str, Any], **options: Any) -> Any:
    """A trainer of the reward model in `folder`, untrained."""
    pairs, tokenizer = load_from_disk(str(folder / "pairs")), tiny.tiny_tokenizer()
    defaults = {"use_cpu": False, "optim": "adamw_torch", "learning_rate": 1e-3, "logging_steps": 1}
    model = str(folder / "reward_model")
    return reward_runs.reward_trainer(output, pairs, None, model, tokenizer, models, **(defaults | options))


BUILD = {"ppo": ppo, "dpo": dpo, "reward": reward}


class KeepStart(TrainerCallback):
    """The full weights when training starts."""

    weights: dict[str, torch.Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.weights = full_weights(model)


class KeepHeld(TrainerCallback):
    """
    The bytes that this process holds of what learns under FSDP2, at each optimizer step and after each micro-batch
    before it, by what they are, and of the optimizer. "other" are all tensors beside these and the frozen models.
    """

    def __init__(self, start: KeepStart):
        self.start = start  # whose copies are not the run's
        gc.collect()
        self.before = [each for each in gc.get_objects() if type(each) in TENSORS]  # results of other runs
        self.moments: dict[str, dict[str, int]] = {}
        self.frozen: list[nn.Module] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments["step"] = self.held(kwargs["model"], kwargs["optimizer"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments["between"] = self.held(kwargs["model"], kwargs["optimizer"])

    def held(self, model: nn.Module, optimizer: Any = None) -> dict[str, int]:
        parts: dict[str, list[Any]] = {name: [] for name in ("weights", "gradients", "gathered", "optimizer")}
        for each in sharded(model):
            parts["weights"].append(each.sharded_param)
            parts["gradients"] += [each.sharded_param.grad, each.unsharded_accumulated_grad]
            if hasattr(each, "_unsharded_param"):
                parts["gradients"].append(each._unsharded_param.grad)
            parts["gathered"] += each.all_gather_outputs
        states = () if optimizer is None else optimizer.state.values()
        parts["optimizer"] = [tensor for state in states for tensor in state.values() if tensor.dim()]  # not its step
        known: set[int] = set()
        held = {name: self._bytes(tensors, known) for name, tensors in parts.items()}
        self._bytes([*self.start.weights.values(), *self.before], known)
        for each in (each for model in self.frozen for each in sharded(model)):
            self._bytes([each.sharded_param, *each.all_gather_outputs], known)
        gc.collect()
        return held | {"other": self._bytes([each for each in gc.get_objects() if type(each) in TENSORS], known)}

    def _bytes(self, tensors: Iterable[Any], known: set[int]) -> int:
        """The bytes of storages that are not `known`; they are from then on."""
        total = 0
        for tensor in tensors:
            if torch.is_tensor(tensor):
                storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    total += storage.nbytes()
        return total


TENSORS = (torch.Tensor, nn.Parameter)


def sharded(model: nn.Module) -> list[Any]:
    """FSDP2's parameters of a model."""
    groups = {id(m): m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)}
    return [each for group in groups.values() if group is not None for each in group.fsdp_params]


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name, whole: what is shared out is gathered, which all processes do together."""
    weights = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            weights[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
    return weights


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        yield


def local_and_whole(model: nn.Module) -> list[int]:
    """Elements of the parameters: those that this process keeps, and all."""
    local = whole = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):  # which keeps head and norm gathered after a pass
            module.reshard()
    for parameter in model.parameters():
        partitioned = hasattr(parameter, "ds_tensor")
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local += parameter.ds_tensor.numel() if partitioned else own.numel()
        whole += parameter.ds_numel if partitioned else parameter.numel()
    return [local, whole]


def optimizer_elements(engine: Any) -> int:
    """Elements of the fp32 weights that this process's share of the optimizer updates."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return sum(part.numel() for part in optimizer.fp32_partitioned_groups_flat)
    return sum(part.numel() for part in optimizer.single_partition_of_fp32_groups)


def optimizer_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This process's fp32 weights and the optimizer's states of them, each with the role of its parameter group."""
    zero, base = engine.optimizer, engine.optimizer.optimizer
    if engine.zero_optimization_stage() == 3:
        parts = zero.fp32_partitioned_groups_flat
        groups = [base.param_groups[zero.sub_group_to_group_id[i]] for i in range(len(parts))]
    else:
        parts, groups = zero.single_partition_of_fp32_groups, base.param_groups
    for part, group in zip(parts, groups, strict=True):
        yield group["role"], part
        for state in base.state.get(part, {}).values():
            if torch.is_tensor(state):
                yield group["role"], state
