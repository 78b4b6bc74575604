"""
Two processes on this machine, without a GPU: how the tests of DDP, DeepSpeed and FSDP2 start them.

Run as a script under torchrun, this file calls a function of a helper, or runs another script, where accelerate counts
processes on CPUs under DeepSpeed too, and shards by FSDP2; as it is, it would count one where DeepSpeed counts two,
and run DDP in place of FSDP2.
"""

import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[2]
ON_CPU = Path(__file__).resolve()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, for a process on the CPU that finds the package and the tests."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    cpu = {"PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    tools = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}  # ninja, for DeepSpeed
    return os.environ | cpu | tools | {"TRL_EXPERIMENTAL_SILENCE": "1"} | settings


def run(
    *arguments: Any, launch: tuple[str, ...] = TORCHRUN, timeout: float = 300, **settings: str
) -> subprocess.CompletedProcess[str]:
    """What became of the command `launch arguments` in the root of the checkout; a failure fails the test."""
    command = [*launch, *map(str, arguments)]
    result = subprocess.run(
        command, env=environment(**settings), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result


def measured(function: Callable[..., dict[str, Any]], folder: Path, *arguments: Any, timeout: float = 300) -> Any:
    """What `function(folder, *arguments)` of a helper returns in the first of two processes; arguments go by JSON."""
    (folder / "arguments.json").write_text(json.dumps(arguments))
    run(ON_CPU, f"{function.__module__}:{function.__name__}", folder, timeout=timeout)
    return read(folder)


def read(folder: Path) -> Any:
    """What two processes have measured there."""
    processes, result = torch.load(folder / "measured.pt", weights_only=True)
    assert processes == 2
    return result


def measure(target: str, folder: Path) -> None:
    """In each of two processes: calls "module:function", and the first writes what came of it."""
    function = pkgutil.resolve_name(target)
    result = function(folder, *json.loads((folder / "arguments.json").read_text()))
    if torch.distributed.get_rank() == 0:
        torch.save((torch.distributed.get_world_size(), result), folder / "measured.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def count_processes_on_cpu() -> None:
    """Lets accelerate see the processes that torchrun has started, under DeepSpeed too, and allows bfloat16 there."""
    import transformers.training_args
    from accelerate.state import DistributedType, PartialState

    if "LOCAL_RANK" in os.environ:
        # DeepSpeed would first compile, for a minute or two, collectives through shared memory; gloo has its own.
        # `deepspeed.comm.torch`, written so, would be PyTorch, which `deepspeed.comm` holds under that name.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
        shard_on_cpu()


def shard_on_cpu() -> None:
    """Lets accelerate take FSDP on CPUs as it takes it on GPUs, where it would silently run DDP."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = started


if __name__ == "__main__":
    torch.set_num_threads(1)
    count_processes_on_cpu()
    if ":" in sys.argv[1]:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
