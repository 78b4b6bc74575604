"""
Times `DPOTrainerX` against TRL's `DPOTrainer` on the same models and pairs, in turns.

    python benchmarks/bench_dpo.py                       # all shapes; about an hour on 2 CPU cores
    python benchmarks/bench_dpo.py --shapes deep-256+64 --runs 1 --steps 3
    python benchmarks/bench_dpo.py --device cuda --shapes 0.5b-1024+256 --dtype bfloat16

Models and pairs are random, made from a config. Every run is a fresh process whose first step is left out. Printed are
medians over the runs' steps: seconds, peak memory, and how TRL compares; beside them the bound, TRL's floating-point
operations over ours. docs/measurements.md says what was measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_dpo_setup import SHAPES, flops


TRAINERS = ("trl", "trl_ext")
WORKER = Path(__file__).with_name("bench_dpo_worker.py")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def measure(job: dict[str, Any], folder: Path, worker: Path = WORKER) -> dict[str, Any]:
    """One run in a fresh process."""
    job = job | {"folder": str(folder), "result": str(folder / "result.json")}
    log, environ = folder / "log.txt", os.environ | QUIET
    command = [sys.executable, worker, json.dumps(job)]
    with log.open("w") as out:
        if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environ).returncode:
            raise RuntimeError(f"The run {job} failed:\n{log.read_text()[-4000:]}")
    return json.loads(Path(job["result"]).read_text())


def row(name: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """A line of the table: medians over all steps but each run's first, peaks over all runs."""
    seconds = {t: statistics.median(s for run in of for s in run["seconds"][1:]) for t, of in runs.items()}
    peak = {trainer: max(run["peak_gb"] for run in of) for trainer, of in runs.items()}
    theirs, ours = flops(SHAPES[name])
    cells = [f"{seconds['trl']:.2f}", f"{seconds['trl_ext']:.2f}", f"{seconds['trl'] / seconds['trl_ext']:.2f}"]
    cells += [f"{theirs / ours:.2f}", f"{peak['trl']:.1f}", f"{peak['trl_ext']:.1f}"]
    cells.append(f"{peak['trl_ext'] / peak['trl']:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[n for n in SHAPES if SHAPES[n]["default"]])
    parser.add_argument("--runs", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--steps", type=int, default=4, help="steps in a run, at least 2; the first is left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; the first is left out, so it must be at least 2.")
    head = "| shape | TRL s | trl_ext s | speed | bound | TRL GB | trl_ext GB | memory |"
    lines = [head, "|---" + "|---:" * 7 + "|"]
    for name in args.shapes:
        runs: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in TRAINERS}
        for trainer in [*TRAINERS] * args.runs:
            job = {"shape": name, "trainer": trainer} | {k: getattr(args, k) for k in ("steps", "device", "dtype")}
            with tempfile.TemporaryDirectory() as folder:
                runs[trainer].append(measure(job, Path(folder)))
            print(name, trainer, [f"{s:.2f}" for s in runs[trainer][-1]["seconds"]], flush=True)
        lines.append(row(name, runs))
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
