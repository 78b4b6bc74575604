"""Pairs scored over shared rows equal TRL's fused forward, field by field and in the gradient, by architecture."""

import re

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dpo_runs
from pair_forwards import DYNAMIC, assert_equal, both, scored
from trl_ext.packing import forward
from trl_ext.packing.segments import PackedRows


# StableLM calls SDPA itself: it does not go piece by piece, but reads a mask.
SHARED = ["llama", "qwen2", "qwen3", "mistral", "mistral_short_window", "gemma2", "gpt2", "opt", "mixtral", "stablelm"]
BY_A_MASK = {"stablelm"}
REFUSED = {
    "bloom": "takes no `position_ids`|ALiBi",
    "falcon_alibi": "biases attention by the distance in the row",
    "mamba": "takes no `position_ids`|state-space",
    "qwen3_next": "is recurrent .*linear_attention",
}


def spy_on_rows(monkeypatch):
    """The rows of all packed batches from here on."""
    rows, pack = [], forward.pack

    def keep(*args):
        rows.append(pack(*args))
        return rows[-1]

    monkeypatch.setattr(forward, "pack", keep)
    return rows


@pytest.mark.parametrize("name", SHARED)
def test_shared_rows_score_what_trl_scores(name, monkeypatch):
    batch = dpo_runs.batch_of(dpo_runs.random_pairs())
    theirs, ours, pairs = both(name, **({"attn_implementation": "sdpa"} if name == "stablelm" else {}))
    assert pairs.pack() is None
    assert pairs.packing.on
    assert pairs.packing.piecewise != (name in BY_A_MASK)
    rows, fused = spy_on_rows(monkeypatch), pairs._fused_forward
    shapes = []
    pairs._fused_forward = lambda **kwargs: shapes.append(kwargs["input_ids"].shape) or fused(**kwargs)
    assert_equal(scored(ours, batch), scored(theirs, batch))
    assert shapes == [rows[0].input_ids.shape]
    assert rows[0].input_ids.size(0) == (4 if name in BY_A_MASK else 1)
    assert pairs.packing.limit is pairs.packing.row_limit is None  # windows of 6 and of 64 tokens, too


def test_shared_rows_give_way_only_in_batches_beyond_the_limit():
    """The sequences of this batch have at most 6 tokens; one more and TRL's layout is taken."""
    theirs, ours, pairs = both("llama", max_position_embeddings=6, **DYNAMIC)
    assert pairs.pack() is None
    assert pairs.packing.limit == 6
    calls, fused = [], pairs._fused_forward
    pairs._fused_forward = lambda **kwargs: calls.append("position_ids" in kwargs) or fused(**kwargs)
    for length, shared in ((6, True), (7, False)):
        ids = list(range(10, 10 + length))
        batch = dpo_runs.batch_of([(ids, [*ids[:3], 50], 3), (ids[:4], [*ids[:2], 51], 2)])
        assert_equal(scored(ours, batch), scored(theirs, batch))
        assert calls.pop() is shared


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_without_sharing_the_completions_alone_are_scored_and_nothing_changes(name):
    batch = dpo_runs.batch_of(dpo_runs.random_pairs())
    theirs, ours, _ = both(name)
    assert_equal(scored(ours, batch), scored(theirs, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_with_padding_to_a_multiple_or_on_the_left_is_scored_as_trl_does(name):
    batch = dpo_runs.batch_of(dpo_runs.random_pairs())
    wider = {key: torch.nn.functional.pad(v, (0, 5), value=-100 * (key == "labels")) for key, v in batch.items()}
    left = {key: value.flip(1) for key, value in wider.items()}  # then tokens stand behind their padding
    theirs, ours, pairs = both(name)
    pairs.pack()
    assert_equal(scored(ours, wider), scored(theirs, wider))
    assert_equal(scored(ours, left), scored(theirs, left))


def test_a_batch_of_which_nothing_is_scored_stays_connected():
    batch = dpo_runs.batch_of(dpo_runs.random_pairs())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    _, ours, pairs = both("llama")
    pairs.pack()
    output, gradients = scored(ours, batch)
    assert (output.log_probs == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


# What is refused, by name


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_no_mask_can_mend_is_refused_by_name_and_scored_as_trl_does(name):
    theirs, ours, pairs = both(name)
    reason = pairs.pack()
    assert not pairs.packing.on
    assert type(ours).__name__ in reason
    assert re.search(REFUSED[name], reason), reason
    assert not pairs.packing.piecewise
    batch = dpo_runs.batch_of(dpo_runs.random_pairs())
    assert_equal(scored(ours, batch), scored(theirs, batch))


def test_other_attention_is_refused_by_name():
    _, ours, pairs = both("llama")
    ours.config._attn_implementation = "flash_attention_2"
    assert "this model's is `flash_attention_2`" in pairs.pack()


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_probe_alone_would_refuse_what_the_list_explains(name, monkeypatch):
    """The list explains, the probe decides: without the list it finds the difference, or cannot run."""
    monkeypatch.setattr(forward, "why_not_model", lambda model: None)
    _, _, pairs = both(name)
    assert pairs.pack() is not None


def test_probe_refuses_an_attention_that_lets_the_rejected_tokens_see_the_chosen_ones(monkeypatch):
    def leaky(module, query, key, value, attention_mask, scaling=None, packed_rows=None, **kwargs):
        visible = torch.ones(query.size(2), query.size(2)).tril().bool()
        mask = attention_mask if packed_rows is None else visible
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", leaky)
    _, _, pairs = both("llama")
    assert pairs.pack() is None  # with a mask over the row instead
    assert not pairs.packing.piecewise
    monkeypatch.setattr(
        forward, "attention_mask_of", lambda rows, window: torch.ones(1, 1, *2 * rows.input_ids.shape[1:]) > 0
    )
    _, _, pairs = both("llama")
    reason = pairs.pack()
    assert reason.count("gives other log-probabilities on shared rows") == 2  # piece by piece, and with a mask
    assert not pairs.packing.on


def test_probe_refuses_wrong_positions(monkeypatch):
    """A row numbered from end to end, as a model does that ignores `position_ids`."""
    monkeypatch.setattr(
        PackedRows,
        "position_ids",
        property(lambda rows: torch.arange(rows.input_ids.size(1))[None] + 0 * rows.input_ids),
    )
    _, _, pairs = both("gpt2")
    assert "gives other log-probabilities" in pairs.pack()


def test_probe_says_when_the_model_itself_is_broken():
    _, ours, pairs = both("llama")
    ours.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN before it has been trained here"):
        pairs.pack()


def test_probe_takes_an_exception_as_a_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(forward, "pack", broken)
    _, _, pairs = both("llama")
    assert "cannot be run on shared rows (RuntimeError: no such kernel)" in pairs.pack()


def test_probe_leaves_mode_and_generator_as_they_were():
    _, ours, pairs = both("llama")
    ours.train()
    state = torch.get_rng_state()
    pairs.pack()
    assert ours.training
    assert (torch.get_rng_state() == state).all()
