"""
What is learned from equally many sampled answers: TRL 1.12's `PPOTrainer`, TRL 1.16's `GRPOTrainer`, and `PPOTrainerX`
with the options of several papers, on four tasks.

    python benchmarks/bench_learning.py                         # all of it: at most 4 hours on 2 cores
    python benchmarks/bench_learning.py --minutes 60            # begins no run after an hour; call it again to go on
    python benchmarks/bench_learning.py --tasks sorting --trainers plain grpo-4
    python benchmarks/bench_learning.py --report                # the tables and the picture of what has run

Every run begins with the same small Llama, which imitates noisy answers to the task's prompts, has the same prompts as
the others of its seed, and samples equally many answers. GRPO's groups count as samples, so that trainers with groups
of 8 read 320 of the 2,560 prompts. The held-out score is the mean of one sampled answer to each of 128 other prompts.
A trainer's learning rate on a task is the one of three with the best mean area under the held-out score on two tuning
seeds; only then do the five reported seeds run, which are others. `recommended` is one set of options for all tasks;
rows with another α run on the tuning seeds only.

A finished run is a line of the JSONL file, and is not run again. TRL 1.12 gets an environment of its own at first use.
docs/critic.md says what was measured.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_learning_setup import TASKS, Job, make_start, start_of
from bench_ppo import QUIET
from bench_ppo_setup import BASELINE, python_of

from trl_ext.data.demo import cache_dir


RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEEDS, SEEDS = (101, 102), (1, 2, 3, 4, 5)
SIZES = {"batch": 64, "samples": 2560, "measurements": 10}  # of a rollout, of a run, of its curve behind the start

# Four passes over each rollout, no KL: what is compared is the score.
PPO = {"num_ppo_epochs": 4, "num_mini_batches": 2, "kl_coef": 0.0}
PAPERS = PPO | {"critic_lam": 1.0, "ent_coef": 0.0}  # as in configs/ppo/, but for sizes
WARM_UP = {"critic_warmup_steps": 16}  # two rollouts, which count as samples
GROUPS = {"num_generations": 8}
VAPO = PAPERS | WARM_UP | GROUPS
VAPO |= {"lam_alpha": 0.05, "cliprange_high": 0.28, "positive_nll_coef": 0.1, "positive_min_score": 1.0}
SAO = PAPERS | WARM_UP | {"policy_objective": "mask", "cliprange": 0.8, "cliprange_high": 3.0, "lam_alpha": 1.5}
SAO |= {"critic_steps": 2, "freeze_critic": ["*self_attn*"]}
# One recipe for all tasks, chosen on the tuning seeds.
RECOMMENDED = PAPERS | {"lam_alpha": 5.0, "cliprange_high": 0.28, "critic_gate": True}
RECOMMENDED |= {"critic_steps": 2, "critic_max_grad_norm": 1.0, "cliprange_value": None}

# Label, which trainer it is, its options, and the critic's learning rate over the actor's.
TRAINERS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    BASELINE: ("TRL 1.12 `PPOTrainer`", BASELINE, PPO, 1),
    "grpo-1": ("GRPO, 1 iteration", "grpo", GROUPS | {"num_iterations": 1}, 1),
    "grpo-4": ("GRPO, 4 iterations", "grpo", GROUPS | {"num_iterations": 4}, 1),
    "plain": ("`PPOTrainerX`", "ppo", PPO, 1),
    "head": ('`PPOTrainerX`, `critic="head"`', "ppo", PPO | {"critic": "head"}, 1),
    "vc-ppo": ("VC-PPO", "ppo", PAPERS | WARM_UP, 2),
    "vapo": ("VAPO", "ppo", VAPO, 2),
    "sao": ("SAO", "ppo", SAO, 5),
    "recommended": ("recommended", "ppo", RECOMMENDED, 1),
}
ALPHAS = {f"recommended, α = {alpha}": RECOMMENDED | {"lam_alpha": alpha} for alpha in (0.5, 1.5)}
TRAINERS |= {name: (name, "ppo", told, 1) for name, told in ALPHAS.items()}
BARS = (BASELINE, "grpo-1", "grpo-4")
# Quantiles 0.975 of Student's t by the number of seeds.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}

Run = dict[str, Any]
"""A line of the file: the `job`, with its `curve` of (samples, held-out score) and `seconds`, or an `error`."""


# --- what runs


def cells(tasks: Iterable[str], trainers: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of task and trainer that can run: TRL 1.12 knows no tools."""
    chosen = list(trainers)
    return [(t, name) for t in tasks for name in chosen if name != BASELINE or TASKS[t].observe is None]


def job(task: str, trainer: str, rate: float, seed: int, starts: dict[str, Path]) -> Job:
    _, kind, told, times = TRAINERS[trainer]
    more = {"critic_learning_rate": times * rate} if times != 1 else {}
    of_run = {"task": task, "trainer": trainer, "kind": kind, "learning_rate": rate, "seed": seed}
    return of_run | SIZES | {"start": starts[task].name, "options": told | more}


def tuning_jobs(task: str, trainer: str, starts: dict[str, Path]) -> list[Job]:
    return [job(task, trainer, rate, seed, starts) for rate in RATES for seed in TUNING_SEEDS]


def chosen_rate(task: str, trainer: str, starts: dict[str, Path], runs: "Runs") -> float | None:
    """Return the rate with the best mean area on the tuning seeds, the smallest of equals; `None` until all ran."""
    found = [runs.of(of_run) for of_run in tuning_jobs(task, trainer, starts)]
    if None in found:
        return None
    areas = {rate: [area(run) for run in found if run["job"]["learning_rate"] == rate] for rate in RATES}
    return max(RATES, key=lambda rate: statistics.mean(areas[rate]))


def reported_jobs(task: str, trainer: str, starts: dict[str, Path], runs: "Runs") -> list[Job]:
    """Return the jobs of the reported seeds, none before the rate is chosen or of what is only tuned."""
    rate = None if trainer in ALPHAS else chosen_rate(task, trainer, starts, runs)
    return [] if rate is None else [job(task, trainer, rate, seed, starts) for seed in SEEDS]


class Runs:
    """The lines of the JSONL file, by their jobs; several threads may add to it."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self.by_job = {self._key(run["job"]): run for run in map(json.loads, lines)}

    @staticmethod
    def _key(of_run: Job) -> str:
        return json.dumps(of_run, sort_keys=True)

    def of(self, of_run: Job) -> Run | None:
        return self.by_job.get(self._key(of_run))

    def add(self, run: Run) -> None:
        with self.lock:
            self.by_job[self._key(run["job"])] = run
            with self.path.open("a") as file:
                file.write(json.dumps(run) + "\n")


class Progress:
    """Says after each run how many are left, and for how long, at the mean seconds that runs took so far."""

    def __init__(self, left: int, workers: int):
        self.left, self.workers, self.took = left, workers, list[float]()

    def say(self, run: Run, took: float) -> None:
        self.left -= 1
        self.took.append(took)
        of_run = run["job"]
        name = f"{of_run['task']}, {of_run['trainer']}, {of_run['learning_rate']:g}, seed {of_run['seed']}"
        result = run["error"] if "error" in run else f"area {area(run):.3f}, {run['seconds']:.0f} s"
        minutes = self.left * statistics.mean(self.took) / self.workers / 60
        print(f"{name}: {result}; {self.left} runs left, about {minutes:.0f} min", flush=True)


def execute(
    jobs: Sequence[Job], starts: Path, environments: Path, until: float, runs: Runs, progress: Progress
) -> None:
    """Run those of one trainer that have not run yet, one after the other, in a process of their own."""
    jobs = [each for each in jobs if runs.of(each) is None]
    if not jobs or time.time() > until:
        return
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
        json.dump({"jobs": jobs, "starts": str(starts), "until": until}, file)
        file.flush()
        python = python_of(jobs[0]["kind"], environments)
        command = [python, str(Path(__file__).with_name("bench_learning_worker.py")), file.name]
        environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1"}
        since = time.monotonic()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as worker:
            for line in worker.stdout:
                if line.startswith("RESULT "):
                    run = json.loads(line.removeprefix("RESULT "))
                    runs.add(run)
                    progress.say(run, time.monotonic() - since)
                    since = time.monotonic()
        if worker.returncode:
            errors.seek(0)
            print(f"{jobs[0]['task']}, {jobs[0]['trainer']}: ended with {worker.returncode}\n{errors.read()[-3000:]}")


# --- what is reported


def area(run: Run) -> float:
    """Return the mean height of the curve, straight between its points; 0 of a run that ended in an error."""
    if "error" in run:
        return 0.0
    under = sum((b - a) * (left + right) / 2 for (a, left), (b, right) in pairwise(run["curve"]))
    return under / run["curve"][-1][0]


def samples_to(run: Run, level: float) -> float | None:
    """Return how many samples it takes until the curve first reaches a level, `None` if it never does."""
    if "error" in run:
        return None
    if run["curve"][0][1] >= level:
        return 0.0
    for (a, left), (b, right) in pairwise(run["curve"]):
        if right >= level:
            return a + (level - left) / (right - left) * (b - a)
    return None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one value per seed, and half its 95% interval by Student's t."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def difference(runs: Sequence[Run], bar: Sequence[Run]) -> tuple[float, float]:
    """Return the mean difference of areas to the bar's, seed by seed, and half its 95% interval."""
    of_bar = {run["job"]["seed"]: area(run) for run in bar}
    return interval([area(run) - of_bar[run["job"]["seed"]] for run in runs])


def mean_curve(runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """Return (samples, mean score, half its 95% interval) of the runs that ended without an error."""
    curves = [run["curve"] for run in runs if "error" not in run]
    if len(curves) < 2:
        return []
    return [(points[0][0], *interval([score for _, score in points])) for points in zip(*curves, strict=True)]


def signed(value: float, half: float) -> str:
    return f"{value:+.3f} ± {half:.3f}"


def table(of_task: dict[str, list[Run]]) -> str:
    """
    Return a table in Markdown with a row for each trainer of a task. "samples to 90%" is how many
    samples it takes from the start's score to 90% of the way to the best mean score that any trainer reaches.

    Args:
        of_task: the reported runs by trainer.
    """
    curves = [mean_curve(runs) for runs in of_task.values()]
    best = max((score for curve in curves for _, score, _ in curve), default=0.0)
    bars = [bar for bar in BARS if bar in of_task]
    titles = ["trainer", "learning rate", "area", *(f"over {TRAINERS[bar][0]}" for bar in bars)]
    titles += ["at the end", "samples to 90%", "seconds"]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for trainer, runs in of_task.items():
        ended = [run for run in runs if "error" not in run]
        mean, half = interval([area(run) for run in runs])
        rate = runs[0]["job"]["learning_rate"]
        cells_of_row = [f"{rate:g}{'' if min(RATES) < rate < max(RATES) else ' (edge)'}", f"{mean:.3f} ± {half:.3f}"]
        cells_of_row += ["" if bar == trainer else signed(*difference(runs, of_task[bar])) for bar in bars]
        if not ended:
            lines.append(f"| {TRAINERS[trainer][0]} | {' | '.join(cells_of_row)} | all failed | | |")
            continue
        start = ended[0]["curve"][0][1]
        needed = [samples_to(run, start + 0.9 * (best - start)) for run in runs]
        reached = [samples for samples in needed if samples is not None]
        samples = f"{statistics.mean(reached):.0f}" if reached else "never"
        samples += f" ({len(reached)} of {len(runs)})" if 0 < len(reached) < len(runs) else ""
        if len(reached) == len(runs):
            samples += f" ± {interval(reached)[1]:.0f}"
        last = statistics.mean(run["curve"][-1][1] for run in ended)
        seconds = statistics.mean(run["seconds"] for run in ended)
        cells_of_row += [f"{last:.3f}", samples, f"{seconds:.0f}"]
        lines.append(f"| {TRAINERS[trainer][0]} | {' | '.join(cells_of_row)} |")
    return "\n".join(lines)


def of_alphas(tasks: Iterable[str], starts: dict[str, Path], runs: Runs) -> str:
    """Return a table in Markdown of the recommended recipe's best mean areas on the tuning seeds, by its α."""
    lines = []
    for name in ("recommended", *ALPHAS):
        areas = []
        for task in tasks:
            found = [runs.of(of_run) for of_run in tuning_jobs(task, name, starts)]
            rate = chosen_rate(task, name, starts, runs)
            if rate is not None:
                areas.append(statistics.mean(area(run) for run in found if run["job"]["learning_rate"] == rate))
        if areas:
            alpha = TRAINERS[name][2]["lam_alpha"]
            lines.append(f"| {alpha:g} | {len(areas)} | {statistics.mean(areas):.3f} |")
    if not lines:
        return ""
    return "\n".join(["| α of `recommended` | tasks | area on the tuning seeds |", "|---:|---:|---:|", *lines])


def draw(reported: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Draw the mean held-out score over samples, with its 95% interval, a panel for each task."""
    from matplotlib.figure import Figure  # bench_overlap.py runs where it is not installed

    figure = Figure(figsize=(11, 4 * math.ceil(len(reported) / 2)), layout="constrained")
    axes = figure.subplots(math.ceil(len(reported) / 2), 2, squeeze=False).flat
    colors = {trainer: f"C{i}" for i, trainer in enumerate(TRAINERS)}
    shown: dict[str, Any] = {}
    for panel, (task, of_task) in zip(axes, reported.items(), strict=False):
        for trainer, runs in of_task.items():
            if curve := mean_curve(runs):
                samples, means, halves = zip(*curve, strict=True)
                low = [mean - half for mean, half in zip(means, halves, strict=True)]
                high = [mean + half for mean, half in zip(means, halves, strict=True)]
                style = "--" if trainer in BARS else "-"
                (line,) = panel.plot(samples, means, style, color=colors[trainer])
                panel.fill_between(samples, low, high, color=colors[trainer], alpha=0.12, linewidth=0)
                shown[TRAINERS[trainer][0].replace("`", "")] = line
        panel.set(title=task, xlabel="sampled answers", ylabel="held-out score")
        panel.grid(alpha=0.3)
    for panel in list(axes)[len(reported) :]:
        panel.set_axis_off()
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def report(tasks: Sequence[str], starts: dict[str, Path], runs: Runs, picture: Path) -> None:
    """Print a table for each task, and draw the picture, of the trainers whose reported seeds have all run."""
    reported: dict[str, dict[str, list[Run]]] = {}
    for task, trainer in cells(tasks, TRAINERS):
        found = [runs.of(of_run) for of_run in reported_jobs(task, trainer, starts, runs)]
        if found and None not in found:
            reported.setdefault(task, {})[trainer] = found
    for task, of_task in reported.items():
        print(f"\n*{task}*, {len(SEEDS)} seeds, {SIZES['samples']} answers each\n\n{table(of_task)}")
    print(f"\n{of_alphas(tasks, starts, runs)}")
    for run in runs.by_job.values():
        if "error" in run:
            of_run = run["job"]
            print(f"\n{of_run['task']}, {of_run['trainer']}, seed {of_run['seed']} failed: {run['error'][:300]}")
    if reported:
        draw(reported, picture)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--tune", action="store_true", help="only the tuning seeds")
    parser.add_argument("--report", action="store_true", help="only the tables and the picture of what has run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run begins later")
    parser.add_argument("--output", type=Path, default=Path("bench_learning.jsonl"), help="a line for each run")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/learning.png"))
    parser.add_argument(
        "--cache", type=Path, default=cache_dir(), help="folder of starts and of TRL 1.12's environment"
    )
    args = parser.parse_args(argv)
    until = time.time() + 60 * args.minutes
    runs = Runs(args.output)
    starts = {task: start_of(task, args.cache) for task in args.tasks}
    if not args.report:
        for task, folder in starts.items():
            make_start(task, folder)
        chosen = cells(args.tasks, args.trainers)
        if any(trainer == BASELINE for _, trainer in chosen):
            python_of(BASELINE, args.cache)  # before two threads would make it
        planned = {cell: tuning_jobs(*cell, starts) for cell in chosen}
        left = sum(runs.of(each) is None for jobs in planned.values() for each in jobs)
        reports = 0 if args.tune else sum(trainer not in ALPHAS for _, trainer in chosen)
        ran = [run for cell in chosen for run in map(runs.of, reported_jobs(*cell, starts, runs)) if run is not None]
        progress = Progress(left + len(SEEDS) * reports - len(ran), args.workers)
        more = (args.cache / "bench-learning", args.cache, until, runs, progress)
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda jobs: execute(jobs, *more), planned.values()))
            if not args.tune:
                planned = {cell: reported_jobs(*cell, starts, runs) for cell in chosen}
                list(pool.map(lambda jobs: execute(jobs, *more), planned.values()))
    report(args.tasks, starts, runs, args.picture)


if __name__ == "__main__":
    main()
