"""
One run of `measure_memory.py`, in a process of its own: `python measure_memory_worker.py JOB`, a JSON object.

The same run on tiny models goes first, so that everything is imported; what the process then holds is the baseline.
Linux keeps a process's peak (`VmHWM`) and resets it when 5 is written to `clear_refs`.
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure_memory_setup import rows
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from trl_ext import DPOConfigX, DPOTrainerX, PPOConfigX, PPOTrainerX


QUIET = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def in_status(name: str) -> int:
    """Bytes of an entry of /proc/self/status, such as `VmRSS`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Peaks:
    """Peak memory of the process in each phase."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def close(self, phase: str | None) -> None:
        """Counts the peak since the last call to a phase, or to none."""
        if phase is not None:
            self.of[phase] = max(self.of.get(phase, 0), in_status("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")

    def watch(self, trainer: Any, is_ppo: bool) -> None:
        """Puts itself between the phases of a trainer."""
        state = {"phase": "" if is_ppo else "learn"}

        def before(function: Callable, ended: dict[str, str], then: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if state["phase"] in ended:
                    self.close(state["phase"] or None)
                    state["phase"] = then
                result = function(*args, **kwargs)
                if then == "generate":
                    self.close("generate")
                    state["phase"] = "score"
                return result

            return call

        if is_ppo:
            trainer._generate = before(trainer._generate, {"": "", "learn": ""}, "generate")
            trainer._compute_loss = before(trainer._compute_loss, {"score": ""}, "learn")


def build(job: dict[str, Any]) -> Any:
    """The trainer of a job, on models from files."""
    actor, reward = Path(job["models"]) / "actor", Path(job["models"]) / "reward"
    lora = LoraConfig(r=job["rank"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kwargs = {
        "processing_class": AutoTokenizer.from_pretrained(actor),
        "peft_config": lora if job["use_peft"] else None,
        "quantization_config": packed if job["load_in_4bit"] else None,
    }
    if job["trainer"] == "dpo":
        args = DPOConfigX(job["folder"], max_steps=2, **QUIET, **job["options"])
        data = rows(job, 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps)
        return DPOTrainerX(str(actor), args=args, train_dataset=data, **kwargs)
    rollout = job["options"]["per_device_train_batch_size"] * job["options"]["gradient_accumulation_steps"]
    args = PPOConfigX(
        job["folder"],
        total_episodes=2 * rollout * job["processes"],
        num_sample_generations=0,
        **QUIET,
        **job["options"],
    )
    data = rows(job, 2 * rollout * job["processes"])
    return PPOTrainerX(args, model=str(actor), reward_model=str(reward), train_dataset=data, **kwargs)


def run(job: dict[str, Any]) -> Peaks:
    trainer, peaks = build(job), Peaks()
    # One tensor that lies in a checkpoint's file keeps all of the file mapped, also what was packed from it.
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.clone()
    peaks.watch(trainer, job["trainer"] == "ppo")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peaks.close(None)
    trainer.train()
    peaks.close("learn")
    return peaks


def main(job: dict[str, Any]) -> None:
    run(job | job["tiny"])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    baseline = in_status("VmRSS")
    peaks = run(job)
    phases = {phase: peak - baseline for phase, peak in peaks.of.items()}
    if os.environ.get("RANK", "0") == "0":
        Path(job["result"]).write_text(json.dumps({"phases": phases, "baseline": baseline}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
