"""The accuracy of a reward model is a share of its pairs, and pairs that are left out are counted."""

import logging

import pytest
import torch
from datasets import Dataset

import dpo_runs
import tiny
from reward_runs import reward_trainer
from trl_ext.cli.commands.reward import report


@torch.no_grad()
def right_pairs(pairs):
    """How many pairs the untrained model orders right, one answer at a time."""
    model, tokenizer, right = tiny.tiny_reward_model(), tiny.tiny_tokenizer(), 0
    for row in pairs:
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        ids = [tokenizer(text if text.endswith("<eos>") else text + "<eos>")["input_ids"] for text in texts]
        chosen, rejected = (model(torch.tensor([each])).logits.item() for each in ids)
        right += chosen > rejected
    return right


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_is_the_share_of_all_pairs(tmp_path, capsys, seed):
    """Nine pairs in batches of eight and one; ten pairs in training, of which the last batch has two."""
    held_out, rows = dpo_runs.tiny_pairs(9, seed=seed), dpo_runs.tiny_pairs(10, seed=seed + 10)
    trainer = reward_trainer(tmp_path, rows, held_out)
    trainer.train()
    metrics = trainer.evaluate()
    expected = right_pairs(held_out)
    assert metrics["eval_pairs"] == 9
    assert metrics["eval_accuracy"] == pytest.approx(expected / 9)
    line = next(line for line in trainer.state.log_history if "accuracy" in line)
    assert line["accuracy"] == pytest.approx(right_pairs(rows) / 10)
    report(trainer, metrics)
    assert f"in the right order: {expected / 9:.1%} of 9 " in capsys.readouterr().out


LONG = {"prompt": "the cat ", "chosen": "good " * 20, "rejected": "bad"}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_pairs_that_are_too_long_are_counted(tmp_path, caplog):
    rows = Dataset.from_list([*dpo_runs.tiny_pairs(8).to_list(), LONG])
    with caplog.at_level(logging.WARNING, "trl_ext"):
        trainer = reward_trainer(tmp_path, rows, rows, max_length=16)
    kept = len(trainer.train_dataset)
    assert kept < 9
    assert f"Left out {9 - kept} of 9 rows of the train dataset" in caplog.text
    assert f"Left out {9 - kept} of 9 rows of the eval dataset" in caplog.text
    assert trainer.evaluate()["eval_pairs"] == kept
    with pytest.raises(ValueError, match=r"In all 2 rows of the train dataset .*`max_length=16`.*Raise it"):
        reward_trainer(tmp_path, Dataset.from_list([LONG] * 2), rows, max_length=16)
