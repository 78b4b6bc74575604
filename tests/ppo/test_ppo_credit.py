"""The credit of responses: the numbers of the rollout at their tokens, for the callbacks that show them."""

import json
import re
from pathlib import Path

import pytest
import torch

import ppo_runs
import tiny
from mistakes import assert_noticed, given
from trl_ext import ReportCallback, SampleCallback
from trl_ext.ppo.credit import credit_of_responses
from trl_ext.ppo.rollout import Rollout


def rollout_of(**more):
    """Two responses to prompts of one and two tokens, the first with a hole and padding behind it."""
    return Rollout(
        prompt_ids=torch.tensor([[0, 10], [11, 12]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_ids=torch.tensor([[20, 21, 22, 0], [23, 24, 25, 2]]),
        attended=torch.tensor([[True, True, True, False], [True] * 4]),
        mask=torch.tensor([[True, False, True, False], [True] * 4]),
        scores=torch.tensor([1.5, 0.0]),
        scored=torch.tensor([True, False]),
        has_eos=torch.tensor([False, True]),
        **more,
    )


def test_credit_is_the_rollouts_number_of_each_token_that_counts():
    numbers = {
        "advantages": torch.tensor([[0.5, 9, -0.25, 9], [1, 2, 3, 4]]),
        "old_values": torch.tensor([[0.125, 9, 0.75, 9], [5.0, 6, 7, 8]]),
        "rewards": torch.tensor([[0, 9, 1.5, 9], [0.0, 0, 0, 0]]),
    }
    logps = {"old_logps": torch.full((2, 4), -1.0), "ref_logps": torch.full((2, 4), -1.5)}
    first, second = credit_of_responses(rollout_of(**numbers, **logps), tiny.tiny_tokenizer(), most=5)
    words = tiny.VOCABULARY
    assert [piece["text"].strip() for piece in first["pieces"]] == words[20:23]
    assert (first["prompt"], first["kind"], first["score"]) == (words[10], "response", 1.5)
    assert [piece["advantage"] for piece in first["pieces"]] == [[0.5], [], [-0.25]]
    assert [piece["value"] for piece in first["pieces"]] == [[0.125], [], [0.75]]
    assert [piece["reward"] for piece in first["pieces"]] == [[0.0], [], [1.5]]
    assert [piece["log_ratio"] for piece in first["pieces"]] == [[0.5], [], [0.5]]
    assert (second["prompt"], second["score"]) == (" ".join(words[11:13]), None)
    assert [piece["special"] for piece in second["pieces"]] == [False, False, False, True]
    assert len(credit_of_responses(rollout_of(**numbers), tiny.tiny_tokenizer(), most=1)) == 1
    assert "log_ratio" not in credit_of_responses(rollout_of(**numbers), tiny.tiny_tokenizer(), most=1)[0]["pieces"][0]


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.ones_like},
        {"numbers": lambda numbers: {name: values.roll(1) for name, values in numbers.items()}},
        {"numbers": lambda numbers: numbers | {"value": numbers["advantage"]}},
    ],
    ids=["a tool's tokens count", "one token late", "another number"],
)
def test_control_wrong_numbers_are_noticed(change, monkeypatch):
    target = "trl_ext.runs.credit:answer_with_credit"
    assert_noticed(Path(__file__), "credit_is", {}, target, given(**change), monkeypatch)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_report_and_samples_show_the_credit_of_a_run(tmp_path, undrawn, capsys):
    trainer = ppo_runs.ppo_trainer(tmp_path, {"eval_dataset": None}, kl_placement="reward", kl_coef=0.5)
    trainer.add_callback(ReportCallback(seconds=0, credit=3))
    for number in (None, "value", "log_ratio", "reward", "implicit_reward"):
        trainer.add_callback(SampleCallback(["the cat"], every=2, max_new_tokens=3, credit=1, credit_by=number))
    trainer.train()
    shown = re.findall(r"Step 2: tokens by ([\w-]+)", capsys.readouterr().out)
    assert shown == ["advantage", "value", "log-ratio", "reward", "advantage"]  # PPO has no implicit reward
    names = sorted(path.stem for path in (tmp_path / "credit").iterdir())
    assert names == ["last", "step_00002", "step_00004"]
    rollout = trainer.run_state.rollout
    last = [json.loads(line) for line in (tmp_path / "credit" / "last.jsonl").read_text().splitlines()]
    assert last == [{"step": 4} | answer for answer in trainer.credit(3)]
    for row, answer in enumerate(last):
        paid = sum(sum(piece["reward"]) for piece in answer["pieces"])
        kl = (rollout.old_logps - rollout.ref_logps)[row][rollout.mask[row]].sum().item()
        assert paid == pytest.approx(rollout.scores[row].item() - 0.5 * kl, abs=1e-2)
        advantages = [number for piece in answer["pieces"] for number in piece["advantage"]]
        assert advantages == pytest.approx(rollout.advantages[row][rollout.mask[row]].tolist(), rel=1e-3)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_run_without_these_callbacks_offers_credit_to_nobody(tmp_path):
    trainer = ppo_runs.ppo_trainer(tmp_path, max_steps=1)
    assert trainer.credit(2) == []
    called = ppo_runs.returned_by(trainer, "credit")
    trainer.add_callback(ReportCallback(seconds=0, credit=0))
    trainer.add_callback(SampleCallback(["the cat"], every=1, max_new_tokens=2, credit=0))
    trainer.train()
    assert called == []
    assert not (tmp_path / "credit").exists()


def test_counts_below_0_and_unknown_numbers_are_refused():
    with pytest.raises(ValueError, match="`credit` is -1"):
        ReportCallback(credit=-1)
    with pytest.raises(ValueError, match="`credit` is -1"):
        SampleCallback(["a"], credit=-1)
    with pytest.raises(ValueError, match=r"`credit_by` is 'ratio'; it must be one of .*'log_ratio'"):
        SampleCallback(["a"], credit_by="ratio")
