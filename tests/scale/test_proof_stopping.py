"""A signal to one of two processes stops both at the same step, and the run that goes on is the one never stopped."""

import pytest

import stopping_worker
import two_processes
import zero_runs


# accelerate and DeepSpeed import half of their optional dependencies.
pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]

ZERO = {"environment": {"ACCELERATE_USE_DEEPSPEED": "true"}}
LAYOUTS = {
    "DDP, amid a step": {"environment": {}, "options": {}, "amid": "step"},
    "ZeRO-2, amid a step": ZERO | {"options": {"deepspeed": "configs/deepspeed/zero2.json"}, "amid": "step"},
    "ZeRO-3, amid a rollout": ZERO | {"options": {"deepspeed": "configs/deepspeed/zero3.json"}, "amid": "rollout"},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    zero_runs.save(folder)
    return two_processes.measured(stopping_worker.measure, folder, LAYOUTS, timeout=600)


@pytest.mark.parametrize("name", LAYOUTS)
def test_signal_to_one_process_stops_both_and_the_run_goes_on(measured, name):
    whole, stopped, resumed = (measured[name][part] for part in ("whole", "stopped", "resumed"))
    step = 3 if LAYOUTS[name]["amid"] == "step" else 4
    assert stopped == {"code": 143, "step": step, "fault": None}
    after, again = (run["lines"][step - 3 :] for run in (whole, resumed))
    assert len(after) == 6 - step
    pairs = zip(after, again, strict=True)
    assert max(abs(value - other[key]) for line, other in pairs for key, value in line.items()) == 0.0
    assert all((weight - resumed["weights"][key]).abs().max() == 0.0 for key, weight in whole["weights"].items())
