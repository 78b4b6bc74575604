"""The DPO benchmark: its shapes have the lengths they claim, its bound counts what is computed, and it runs."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from commands import ROOT, script


def test_pairs_tokenise_to_the_lengths_of_the_shape():
    setup = script("bench_dpo_setup")
    shape = setup.SHAPES["tiny"]
    tokenizer = setup.tokenizer(shape)
    for row, expected in zip(setup.pairs(shape, 5), setup.lengths(shape, 5), strict=True):
        assert tuple(len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")) == expected
        assert row["chosen"].endswith("<end>")


def test_bound_counts_the_operations_of_a_slow_loop():
    setup = script("bench_dpo_setup")
    config = setup.TINY | {"num_key_value_heads": 1}
    shape = setup.shape(config, 2, (4, 8), (2, 4))
    layer = 0  # weights of a layer
    for rows, columns in ((32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)):
        layer += rows * columns
    theirs = ours = 0.0
    drawn = setup.lengths(shape, 3)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        longest = max(first[0] + max(first[1:]), second[0] + max(second[1:]))
        head = 2 * 32 * 256 * (sum(first[1:]) + sum(second[1:]))
        theirs += 4 * (longest * 2 * 2 * layer) + 4 * 2 * 4 * 32 * longest**2 / 2 + head
        ours += head
        for prompt, chosen, rejected in (first, second):
            ours += (prompt + chosen + rejected) * 2 * 2 * layer
            # a token attends to half of its own piece on average, and to all of the prompt before it
            for size, before in ((prompt, 0), (chosen, prompt), (rejected, prompt)):
                ours += 2 * 4 * 32 * size * (before + size / 2)
    assert setup.flops(shape, steps=3) == pytest.approx((theirs, ours))


def test_row_compares_medians_without_first_steps():
    bench = script("bench_dpo")
    runs = {
        "trl": [{"seconds": [99.0, 4.0, 6.0], "peak_gb": 4.0}, {"seconds": [99.0, 8.0, 6.0], "peak_gb": 5.0}],
        "trl_ext": [{"seconds": [99.0, 2.0, 2.0], "peak_gb": 2.0}, {"seconds": [99.0, 3.0, 3.0], "peak_gb": 2.5}],
    }
    cells = [cell.strip() for cell in bench.row("tiny", runs).strip("|").split("|")]
    assert cells[:4] == ["tiny", "6.00", "2.50", "2.40"]
    assert cells[5:] == ["5.0", "2.5", "0.50"]


def test_benchmark_runs_both_trainers_in_turns(monkeypatch, capsys):
    bench, worker = script("bench_dpo"), script("bench_dpo_worker")

    def run_here(command, stdout, stderr, env):
        assert command[:2] == [sys.executable, ROOT / "benchmarks" / "bench_dpo_worker.py"]
        with contextlib.redirect_stdout(stdout):
            worker.main(json.loads(command[2]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    monkeypatch.setattr(sys, "argv", ["bench_dpo.py", "--shapes", "tiny", "--runs", "1", "--steps", "2"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["tiny", "trl"], ["tiny", "trl_ext"]]
    assert lines[-1].count("|") == lines[-2].count("|") == 9
