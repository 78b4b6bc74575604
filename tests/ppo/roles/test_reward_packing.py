"""A reward model in packed rows gives the scores of each sequence alone, with a prompt once for all its responses."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny
from families.configs import family_config, family_model
from ppo_runs import ppo_trainer
from trl_ext.packing import segments
from trl_ext.packing.scores import PackedScores
from trl_ext.ppo.roles.reward_forms import RewardForm
from trl_ext.ppo.roles.reward_models import TokenScorer


GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(8, 50, (size,), generator=GENERATOR).tolist() for size in (9, 1, 5)]
RESPONSES = [torch.randint(8, 50, (1 + 5 * i % 8,), generator=GENERATOR).tolist() for i in range(9)]
ASKED = {"prompt_ids": [PROMPTS[i // 3] for i in range(9)], "completion_ids": RESPONSES}
READ = [prompt + answer + [2] for prompt, answer in zip(*ASKED.values(), strict=True)]


def scorer_of(family="llama", pad=0, packs=True, budget=None, shares=True, **options):
    config = family_config(family, num_labels=1, **options)
    model = family_model(config, seed=1, of=AutoModelForSequenceClassification)
    model.config.pad_token_id = pad
    tokenizer = tiny.tiny_tokenizer()
    scorer = TokenScorer(model, "judge", RewardForm(tokenizer, tokenizer, shares_ids=True), 9, budget)
    if packs:
        scorer.pack(shares, nullcontext)
    return scorer


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"pad": None}),
        ("llama", {"pad": 2}),  # the end token pads: scores are read before the end
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("mistral", {}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_scores_are_those_of_padded_rows_and_a_prompt_is_read_once(packed_calls, family, options):
    scores = scorer_of(family, **options)(**ASKED)
    (rows,) = packed_calls
    assert len(rows.rows) == 1
    # Responses may begin alike, too.
    assert rows.input_ids.numel() <= sum(map(len, PROMPTS)) + sum(len(answer) + 1 for answer in RESPONSES)
    assert scores == pytest.approx(scorer_of(family, packs=False, **options)(**ASKED), rel=1e-5, abs=1e-5)


def test_budget_counts_what_is_shared_once(packed_calls):
    scores = scorer_of(budget=30)(**ASKED)
    assert len(packed_calls) > 1
    assert all(rows.input_ids.numel() <= 30 for rows in packed_calls)
    assert sum(rows.input_ids.numel() for rows in packed_calls) < sum(map(len, READ))
    assert scores == pytest.approx(scorer_of(packs=False)(**ASKED), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("limit", [None, 8])
def test_only_a_text_alone_exceeds_the_budget(monkeypatch, limit):
    """Sequences beyond a limit of the model are padded, and their padding counts."""
    scorer, passes = scorer_of(budget=14), []
    scorer.packed.packing.limit = limit
    score = scorer._score

    def note(sequences, groups):
        passes.append([len(sequences)])
        return score(sequences, groups)

    monkeypatch.setattr(scorer, "_score", note)
    scorer.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: passes[-1].append(ids[0].numel()))
    assert scorer(**ASKED) == pytest.approx(scorer_of(packs=False)(**ASKED), rel=1e-5, abs=1e-5)
    assert [tokens for count, tokens in passes if count == 1 and tokens > 14] == [16]
    assert max(tokens for count, tokens in passes if count > 1) <= 14


def test_one_response_per_prompt_shares_nothing(packed_calls):
    scorer_of(shares=False)(**ASKED)
    (rows,) = packed_calls
    assert rows.input_ids.numel() == sum(map(len, READ))


@pytest.mark.parametrize("family", ["bert", "xlnet", "bloom", "bart"])  # the first two read what follows
def test_model_that_packed_rows_are_not_exact_for_says_so(caplog, packed_calls, family):
    scorer = scorer_of(family, packs=False, **({"attn_type": "bi"} if family == "xlnet" else {}))
    scorer.try_padding()
    expected = scorer(**ASKED)
    scorer.pack(True, nullcontext)
    (line,) = [line for line in caplog.messages if line.startswith("Rows are padded for the reward model 'judge'")]
    assert "log-probabilities" not in line
    assert scorer(**ASKED) == expected
    assert not packed_calls


def test_model_that_fsdp_partitions_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_ext.ppo.trainer.is_fsdp", lambda option: True)
    trainer = ppo_trainer(tmp_path)
    assert trainer.reward_funcs[0].packed is None
    assert "not packed: FSDP has partitioned its weights" in caplog.text


MISTAKES = {
    "a sequence sees the one before it": (
        segments,
        "_pieces",
        lambda right: lambda row: (segments.Piece(sum(segment.size for segment in row), ()),),
    ),
    "the score of the wrong token": (
        PackedScores,
        "_last_token",
        lambda right: lambda *args: (right(*args) - 1).clamp(min=0),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_trial_notices(monkeypatch, caplog, mistake):
    place, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong(vars(place)[name]))
    assert scorer_of().packed is None
    assert "gives other scores on shared rows" in caplog.text
