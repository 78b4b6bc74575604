"""
One run of `measure_memory.py`, in a process of its own: `python measure_memory_worker.py JOB`, a JSON object.

The same run on tiny models goes first, so that everything is imported; what the process then holds is the baseline.
The peaks of the phases are those that the trainer logs.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from measure_memory_setup import rows
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from trl_ext import DPOConfigX, DPOTrainerX, PPOConfigX, PPOTrainerX, RewardConfigX, RewardTrainerX
from trl_ext.planner import GIB
from trl_ext.runs.profiler import take_peak


PHASES = ("generate", "score", "learn")  # those that are planned
QUIET = {
    "use_cpu": True,
    "logging_steps": 1,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def in_status(name: str) -> int:
    """Bytes of an entry of /proc/self/status, such as `VmRSS`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


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
    if job["trainer"] == "reward":
        args = RewardConfigX(job["folder"], max_steps=2, **QUIET, **job["options"])
        data = rows(job, 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps)
        lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]
        del kwargs["quantization_config"]
        return RewardTrainerX(str(reward), args, train_dataset=data, **kwargs)
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


def run(job: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of the process in each phase, the largest of all processes."""
    trainer = build(job)
    # One tensor that lies in a checkpoint's file keeps all of the file mapped, also what was packed from it.
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.clone()
    collect()
    take_peak(trainer.args.device)
    trainer.train()
    peaks: dict[str, int] = {}
    if job["trainer"] == "reward":  # it logs no peaks
        return {"learn": take_peak(trainer.args.device) or 0}
    for line in trainer.state.log_history:
        for phase in PHASES:
            peak = round(line.get(f"memory/{phase}", 0) * GIB)
            if peak:
                peaks[phase] = max(peak, peaks.get(phase, 0))
    return peaks


def collect() -> None:
    """Gives the system back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(job: dict[str, Any]) -> None:
    run(job | job["tiny"])
    collect()
    baseline = in_status("VmRSS")
    phases = {phase: peak - baseline for phase, peak in run(job).items()}
    if os.environ.get("RANK", "0") == "0":
        Path(job["result"]).write_text(json.dumps({"phases": phases, "baseline": baseline}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
