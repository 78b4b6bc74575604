"""
Runs that save and go on from their newest complete checkpoint, in forked processes that may be killed at any moment.
Each line of the standard input begins one: its name in `TABLE` or `OF_TWO`, its folder, and that of the saved models.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import resume_worker
import reward_runs
import tiny
import two_processes
from accelerate_files import ACCELERATE, launch
from trl_ext.runs.checkpoints import numbered


STEPS = 8  # two rollouts of PPO
WAITS = 30  # seconds for a process that was killed before the two were connected; later its end is noticed at once
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS, "optim": "adamw_torch"}
# Every pair of critic, controller, what is trained, and where PPO saves: in rollouts, or between them. A critic that
# is an adapter needs an actor that is one.
TABLE = [
    "ppo-model-fixed-whole-within",
    "ppo-model-proportional-lora-between",
    "ppo-model-band-whole-between",
    "ppo-head-fixed-lora-between",
    "ppo-head-proportional-whole-within",
    "ppo-head-band-lora-within",
    "ppo-adapter-fixed-lora-within",
    "ppo-adapter-proportional-lora-between",
    "ppo-adapter-band-lora-between",
    "dpo-whole",
    "dpo-lora",
    "reward-whole",
]
CONTROLLERS = {
    "fixed": {},
    "proportional": {"kl_target": 1e-4, "kl_horizon": 10},
    "band": {"kl_band": [1e-6, 1e-5]},
}
PLACES = {"within": {}, "between": {"save_steps": 4}}


def _zero(stage: int) -> dict[str, Any]:
    options = {"deepspeed": f"configs/deepspeed/zero{stage}.json"}
    return {"environment": {"ACCELERATE_USE_DEEPSPEED": "true"}, "options": options}


# Layouts of two processes: what a launcher sets, and options of PPO.
OF_TWO: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": lambda: {"environment": {}, "options": {}},
    "zero2": lambda: _zero(2),
    "zero3": lambda: _zero(3),
    "fsdp2": lambda: {
        "environment": launch(ACCELERATE / "fsdp2.yaml", "--num_processes", "2").environment,
        "options": {},
    },
}


def trainer_of(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    kind, *words = name.split("-")
    adapter = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if "lora" in words else {}
    if kind == "dpo":
        models = adapter | {"ref_model": None} if adapter else {}
        return dpo_runs.dpo_trainer(folder, models, use_cpu=True, **SAVES)
    if kind == "reward":
        return reward_runs.reward_trainer(folder, dpo_runs.tiny_pairs(8), None, **(SAVES | {"learning_rate": 1e-2}))
    critic, controller, _, place = words
    options = SAVES | {"num_mini_batches": 2, "normalize_rewards": True, "critic": critic, "kl_controller": controller}
    models = {"train_dataset": tiny.tiny_prompts(8)} | adapter
    options |= CONTROLLERS[controller] | PLACES[place]
    return ppo_runs.ppo_trainer(folder, models, use_cpu=True, **options)


class SaysWhere(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"\nafter {state.global_step}", flush=True)


def run(name: str, folder: Path, models: Path, rank: int, port: int) -> None:
    if name in OF_TWO:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        layout = OF_TWO[name]()
        os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | layout["environment"]
        two_processes.count_processes_on_cpu()
        options = SAVES | {"ddp_timeout": WAITS} | layout["options"]
        trainer = resume_worker.trainer_of(models, folder, layout | {"options": options})
    else:
        trainer = trainer_of(name, folder)
    if rank == 0:
        trainer.add_callback(SaysWhere())
    trainer.train(resume_from_checkpoint=bool(folder.is_dir() and numbered(folder)))


def fork(name: str, folder: Path, models: Path) -> list[int]:
    """The numbers of the run's processes, which import nothing anew; an error ends one as it ends a program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2 if name in OF_TWO else 1):
        child = os.fork()
        if not child:
            run(name, folder, models, rank, port)
            os._exit(0)
        processes.append(child)
    return processes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, folder, models = line.split()
        processes = fork(name, Path(folder), Path(models))
        print("\nbegun", *processes, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print("\nended", *codes, flush=True)
