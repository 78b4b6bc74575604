"""
Times `RewardTrainerX` against TRL's `RewardTrainer` on the same model and pairs, in turns, with each of its two
savings alone: what a pair shares read once, in padded rows, and sequences side by side, without sharing.

    python benchmarks/bench_reward.py                            # the demo: about half an hour on 2 CPU cores
    python benchmarks/bench_reward.py --shape tiny --runs 1      # only that everything runs
    python benchmarks/bench_reward.py --device cuda --dtype bfloat16

The demo is SmolLM2-135M with a new head, in full, on the demo's pairs of sentences behind a cue of 64 tokens. Every
run is a fresh process whose first step is left out. Printed are medians over the runs' steps: seconds, those that all
threads computed (`cpu`), how TRL compares (in brackets by `cpu`), the tokens of a step that go through the layers,
whose ratio to TRL's is the bound of the speed, and peak memory. On a busy machine `OMP_NUM_THREADS=1` and `cpu` say
more than seconds. docs/measurements.md says what was measured.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_dpo import measure
from bench_dpo_setup import SHAPES, tokenizer
from bench_dpo_setup import pairs as random_pairs
from bench_dpo_worker import StepClock
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config
from trl import RewardConfig, RewardTrainer

from trl_ext import RewardConfigX, RewardTrainerX
from trl_ext.data import demo
from trl_ext.packing.segments import pack


# Row of the table -> how the sequences of a batch are laid out; all but the last by this script, to take it apart.
LAYOUTS = {
    "trl": "TRL 1.16 `RewardTrainer`",
    "sharing": "sharing alone: a row for each pair, padded",
    "packing": "packing alone: all sequences in one row",
    "trl_ext": "`RewardTrainerX`",
}
TRLS: tuple[Any, Any] = (RewardTrainer, RewardConfig)
CUE_TOKENS = 64
PAIRS_PER_STEP = {"demo": 16, "tiny": 2}


def model_and_pairs(shape: str, steps: int, dtype: torch.dtype) -> tuple[Any, Any, Dataset]:
    """Return a classifier, its tokenizer and pairs for so many steps; the same on every call."""
    torch.manual_seed(0)
    if shape == "tiny":
        config = Qwen2Config(**SHAPES["tiny"]["config"], num_labels=1, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(config)
        return model, tokenizer(SHAPES["tiny"]), random_pairs(SHAPES["tiny"], steps)
    path = demo.smollm2()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)
    words = AutoTokenizer.from_pretrained(path)
    cue = words(demo.CUE * 9)["input_ids"]
    assert len(cue) == CUE_TOKENS
    rows = demo.preference_pairs(train_size=PAIRS_PER_STEP[shape] * steps, test_size=1)["train"]
    ids = {
        f"{side}_ids": [cue + words(text)["input_ids"] + [words.eos_token_id] for text in rows[side]]
        for side in ("chosen", "rejected")
    }
    return model, words, Dataset.from_dict(ids)


def with_one_saving(layout: str, with_both: Callable) -> Callable:
    """Return what lays out the rows of a batch with one of the two savings that `with_both` has."""

    def lay_out(ids: torch.Tensor, mask: torch.Tensor, groups: Any) -> Any:
        if layout == "packing":
            return with_both(ids, mask, [[i] for i in range(len(ids))])
        return pack(ids, mask, groups, row_size=0)

    return lay_out


def train(job: dict[str, Any]) -> None:
    """Train for the job's steps; write seconds, tokens and peak memory to the file that the job names."""
    clock, tokens = StepClock(), []
    model, words, rows = model_and_pairs(job["shape"], job["steps"], getattr(torch, job["dtype"]))
    trainer_class, config_class = (RewardTrainerX, RewardConfigX) if job["trainer"] != "trl" else TRLS
    args = config_class(
        job["folder"],
        per_device_train_batch_size=PAIRS_PER_STEP[job["shape"]],
        max_steps=job["steps"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(model, args, train_dataset=rows, processing_class=words, callbacks=[clock])
    if job["trainer"] in ("sharing", "packing"):
        packing = trainer._scores.packing
        packing.lay_out = with_one_saving(job["trainer"], packing.lay_out)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, states: tokens.append(given[0].numel()))
    trainer.train()
    on_cpu = job["device"] == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    result = {"seconds": clock.seconds, "cpu": clock.cpu, "tokens": tokens, "peak_gb": peak / 1e9}
    Path(job["result"]).write_text(json.dumps(result))


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table in Markdown: medians over all steps but each run's first, peaks over all runs."""
    lines = ["| rows | s | cpu | speed | tokens | bound | GB | memory |", "|---" + "|---:" * 7 + "|"]
    seconds, cpu, tokens = (
        {name: statistics.median(x for run in of for x in run[key][1:]) for name, of in runs.items()}
        for key in ("seconds", "cpu", "tokens")
    )
    peak = {name: max(run["peak_gb"] for run in of) for name, of in runs.items()}
    for name in runs:
        cells = [f"{seconds[name]:.2f}", f"{cpu[name]:.2f}"]
        cells.append(f"{seconds['trl'] / seconds[name]:.2f} ({cpu['trl'] / cpu[name]:.2f})")
        cells += [f"{tokens[name]:.0f}", f"{tokens['trl'] / tokens[name]:.2f}"]
        cells += [f"{peak[name]:.1f}", f"{peak[name] / peak['trl']:.2f}"]
        lines.append(f"| {LAYOUTS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PAIRS_PER_STEP, default="demo")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row of the table")
    parser.add_argument("--steps", type=int, default=4, help="steps in a run, at least 2; the first is left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; the first is left out, so it must be at least 2.")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    for name in [*LAYOUTS] * args.runs:
        job = {key: getattr(args, key) for key in ("shape", "steps", "device", "dtype")} | {"trainer": name}
        with tempfile.TemporaryDirectory() as folder:
            runs[name].append(measure(job, Path(folder), Path(__file__)))
        print(name, [f"{seconds:.2f}" for seconds in runs[name][-1]["seconds"]], flush=True)
    print(f"\n{table(runs)}")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # one run, in a process of its own
        train(json.loads(sys.argv[1]))
    else:
        main()
