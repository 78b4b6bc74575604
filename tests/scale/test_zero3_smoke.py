"""One run under ZeRO-3, as `accelerate launch` starts it; `make proof` has the rest."""

import json
from pathlib import Path

import pytest

import tiny
import two_processes
import zero_runs
from accelerate_files import ACCELERATE, launch


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_ppo_trains_under_zero3(tmp_path):
    zero_runs.save(tmp_path)
    started = launch(ACCELERATE / "zero3.yaml", "--num_processes", "2")
    layout = {"environment": started.environment, "options": {"max_steps": 2}, "only": "ppo"}
    (tmp_path / "layouts.json").write_text(json.dumps({"zero3": layout}))
    worker = Path(zero_runs.__file__).with_name("layout_worker.py")
    run = two_processes.measured(worker, tmp_path / "out.pt", tmp_path / "layouts.json", deepspeed=True)["zero3, ppo"]
    assert (run["wrapper"], run["stage"], run["steps"]) == ("DeepSpeedEngine", 3, 2)
    assert run["still"] == []
    sizes = [parameter.numel() for parameter in tiny.tiny_actor().parameters()]
    assert run["elements"]["reference"] == [sum((size + 1) // 2 for size in sizes), sum(sizes)]
