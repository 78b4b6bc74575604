"""PPO under ZeRO-2 and ZeRO-3, as `accelerate launch` starts it; `make proof` has the rest."""

import pytest
import torch

import tiny


ACTOR = [parameter.numel() for parameter in tiny.tiny_actor().parameters()]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [2, 3])
def test_ppo_trains_under_zero(of_two_processes, stage):
    """The reward model, too, is within DeepSpeed's engine, where it is asked whether it reads padding."""
    run = of_two_processes[f"zero{stage}, ppo"]
    assert (run["wrapper"], run["stage"], run["steps"]) == ("DeepSpeedEngine", stage, 2)
    assert run["passes"] >= 4
    assert run["applied"] == 2
    assert run["still"] == []
    assert run["reward wrapper"] == "DeepSpeedEngine"
    kept = sum((size + 1) // 2 for size in ACTOR) if stage == 3 else sum(ACTOR)
    assert run["elements"]["reference"] == [kept, sum(ACTOR)]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_adapter_from_a_folder_goes_on_being_trained_under_zero3(of_two_processes):
    """On the base's shares; the reference is the adapter as it was saved, so that the first KL is 0."""
    run = of_two_processes["adapter, zero3, ppo"]
    given, left = run["given"], run["left"]
    assert (run["wrapper"], run["stage"], run["steps"], run["kl"]) == ("DeepSpeedEngine", 3, 1, [0.0])
    assert (run["still"], run["moved though frozen"]) == ([], [])
    start = {key: value for key, value in run["start"].items() if ".lora_" in key and ".default." in key}
    assert {key.replace(".default", ""): value.tolist() for key, value in start.items()} == {
        key: value.tolist() for key, value in given.items()
    }
    assert left.keys() == given.keys()
    assert not any(torch.equal(left[key], given[key]) for key in given)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_control_a_step_in_every_pass_is_counted(of_two_processes):
    run = of_two_processes["mistake, ppo"]
    assert run["applied"] == run["passes"] > run["steps"]
