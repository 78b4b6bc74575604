"""What a model does not support is switched off with a warning."""

import pytest
import torch
from transformers import CTRLConfig, CTRLForSequenceClassification, CTRLLMHeadModel

import dpo_runs
import ppo_runs
import tiny
from reward_runs import reward_trainer


# transformers has no gradient checkpointing for CTRL, and TRL's default is to have it.
CTRL = CTRLConfig(vocab_size=64, n_embd=16, dff=32, n_layer=2, n_head=2, n_positions=128, pad_token_id=0, num_labels=1)
CTRL.resid_pdrop = CTRL.embd_pdrop = 0.0


def dpo(folder):
    return dpo_runs.dpo_trainer(folder, {"model": CTRLLMHeadModel(CTRL)}, max_steps=1, gradient_checkpointing=True)


def ppo(folder):
    return ppo_runs.ppo_trainer(folder, {"model": CTRLLMHeadModel(CTRL)}, critic="head", max_steps=1)


def reward(folder):
    return reward_trainer(folder, dpo_runs.tiny_pairs(), None, CTRLForSequenceClassification(CTRL), max_steps=1)


@pytest.mark.integration
@pytest.mark.parametrize("trainer_of", [dpo, ppo, reward])
def test_family_without_gradient_checkpointing_trains_without_it(tmp_path, caplog, trainer_of):
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path)
    assert "no gradient checkpointing for CTRL" in caplog.text
    assert not trainer.args.gradient_checkpointing
    trainer.train()
    assert trainer.state.global_step == 1


def test_family_with_gradient_checkpointing_keeps_it(tmp_path, caplog):
    trainer = ppo_runs.ppo_trainer(tmp_path, {"model": tiny.tiny_actor()})
    assert trainer.args.gradient_checkpointing
    assert "checkpointing" not in caplog.text
