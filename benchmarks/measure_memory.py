"""
The planner against the memory of real runs, on a CPU.

    python benchmarks/measure_memory.py                              # all runs, about 10 minutes on 2 cores
    python benchmarks/measure_memory.py --runs ppo-model dpo-lora    # two of them

Every run trains for two rollouts or steps in a process of its own; measured is the process's peak beside what it held
before the models were loaded. Planned is what `trl_ext.planner` says of the same options.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure_memory_setup import RUNS, TINY, save_models

from trl_ext.planner import CPU, ModelNames, Plan, layout_from_options, plan


ROOT = Path(__file__).resolve().parents[1]
# Under it accelerate shards on CPUs too, where it would run DDP.
ON_CPU = ROOT / "tests" / "helpers" / "two_processes.py"
WORKER = Path(__file__).with_name("measure_memory_worker.py")
GB = 1e9
# glibc is to give every freed tensor back at once.
PROMPT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def planned(run: dict[str, Any], folder: Path) -> Plan:
    """The plan of a run, from its options."""
    options = run["options"] | {
        "use_peft": run["use_peft"],
        "load_in_4bit": run["load_in_4bit"],
        "lora_r": run["rank"],
    }
    options |= {"lora_target_modules": ["all-linear"], "bf16": False, "model_name_or_path": str(folder / "actor")}
    machine = replace(CPU, gpus=run["processes"])
    layout = layout_from_options(run["trainer"], options, machine, prompt=run["prompt"])
    trained = "reward" if run["trainer"] == "reward" else "actor"
    return plan(ModelNames(str(folder / trained), reward=str(folder / "reward")), layout, machine)


def measured(run: dict[str, Any], folder: Path, as_it_is: bool = False) -> dict[str, int]:
    """
    Peak bytes by phase. The allocator is told to give every freed tensor back at once, so that the peak is what
    tensors hold; with `as_it_is` it is left alone.
    """
    run = run | {"models": str(folder), "folder": str(folder / "out"), "result": str(folder / "result.json")}
    run["vocabulary"] = run["config"]["vocab_size"]
    small = {"models": str(folder.parent / "warm-up"), "vocabulary": TINY["vocab_size"], "prompt": 8, "response": 4}
    run["tiny"] = small
    environment = os.environ | ({} if as_it_is else PROMPT_ALLOCATOR) | {"PYTHONWARNINGS": "ignore"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run["processes"])]
    launcher += [str(ON_CPU)] if "fsdp" in run["options"] else []
    command = [sys.executable, *(launcher if run["processes"] > 1 else []), str(WORKER), json.dumps(run)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads(Path(run["result"]).read_text())["phases"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=[name for name in RUNS if name != "tiny"])
    parser.add_argument("--allocator_as_it_is", action="store_true", help="Show what it holds beside tensors.")
    given = parser.parse_args(argv)
    print("| run | planned GB | measured GB | off | generate | score | learn |\n|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        save_models(TINY, Path(place) / "warm-up")
        for name in given.runs:
            folder = Path(place) / name
            save_models(RUNS[name]["config"], folder)
            expected, found = planned(RUNS[name], folder), measured(RUNS[name], folder, given.allocator_as_it_is)
            peak = max(found.values())
            cells = [f"{expected.peak.total / GB:.2f}", f"{peak / GB:.2f}", f"{expected.peak.total / peak - 1:+.1%}"]
            of = {phase.name: phase.total for phase in expected.phases}
            cells += [
                f"{of[p] / GB:.2f} / {found[p] / GB:.2f}" if p in found else "" for p in ("generate", "score", "learn")
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
