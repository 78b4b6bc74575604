"""The credit of pairs: β · (log π_θ − log π_ref) of every token, against one sequence at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpo_runs
import tiny
from mistakes import assert_noticed, given
from trl_ext import ReportCallback
from trl_ext.dpo.credit import ScoredPairs, credit_of_pairs


BETA = 0.25


def test_rewards_stand_at_their_tokens():
    """The second pair has no prompt: of its first token there is no probability."""
    ids = torch.tensor([[10, 11, 20, 21], [22, 23, 0, 0], [10, 11, 24, 0], [25, 26, 27, 2]])
    attended = (ids != 0).long()
    completion = attended.clone()
    completion[[0, 2], :2] = 0
    logratios = torch.tensor([[99, 4.0, 8], [-4, 99, 99], [99, 12, 99], [16, 20, 24]])
    answers = credit_of_pairs(ScoredPairs(ids, attended, completion, logratios), tiny.tiny_tokenizer(), BETA, most=2)
    said = [(answer["kind"], answer["prompt"], answer["score"]) for answer in answers]
    words = tiny.VOCABULARY
    assert said == [
        ("chosen", " ".join(words[10:12]), 3.0),
        ("rejected", " ".join(words[10:12]), 3.0),
        ("chosen", words[22], -1.0),
        ("rejected", words[25], 15.0),
    ]
    rewards = [[piece["implicit_reward"] for piece in answer["pieces"]] for answer in answers]
    assert rewards == [[[1.0], [2.0]], [[3.0]], [[-1.0]], [[4.0], [5.0], [6.0]]]
    texts = [[piece["text"].strip() for piece in answer["pieces"]] for answer in answers]
    assert texts == [words[20:22], [words[24]], [words[23]], [words[26], words[27], "<eos>"]]


@pytest.mark.parametrize(
    "mistake",
    [
        given(batch=lambda batch: replace(batch, logratios=batch.logratios.roll(1, dims=1))),
        given(batch=lambda batch: replace(batch, completion=batch.attended)),
        given(beta=lambda beta: 1.0),
    ],
    ids=["one token late", "the prompt too", "without beta"],
)
def test_control_wrong_rewards_are_noticed(mistake, monkeypatch):
    assert_noticed(Path(__file__), "rewards_stand", {}, "trl_ext.dpo.credit:credit_of_pairs", mistake, monkeypatch)


def slow_rewards(policy, reference, prompt, answer):
    """Of every token, from the log-probabilities of the answer up to it and up to the one before."""

    def of_beginnings(model):
        sums = [dpo_runs.slow_logps(model, prompt, answer[:end]) for end in range(1, len(answer) + 1)]
        return [one - before for one, before in zip(sums, [0.0, *sums[:-1]], strict=True)]

    both = zip(of_beginnings(policy), of_beginnings(reference), strict=True)
    return [BETA * (one - other) for one, other in both]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [True, False])
def test_credit_of_a_run_equals_the_slow_computation(tmp_path, packing, undrawn):
    models = {"model": dpo_runs.tiny_model(), "ref_model": dpo_runs.tiny_model(seed=1)}
    trainer = dpo_runs.dpo_trainer(tmp_path, models, max_steps=1, beta=BETA, packing=packing)
    trainer.add_callback(ReportCallback(seconds=0))
    trainer.train()
    tokenizer, answers = tiny.tiny_tokenizer(), trainer.credit(4)
    assert [answer["kind"] for answer in answers] == ["chosen", "rejected"] * 4
    policy, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    for answer in answers:
        prompt = tokenizer(answer["prompt"])["input_ids"]
        ids = tokenizer("".join(piece["text"] for piece in answer["pieces"]))["input_ids"]
        expected = slow_rewards(policy, reference, prompt, ids)
        got = [number for piece in answer["pieces"] for number in piece["implicit_reward"]]
        assert got == pytest.approx(expected, rel=2e-3, abs=1e-4)
        assert answer["score"] == pytest.approx(sum(expected), abs=1e-3)
    assert (tmp_path / "credit" / "last.jsonl").is_file()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_kept_where_nobody_asks_or_the_reference_was_asked_beforehand(tmp_path, undrawn):
    trainer = dpo_runs.dpo_trainer(tmp_path / "unasked", max_steps=1)
    trainer.train()
    assert trainer._last_batch is None
    trainer = dpo_runs.dpo_trainer(tmp_path / "before", max_steps=1, precompute_ref_log_probs=True)
    trainer.add_callback(ReportCallback(seconds=0))
    trainer.train()
    assert trainer.credit(2) == []
    assert not (tmp_path / "before" / "credit").exists()
