"""PPO resumed in two processes on the CPU is the run that never stopped: DDP, FSDP2, DeepSpeed, whole and LoRA."""

import math

import pytest
import safetensors.torch
import torch

import dpo_runs
import resume_worker
import two_processes
import zero_runs
from accelerate_files import ACCELERATE, launch


# accelerate and DeepSpeed import half of their optional dependencies; torch warns of saved adapters' base models.
pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]

DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload", "ppo_33b_4x80g")
BY_JSON = {
    f"{name}.json": {
        "environment": {"ACCELERATE_USE_DEEPSPEED": "true"},
        "options": {"deepspeed": f"configs/deepspeed/{name}.json"},
    }
    for name in DEEPSPEED
}
PLAIN = {"environment": {}, "options": {}}
# DeepSpeed's Adam in host memory multiplies β^t up from step to step, and takes a power in the first step after
# resuming. Of these the two are equal in float32; of the usual ones the last digits differ.
BETAS = {"adam_beta1": 0.5, "adam_beta2": 0.75}
STEPS = BETAS | {"critic_steps": 2, "critic_weight_decay": 0.1, "critic_lr_scheduler_type": "cosine"}
FSDP2 = {"environment": launch(ACCELERATE / "fsdp2.yaml", "--num_processes", "2").environment, "options": {}}
TWO_ADAPTERS = {"adapter": True, "options": {"critic": "adapter"}}
LAYOUTS = {
    "DDP": PLAIN,
    "DDP, LoRA": PLAIN | {"adapter": True},
    "DDP, two adapters": PLAIN | TWO_ADAPTERS,
    "DDP, value head": PLAIN | {"options": {"critic": "head", "critic_stop_gradient": True, "critic_steps": 2}},
    **{name: layout | {"options": layout["options"] | STEPS} for name, layout in BY_JSON.items()},
    "FSDP2": FSDP2,
    "zero2.json, LoRA": BY_JSON["zero2.json"] | {"adapter": True},
    "zero3.json, LoRA": BY_JSON["zero3.json"] | {"adapter": True},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming")
    zero_runs.save(folder)
    return two_processes.measured(resume_worker.measure, folder, LAYOUTS, timeout=900)


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_run_is_the_run_that_never_stopped(measured, name):
    whole, resumed = measured[name]["whole"], measured[name]["resumed"]
    wrapper = "DeepSpeedEngine" if "json" in name else "FSDP" if "FSDP2" in name else "DistributedDataParallel"
    assert whole["wrapper"].startswith(wrapper)
    assert len(whole["lines"]) == 3
    assert all(math.isfinite(value) for line in whole["lines"] for value in line.values())
    pairs = zip(whole["lines"], resumed["lines"], strict=True)
    differences = [abs(value - other[key]) for line, other in pairs for key, value in line.items()]
    largest = max((weight - resumed["weights"][key]).abs().max().item() for key, weight in whole["weights"].items())
    print(f"{name}: largest difference {max(differences):.1e} in the log, {largest:.1e} in the weights")
    assert max(differences) == largest == 0.0


def test_pairs_go_on_in_the_same_order_on_another_number_of_processes(tmp_path):
    """From one process to two and back, within a pass over the data."""
    whole = dpo_runs.dpo_trainer(tmp_path / "one", **resume_worker.BY_ONE)
    whole.train()
    saved = str(tmp_path / "one" / "checkpoint-1")
    weights = two_processes.measured(resume_worker.by_two, tmp_path, saved)
    back = dpo_runs.dpo_trainer(tmp_path / "back", **resume_worker.BY_ONE)
    back.train(resume_from_checkpoint=str(tmp_path / "two whole" / "checkpoint-1"))
    weights["back"] = dict(back.model.state_dict())
    first = safetensors.torch.load_file(tmp_path / "one" / "checkpoint-1" / "model.safetensors")
    for name, weight in whole.model.state_dict().items():
        for part in weights.values():
            torch.testing.assert_close(part[name], weight, rtol=0, atol=1e-6)
    assert any((weight - whole.model.state_dict()[name]).abs().max() > 1e-3 for name, weight in first.items())
