"""What every test shares: no network, no GPU unless asked for, fixed seeds, one thread, tiny models."""

import functools
import gc
import importlib.metadata
import os
from pathlib import Path


# Before any import below: these libraries read their environment once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and a fork do not go together
if os.environ.get("TRL_EXT_GPU") != "1":  # set by `make gpu`; elsewhere every machine runs what a CPU machine runs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from filelock import FileLock
from transformers import set_seed


# Models this small lose time to threads, and pytest-xdist already fills the cores. It also fixes the order of sums.
torch.set_num_threads(1)

# accelerate asks whether PEFT is installed wherever it looks at a model, and parses the answer anew each time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

TIERS = {"unit", "integration", "distributed", "gpu", "proof", "measure", "parity", "vllm"}
# The proofs that take longest, which begin first: else one worker would end long after the other.
LONGEST = [
    *("test_proof_layouts", "test_proof_demo", "test_proof_planner", "test_wheel", "test_proof_resuming"),
    *("test_proof_zero_equality", "test_proof_bandit", "test_proof_distributed", "test_families", "test_proof_random"),
]


def pytest_collection_modifyitems(items):
    """A test that names no tier is a unit test."""
    for item in items:
        if not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("unit")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """The Trainer collects garbage when training starts: it need not go through every library and test each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """Python, NumPy and torch start every test from the same state."""
    set_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves a run's report empty: drawing it takes most of a tiny run's time, and tests of reports do that."""
    from trl_ext.callbacks import report

    def touch(folders, **_):
        for folder in folders:
            (Path(folder) / "report.html").touch()

    monkeypatch.setattr(report, "write_report", touch)


@pytest.fixture
def packed_calls(monkeypatch):
    """The rows of every call in which packing is on; `None` where a batch is padded all the same."""
    from trl_ext.packing.forward import PackedForward

    calls, lay_out = [], PackedForward.lay_out

    def note(self, *args):
        rows = lay_out(self, *args)
        if self.on:
            calls.append(rows)
        return rows

    monkeypatch.setattr(PackedForward, "lay_out", note)
    return calls


@pytest.fixture(scope="session")
def of_two_processes(tmp_path_factory):
    """What two processes have measured (`two_process_runs.py`): one launch for all tests, whichever comes first."""
    import two_process_runs  # which loads TRL and DeepSpeed
    import two_processes

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "two_processes"
    with FileLock(f"{folder}.lock"):
        if not (folder / "measured.pt").is_file():
            folder.mkdir(exist_ok=True)
            two_processes.measured(two_process_runs.measure, folder, two_process_runs.prepare(folder))
    return two_processes.read(folder)
