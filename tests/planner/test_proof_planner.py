"""Proof: what the planner says is within 10% of what the process holds at its peak, on runs of different layout."""

import os

import pytest

from commands import script


# Eight of the runs of docs/measurements.md; `benchmarks/measure_memory.py` repeats all. The shorter ones prove what CI
# has time for: each trainer, a critic of its own and a head, full weights, LoRA and NF4.
SHORTER = ["ppo-model", "ppo-qlora", "dpo-lora"]
LONGER = ["ppo-head-checkpointing", "ppo-lora", "dpo-full", "reward-full", "reward-lora"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.proof) for name in SHORTER]
    + [pytest.param(name, marks=pytest.mark.measure) for name in LONGER],
)
def test_plan_is_within_a_tenth_of_the_measured_peak(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))  # one run at a time has all cores
    module = script("measure_memory")
    module.save_models(module.TINY, tmp_path / "warm-up")
    module.save_models(module.RUNS[name]["config"], tmp_path / name)
    planned = module.planned(module.RUNS[name], tmp_path / name)
    measured = max(module.measured(module.RUNS[name], tmp_path / name).values())
    print(f"{name}: planned {planned.peak.total / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert planned.peak.total == pytest.approx(measured, rel=0.1)
