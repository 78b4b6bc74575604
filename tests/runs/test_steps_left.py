"""A checkpoint that has all steps of a run is refused by every trainer; one more step to take, and it goes on."""

import json

import pytest

import tiny
from dpo_runs import dpo_trainer, tiny_pairs
from ppo_runs import ppo_trainer
from reward_runs import reward_trainer
from trl_ext.runs.steps_left import has_steps_left, require_steps_left, steps_of


pytestmark = pytest.mark.integration
EPOCHS = {"max_steps": -1, "save_strategy": "epoch"}


def trainer_of(kind, folder, epochs):
    """One optimizer step an epoch; the number of steps is known when the rows are."""
    options = {"per_device_train_batch_size": 8, "num_train_epochs": epochs} | EPOCHS
    if kind == "reward":
        return reward_trainer(folder, tiny_pairs(8), None, **options)
    if kind == "dpo":
        return dpo_trainer(folder, **options)
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_ppo_epochs": 1}
    return ppo_trainer(folder, {"train_dataset": tiny.tiny_prompts(4)}, **options)


@pytest.mark.parametrize("kind", ["dpo", "ppo", "reward"])
def test_finished_checkpoint_is_refused_and_more_epochs_go_on(kind, tmp_path):
    trainer_of(kind, tmp_path, 2).train()
    again = trainer_of(kind, tmp_path, 2)
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"has taken 2 optimizer steps, and this one ends after 2\. To train for"):
            again.train(resume_from_checkpoint=checkpoint)
    longer = trainer_of(kind, tmp_path, 3)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    with pytest.raises(ValueError, match="has taken 3 optimizer steps, and this one ends after 2"):
        trainer_of(kind, tmp_path, 2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["dpo", "ppo", "reward"])
def test_checkpoint_without_its_optimizer_is_refused(kind, tmp_path):
    """One of an earlier version, without a manifest."""
    trainer_of(kind, tmp_path, 1).train()
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    longer = trainer_of(kind, tmp_path, 2)
    for name in ("scheduler.pt", "optimizer.pt"):
        (tmp_path / "checkpoint-1" / name).unlink()
        with pytest.raises(
            ValueError, match=rf"(cannot resume from .*|The run saved in .*)checkpoint-1.* no .*{name}"
        ):
            longer.train(resume_from_checkpoint=True)


def test_finished_checkpoint_is_refused_before_a_model_is_loaded(tmp_path):
    ppo_trainer(tmp_path, total_episodes=4, num_ppo_epochs=1, save_strategy="epoch").train()
    nothing = {"model": str(tmp_path / "nothing"), "reward_model": str(tmp_path / "nothing")}
    with pytest.raises(ValueError, match="has taken 1 optimizer step, and this one ends after 1"):
        ppo_trainer(tmp_path, nothing, total_episodes=4, num_ppo_epochs=1, resume_from_checkpoint="True")


def test_state_of_a_folder_says_what_is_left(tmp_path):
    assert not has_steps_left(tmp_path)
    for taken, left in ((4, True), (5, False), (6, False)):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": taken, "max_steps": 5}))
        assert has_steps_left(tmp_path) is left
        assert steps_of(tmp_path) == (taken, 5)
    require_steps_left(tmp_path, 7)
    require_steps_left(tmp_path, -1)  # epochs say how many there will be
    require_steps_left(None, 1)
    with pytest.raises(ValueError, match="has taken 6 optimizer steps, and this one ends after 6"):
        require_steps_left(tmp_path, 6)
    for broken in ("", "{}", "[1]", '{"global_step": 1'):
        (tmp_path / "trainer_state.json").write_text(broken)
        with pytest.raises(ValueError, match=r"trainer_state\.json cannot be read .* Resume from another checkpoint"):
            steps_of(tmp_path)
