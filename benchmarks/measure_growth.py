"""
How an update's seconds and memory grow: seconds against the tokens that count, 1k to 32k, and the peak of learning
against `micro_batch_tokens`, each with the straight line through the points, on CPU.

    python benchmarks/measure_growth.py                                     # about 4 minutes on 2 cores
    python benchmarks/measure_growth.py --points 2 --picture growth.png     # the two smallest of each

Every point is a run of `PPOTrainerX` on a small random model in a process of its own, with `critic="head"`, prompts of
32 to 256 tokens and listed answers up to 128. Seconds are the median of the updates but the first, with budgets of
2048 tokens for scoring and learning. Memory is that of the process; the allocator gives freed tensors back at once.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_ppo import measure
from bench_ppo_setup import PROMPTS, lengths, shape, tail
from matplotlib.figure import Figure
from measure_memory import PROMPT_ALLOCATOR


CONFIG = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4}
BATCHES = (7, 12, 23, 44, 86, 170)  # answers per update: about 1k to 32k tokens
BUDGETS = (1024, 2048, 4096, 8192, 16384)  # of an update of 86 answers, 16k tokens
Points = list[tuple[float, float]]


def job(config: dict[str, Any], batch: int, updates: int, budget: int) -> dict[str, Any]:
    """Return a run with so many answers per update and tokens per micro-batch."""
    options = {"micro_batch_tokens": budget, "score_batch_tokens": 2048}
    more = {"trainer": "head", "updates": updates, "options": options, "device": "cpu"}
    return shape([], config, 1, PROMPTS, 128, tail(128), batch=batch)["job"] | more


def tokens(of: dict[str, Any]) -> int:
    return sum(prompt + sum(answers) for prompt, answers in lengths(of))


def run(of: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(sys.executable, of, Path(folder), environment)


def line(points: Points) -> tuple[float, float, float]:
    """Return slope, intercept and R² of the straight line with the least squares."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    return slope, intercept, statistics.correlation(xs, ys) ** 2


def report(title: str, unit: str, points: Points) -> str:
    """Return a table in Markdown of the points beside the line through them, and the line in words."""
    slope, intercept, r2 = line(points)
    rows = [f"| {title} | {unit} | by the line |", "|---:|---:|---:|"]
    rows += [f"| {x:,.0f} | {y:.2f} | {intercept + slope * x:.2f} |" for x, y in points]
    return "\n".join([*rows, "", f"{unit} = {intercept:.3f} + {1000 * slope:.4f} per 1000 tokens, R² = {r2:.4f}", ""])


def draw(panels: dict[tuple[str, str], Points], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, ((title, unit), points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        slope, intercept, r2 = line(points)
        ends = [0, max(x for x, _ in points)]
        axes.plot(ends, [intercept + slope * x for x in ends], color="C0", label=f"straight line, R² = {r2:.4f}")
        axes.plot(*zip(*points, strict=True), "o", color="black", label="measured")
        axes.set(xlabel=title, ylabel=unit, ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="only the smallest ones, at least 2")
    parser.add_argument("--updates", type=int, default=3, help="updates in a run that is timed, at least 2")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    args = parser.parse_args(argv)
    seconds: Points = []
    for batch in BATCHES[: args.points]:
        of = job(CONFIG, batch, args.updates, budget=2048)
        totals = [update["total"] for update in run(of, {})["updates"]]
        seconds.append((tokens(of), statistics.median(totals[1:])))
        print(f"{tokens(of)} tokens: {', '.join(f'{total:.2f}' for total in totals)} s", flush=True)
    memory: Points = []
    for budget in BUDGETS[: args.points]:
        memory.append((budget, run(job(CONFIG, 86, 1, budget), PROMPT_ALLOCATOR)["learn_gb"]))
        print(f"micro_batch_tokens={budget}: {memory[-1][1]:.3f} GB", flush=True)
    panels = {
        ("tokens that count", "seconds per update"): seconds,
        ("micro_batch_tokens", "GB while learning"): memory,
    }
    for (title, unit), points in panels.items():
        print(f"\n{report(title, unit, points)}")
    draw(panels, args.picture)


if __name__ == "__main__":
    main()
