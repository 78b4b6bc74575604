"""
PPO on one GPU, measured beside the plan: a 33B model in NF4 with all four roles on one base, an 8B model within 24 GB,
and 0.5B, 1.5B and 7B models. Random weights, built layer by layer; nothing is downloaded.

    python benchmarks/measure_gpu.py                                    # every run, on the first GPU
    python benchmarks/measure_gpu.py --shapes 8b-24gb 0.5b              # two of them
    python benchmarks/measure_gpu.py --shapes tiny tiny-full --device cpu   # the same code on a small CPU

Every run takes two rollouts in a process of its own and prints a row: GiB planned, at most allocated, and reserved;
tokens per second planned, and of the second rollout.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure_gpu_models import config_of, random_model, save_reward_adapter, tokenizer
from measure_memory_worker import in_status
from peft import LoraConfig

from trl_ext import PPOConfigX, PPOTrainerX, planner
from trl_ext.planner import CPU, GIB


LORA = {"r": 16, "target_modules": "all-linear"}


def run(model: str, method: str, critic: str, limit: float | None = None, **options: Any) -> dict[str, Any]:
    """A run: `limit` is the GPU's memory in GiB that it may use."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "response_length": 128}
    sizes |= {"num_ppo_epochs": 1, "gradient_checkpointing": True} | options
    return {"model": model, "method": method, "critic": critic, "limit": limit, "prompt": 128, "options": sizes}


SHAPES = {
    "33b-four-roles": run("33b", "qlora", "adapter"),
    "8b-24gb": run("8b", "qlora", "adapter", limit=24),
    "0.5b": run("0.5b", "full", "model", per_device_train_batch_size=4, gradient_accumulation_steps=4),
    "1.5b": run("1.5b", "full", "head", per_device_train_batch_size=2),
    "7b-lora": run("7b", "lora", "head"),
    "tiny": run("tiny", "qlora", "adapter", gradient_accumulation_steps=2, response_length=8),
    "tiny-full": run("tiny", "full", "model", gradient_accumulation_steps=2, response_length=8),
}


def build(job: dict[str, Any], device: str, place: Path) -> tuple[PPOTrainerX, planner.Plan]:
    """The trainer of a run, and its plan from the same options."""
    config, method, on_cpu = config_of(job["model"]), job["method"], device == "cpu"
    config.save_pretrained(place / "config")
    dtype = torch.float32 if on_cpu or method == "full" else torch.bfloat16
    actor = random_model(config, dtype, device, packed=method == "qlora")
    options = {"use_peft": method != "full", "load_in_4bit": method == "qlora", "lora_r": LORA["r"]}
    options |= {"lora_target_modules": ["all-linear"], "critic": job["critic"]} | job["options"]
    names = planner.ModelNames(str(place / "config"))
    if job["critic"] == "adapter":
        save_reward_adapter(config, LORA, place / "reward")
        reward: Any = str(place / "reward")
        options["reward_model_path"] = reward
    else:
        reward = random_model(config, dtype, device, packed=False, scored=True)
    machine = CPU if on_cpu else planner.this_machine()
    planned = planner.plan(names, planner.layout_from_options("ppo", options, machine, job["prompt"]), machine)
    rollout = planned.layout.rollout
    args = PPOConfigX(
        str(place / "out"), critic=job["critic"], total_episodes=2 * rollout, stop_token_id=config.vocab_size,
        use_cpu=on_cpu, bf16=not on_cpu, num_sample_generations=0, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, **job["options"],
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": torch.randint(1, config.vocab_size, (2 * rollout, job["prompt"])).tolist()})
    lora = None if method == "full" else LoraConfig(task_type="CAUSAL_LM", **LORA)
    models = {"model": actor, "reward_model": reward, "peft_config": lora}
    return PPOTrainerX(args, tokenizer(config.vocab_size), train_dataset=data, **models), planned


def work(job: dict[str, Any], device: str, place: Path) -> None:
    """One run, in its own process; writes its row."""
    before = in_status("VmRSS") if device == "cpu" else 0
    if job["limit"] and device != "cpu":
        # The context takes its part of the card beside what PyTorch allocates.
        allocated = job["limit"] * GIB - planner.Hardware.context
        torch.cuda.set_per_process_memory_fraction(min(1.0, allocated / torch.cuda.mem_get_info()[1]))
    trainer, planned = build(job, device, place)
    trainer.train()
    speeds = [line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line]
    # The trainer resets the counter of what is allocated between its phases.
    allocated = max(value for line in trainer.state.log_history for key, value in line.items() if "memory/" in key)
    peaks = [allocated * GIB - before] * 2 if device == "cpu" else [allocated * GIB, torch.cuda.memory_reserved()]
    rates = [f"{rate:,.0f}" for rate in (planner.speed(planned).tokens_per_second, speeds[-1])]
    (place / "row").write_text(" | ".join([*(f"{size / GIB:.2f}" for size in (planned.peak.total, *peaks)), *rates]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[n for n in SHAPES if "tiny" not in n])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)  # a run and its folder, in a process of its own
    given = parser.parse_args(argv)
    if given.job:
        return work(SHAPES[given.job[0]], given.device, Path(given.job[1]))
    print("| run | planned | allocated | reserved | planned tokens/s | tokens/s |\n|---|---:|---:|---:|---:|---:|")
    for name in given.shapes:
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, __file__, "--device", given.device, "--job", name, place]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            row = (Path(place) / "row").read_text() if done.returncode == 0 else f"failed: {done.stderr[-300:]!r}"
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
