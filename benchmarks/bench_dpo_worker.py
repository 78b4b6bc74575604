"""One run of `bench_dpo.py`, in a process of its own: `python bench_dpo_worker.py JOB`, a JSON object."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_dpo_setup import SHAPES, pairs, random_model, tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_ext import DPOConfigX, DPOTrainerX


TRAINERS: dict[str, Any] = {"trl": (DPOTrainer, DPOConfig), "trl_ext": (DPOTrainerX, DPOConfigX)}


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, from the end of the one before it, and those that all threads computed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.computed = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, computed = time.perf_counter(), time.process_time()
        self.seconds.append(now - self.start)
        self.cpu.append(computed - self.computed)
        self.start, self.computed = now, computed


def main(job: dict[str, Any]) -> None:
    """Trains for the job's steps; writes their seconds and the peak memory to the file that the job names."""
    shape, clock = SHAPES[job["shape"]], StepClock()
    trainer_class, config_class = TRAINERS[job["trainer"]]
    on_cpu = job["device"] == "cpu"
    args = config_class(
        job["folder"],
        per_device_train_batch_size=shape["pairs"],
        max_steps=job["steps"],
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=job["steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dtype = getattr(torch, job["dtype"])
    trainer = trainer_class(
        random_model(shape, dtype),
        random_model(shape, dtype),
        args,
        train_dataset=pairs(shape, job["steps"]),
        processing_class=tokenizer(shape),
        callbacks=[clock],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    if job["trainer"] == "trl_ext":  # which resets that counter between the phases
        peak = max(peak, trainer.phases.highest)
    Path(job["result"]).write_text(json.dumps({"seconds": clock.seconds, "peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
