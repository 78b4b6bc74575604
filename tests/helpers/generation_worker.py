"""What a rollout gathers under ZeRO-3 and FSDP2 while it generates, counted at the collectives of two processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.comm.torch import TorchBackend
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import zero_runs
from accelerate_files import ACCELERATE, launch
from trl_ext import PPOTrainerX


GATHERS = ("all_gather", "all_gather_into_tensor")


class Counts:
    """
    What DeepSpeed, FSDP2 and torch.distributed are asked for: gathers, of FSDP2 one for all weights that it shards
    together, elements given to DeepSpeed's, and reductions.
    """

    def __init__(self) -> None:
        self.gathers = self.elements = self.reductions = 0

    def counting(self, gather: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.gathers += 1
            self.elements += (args[2] if len(args) > 2 else kwargs.get("input_tensor", kwargs.get("tensor"))).numel()
            return gather(*args, **kwargs)

        return counted

    def counting_units(self, gather: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.gathers += 1
            return gather(*args, **kwargs)

        return counted

    def counting_reductions(self, all_reduce: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            return all_reduce(*args, **kwargs)

        return counted


@contextmanager
def counted() -> Iterator[Counts]:
    counts = Counts()
    with ExitStack() as stack:
        for name in GATHERS:
            counting = counts.counting(getattr(TorchBackend, name))
            stack.enter_context(mock.patch.object(TorchBackend, name, counting))
        units = counts.counting_units(_fsdp_param_group.foreach_all_gather)
        stack.enter_context(mock.patch.object(_fsdp_param_group, "foreach_all_gather", units))
        reductions = counts.counting_reductions(torch.distributed.all_reduce)
        stack.enter_context(mock.patch("torch.distributed.all_reduce", reductions))
        yield counts


def run(folder: Path, by_fsdp: bool = False, **options: Any) -> dict[str, Any]:
    """Two rollouts; for each, the gathers, elements and reductions of its generation, and its longest response."""
    rollouts, generate = [], PPOTrainerX._generate

    def watched(self: PPOTrainerX, prompts: list[Any]) -> tuple:
        with counted() as counts:
            output = generate(self, prompts)
        longest = max(map(len, output[1]))
        rollouts.append([counts.gathers, counts.elements, counts.reductions, longest])
        return output

    options = {"max_steps": 2, "num_ppo_epochs": 1, "response_length": 12} | options
    if by_fsdp:
        environment = launch(ACCELERATE / "fsdp2.yaml", "--num_processes", "2").environment
    else:
        environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
        options["deepspeed"] = "configs/deepspeed/zero3.json"
    with zero_runs.launched(environment), mock.patch.object(PPOTrainerX, "_generate", watched):
        trainer = zero_runs.ppo(folder, folder / "output", {}, **options)
        trainer.train()
    return {"rollouts": rollouts, "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def as_trl() -> Any:
    """GRPO's own way: it gathers whatever the engine holds."""
    return mock.patch.object(PPOTrainerX, "_weights_for_generation", return_value=nullcontext())


def turns_of_rank() -> Any:
    """As with tools: one process generates once, the other three times."""
    single_turn = PPOTrainerX._generate_single_turn

    def several(self: PPOTrainerX, *args: Any, **kwargs: Any) -> tuple:
        for _ in range(3 if self.accelerator.process_index else 1):
            output = single_turn(self, *args, **kwargs)
        return output

    return mock.patch.object(PPOTrainerX, "_generate_single_turn", several)


def measure(folder: Path) -> dict[str, Any]:
    measured = {f"once, {critic}": run(folder, critic=critic) for critic in ("model", "head")}
    with as_trl():
        measured["as TRL"] = run(folder)
    measured["per token"] = run(folder, ds3_gather_for_generation=False)
    with turns_of_rank():
        measured["turns"] = run(folder)
        measured["FSDP2, turns"] = run(folder, by_fsdp=True)
    measured["FSDP2, once"] = run(folder, by_fsdp=True)
    with as_trl():
        measured["FSDP2, as TRL"] = run(folder, by_fsdp=True)
    return measured
