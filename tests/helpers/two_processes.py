"""
Two processes on this machine, without a GPU: how the tests of DDP and DeepSpeed start them.

Imported, `run` starts a script under torchrun. Run as a script, this file runs another one in which accelerate counts
processes on CPUs under DeepSpeed too; as it is, it would count one where DeepSpeed counts two:

    torchrun --standalone --nproc_per_node 2 tests/helpers/two_processes.py SCRIPT [ARGUMENT ...]
"""

import os
import runpy
import subprocess
import sys
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


def measured(
    script: Path, path: Path, *arguments: Any, deepspeed: bool = False, timeout: float = 300
) -> dict[str, Any]:
    """What two processes of `script path arguments` have written to `path`; one launch, as it imports everything."""
    run(*([ON_CPU] if deepspeed else []), script, path, *arguments, timeout=timeout)
    written = torch.load(path, weights_only=True)
    assert written.pop("processes") == 2
    return written


def write(written: dict[str, Any], path: str | Path) -> None:
    """In a script that `measured` has started: the first process writes what was measured, and all part."""
    if torch.distributed.get_rank() == 0:
        torch.save(written | {"processes": torch.distributed.get_world_size()}, path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def count_processes_on_cpu() -> None:
    """Lets accelerate see the processes that torchrun has started, under DeepSpeed too, and allows bfloat16 there."""
    import deepspeed.comm.torch
    import transformers.training_args
    from accelerate.state import DistributedType, PartialState

    if "LOCAL_RANK" in os.environ:
        # DeepSpeed would first compile, for a minute or two, collectives through shared memory; gloo has its own.
        deepspeed.comm.torch.build_shm_op = lambda: None
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count_processes_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
