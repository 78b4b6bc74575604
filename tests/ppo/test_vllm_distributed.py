"""What reaches vLLM from two processes, under DDP and under real ZeRO-3: the actor, whole, and not the critic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny


ROOT = Path(__file__).resolve().parent.parent.parent


def two_processes(folder, engine):
    """What `vllm_layouts.py` measures."""
    tiny.save_tiny(folder)
    path = folder / "measured.pt"
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja, for DeepSpeed
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(ROOT / "tests" / "ppo" / "vllm_layouts.py"), str(path), str(folder), engine],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    measured = torch.load(path, weights_only=True)
    assert measured.pop("processes") == 2
    return measured


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.proof)])
def test_actor_is_sent_whole_and_the_critic_is_neither_sent_nor_gathered(tmp_path, engine):
    """The engine's log-probabilities are the trainer's in each of three rollouts, colocated and as a server."""
    measured = two_processes(tmp_path, engine)
    more = {"colocate/lora", "server/full"} if engine == "zero3" else set()
    assert measured.keys() == {"colocate/full", "server/lora"} | more
    for case, result in measured.items():
        assert len(result["differences"]) == 3, case
        assert max(result["differences"]) < 1e-4, case
        # A colocated engine on each process; one server, which the first process talks to.
        assert result["loads"] == ([3, 3] if case.startswith("colocate") else [3, 0]), case
        assert result["partitioned"] == (engine == "zero3"), case
        assert result["gathered"] > 0, case
        assert not result["critic was gathered"], case
