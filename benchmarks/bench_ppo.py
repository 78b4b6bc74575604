"""
Times `PPOTrainerX` against TRL's last `PPOTrainer`, that of TRL 1.12, and torchtune's PPO recipe, on the same shapes
of models, prompts and answers, on a CPU or a GPU.

    python benchmarks/bench_ppo.py --output bench.json              # shapes deep and wide: about 40 minutes on 2 cores
    python benchmarks/bench_ppo.py --shapes varied-answers varied wide-varied-answers --runs 1
    python benchmarks/bench_ppo.py --shapes groups groups-varied --runs 1   # 8 answers to each prompt
    python benchmarks/bench_ppo.py --shapes tiny tiny-varied --runs 1       # only that everything runs
    python benchmarks/bench_ppo.py --device cuda --shapes 0.5b 1.5b --runs 1 --minutes 5
    python benchmarks/bench_ppo.py --device cuda --shapes 7b-lora --runs 1 --minutes 5

TRL 1.12 and torchtune 0.6.1 get an environment each at first use, in which all else is as in constraints.txt. The
models are random, made from a config. The trainers take turns, every run in a fresh process whose first update is left
out. Printed are medians over the runs' updates: seconds by phase and in total, seconds that all threads computed
(`cpu`), the `floor`, peak memory of the process, and how the first trainer of the table compares. The floor is how
long the machine would take for the products of matrices with the tokens that count, at the rate that it reaches in one
large product. On a busy machine `--threads 1` and `cpu` say more than `total`.

Where lengths vary, answers are listed, random tokens of a tail of lengths with mean 0.4 of the limit, and every
trainer learns from the same ones. `PPOTrainerX` is given them token by token while it samples; the others sample up to
the limit in any case, and then get them in place of their own.
docs/measurements.md says what was measured, and what is the same for both.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_ppo_setup import BASELINE, BUDGET, SHAPES, TORCHTUNE, matrix_rate, python_of, update_flops

from trl_ext.data.demo import cache_dir


CHANGES = {"": "", "-padded": ", `packing=False`", "-unshared": ", prompts not shared"}
CHANGES |= {"-budget": f", `micro_batch_tokens={BUDGET}`", "-scored": f", `score_batch_tokens={BUDGET}`"}
CHANGES["-pieces"] = ", without FlexAttention"
CHANGES["-unsampled"] = ", answers that have ended stay in the batch while it samples"
CHANGES["-flash"] = ", `packing=False`, flash-attention"
LABELS = {f"{c}{name}": f'`critic="{c}"`{said}' for c in ("model", "head") for name, said in CHANGES.items()}
LABELS |= {BASELINE: "TRL 1.12 `PPOTrainer`", TORCHTUNE: "torchtune 0.6.1's PPO recipe"}
SECONDS = ("generate", "score", "learn", "total", "cpu")
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

# "updates": seconds of each, by phase, in total, and of all threads; "peak_gb", and "learn_gb" of learning alone;
# "load": the machine's.
Run = dict[str, Any]


def measure(python: str, job: dict[str, Any], folder: Path, environment: dict[str, str] | None = None) -> Run:
    """One run of a trainer, in a process of its own; `environment` adds to this one's."""
    result, load = folder / "result.json", os.getloadavg()[0]
    job = job | {"output_dir": str(folder / "output"), "result": str(result)}
    command = [python, str(Path(__file__).with_name("bench_ppo_worker.py")), json.dumps(job)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=os.environ | QUIET | (environment or {}), **pipes)
    if done.returncode:
        raise RuntimeError(f"The run of {job['trainer']} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads(result.read_text()) | {"load": load}


def summarise(runs: list[Run]) -> dict[str, float]:
    """Medians over the updates of all runs, without each run's first; the highest peak."""
    updates = [update for run in runs for update in run["updates"][1:]]
    medians = {phase: statistics.median(update[phase] for update in updates) for phase in SECONDS}
    return medians | {"peak_gb": max(run["peak_gb"] for run in runs)}


def table(runs: dict[str, list[Run]], floors: dict[str, float]) -> str:
    """
    Return a table in Markdown, a row per trainer. `speed` is the first row's total over the row's: above 1 is faster;
    in brackets the same of `cpu`. `score + learn` is that without generation, `memory` the row's peak over the first
    row's: below 1 is less.

    Args:
        floors: seconds that the tokens that count take at the machine's rate, by trainer.
    """
    summaries = {trainer: summarise(of_trainer) for trainer, of_trainer in runs.items()}
    base = next(iter(summaries.values()))
    titles = ["trainer", *SECONDS, "floor", "of total", "peak GB", "speed", "score + learn", "memory"]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for trainer, row in summaries.items():
        cells = [f"{row[name]:.1f}" for name in SECONDS]
        cells += [f"{floors[trainer]:.1f}", f"{floors[trainer] / row['total']:.0%}", f"{row['peak_gb']:.1f}"]
        cells.append(f"{base['total'] / row['total']:.2f} ({base['cpu'] / row['cpu']:.2f})")
        cells.append(f"{(base['score'] + base['learn']) / (row['score'] + row['learn']):.2f}")
        cells.append(f"{row['peak_gb'] / base['peak_gb']:.2f}")
        lines.append(f"| {LABELS[trainer]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["deep", "wide"])
    parser.add_argument("--runs", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--updates", type=int, default=3, help="updates in a run, at least 2; the first is left out")
    parser.add_argument("--threads", type=int, help="threads of a run; unset: torch's default, the cores")
    parser.add_argument("--trainers", nargs="+", choices=LABELS, help="rows of the tables; unset: those of each shape")
    parser.add_argument(
        "--environments", type=Path, default=cache_dir(), help="folder of other trainers' environments"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins that would end later")
    parser.add_argument("--output", type=Path, help="JSON file for every update of every run")
    args = parser.parse_args()
    if args.updates < 2:
        parser.error(f"--updates is {args.updates}; the first is left out, so it must be at least 2.")

    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    rows = {name: chosen(name, args) for name in args.shapes}
    pythons = {trainer: python_of(trainer, args.environments) for of_shape in rows.values() for trainer in of_shape}
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    began, longest = time.monotonic(), 0.0
    results: dict[str, dict[str, list[Run]]] = {}
    for name, trainers in rows.items():
        job = SHAPES[name]["job"] | {"updates": args.updates, "device": args.device}
        rate = matrix_rate(job["config"], args.device, dtype)
        floors = {trainer: update_flops(job, trainer.partition("-")[0]) / rate for trainer in trainers}
        results[name] = {}
        for trainer in trainers * args.runs:
            start = time.monotonic()
            if start + longest > began + 60 * args.minutes:
                print(f"{name} {trainer}: left out, no time", flush=True)
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    run = measure(pythons[trainer], job | {"trainer": trainer}, Path(folder))
            except RuntimeError as error:  # out of memory, say; the others are measured
                print(f"{name}: {error}", flush=True)
                continue
            longest = max(longest, time.monotonic() - start)
            results[name].setdefault(trainer, []).append(run)
            seconds = ", ".join(f"{update['total']:.1f}" for update in run["updates"])
            print(f"{name} {trainer}: {seconds} s, {run['peak_gb']:.2f} GB, load {run['load']:.1f}", flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=1))
        if results[name]:
            print(f"\n{name}: medians, seconds per update; {rate / 1e12:.2f} TFLOP/s in a large product of matrices\n")
            print(f"{table(results[name], floors)}\n", flush=True)


def chosen(name: str, args: argparse.Namespace) -> list[str]:
    """Return the rows of a shape that can be measured: on a GPU, TRL 1.12 if its environment is there."""
    trainers = args.trainers or SHAPES[name]["trainers"]
    if importlib.util.find_spec("flash_attn") is None:
        trainers = [trainer for trainer in trainers if not trainer.endswith("-flash")]
    if args.device == "cuda" and not (args.environments / f"bench-{BASELINE}" / "complete").exists():
        trainers = [trainer for trainer in trainers if trainer != BASELINE]
    return trainers


if __name__ == "__main__":
    main()
