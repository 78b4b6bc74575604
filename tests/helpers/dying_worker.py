"""
A PPO run of the models in FOLDER in which the second of two processes ends in the second rollout:

    torchrun --standalone --nproc_per_node 2 two_processes.py dying_worker.py error|killed FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import zero_runs


@record
def main(end: str, path: str) -> None:
    folder = Path(path)
    calls = []

    def reward(completions: list[str], **kwargs: object) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2 and torch.distributed.get_rank() == 1:
            (folder / "died").write_text(str(time.time()))
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the reward of rank 1 has failed")
        return [float(len(completion)) for completion in completions]

    options = {"deepspeed": "configs/deepspeed/zero3.json", "max_steps": 100}
    with zero_runs.launched({"ACCELERATE_USE_DEEPSPEED": "true"}):
        models = {"reward_model": None, "reward_funcs": reward, "value_model": str(folder / "critic")}
        zero_runs.ppo(folder, folder / "output", models, **options).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
