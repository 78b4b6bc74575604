"""What is tried out before rows are shared: families whose attention reads more than who sees whom, and roundings."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dpo_runs
from attention_families import FAMILIES, family
from families.configs import family_config, family_model
from pair_forwards import assert_equal, both, scored
from trl_ext._trl import add_fused_lm_head
from trl_ext.dpo.forward import PairForward
from trl_ext.packing import attention, probe


def pairs_of(sizes):
    return vars(probe.pairs(dpo_runs.tiny_model(), sizes))


BATCHES = {
    "short": pairs_of([(3, 2, 3)] * 2),
    "long rows": pairs_of([(4, 6, 5)] * 4),
    "long sequences": pairs_of([(8, 12, 10), (2, 20, 22)]),
    "long common parts": pairs_of([(20, 4, 5), (24, 3, 4)]),
}


EAGER = ["a window in some layers", "heads wider in some layers"]


@pytest.mark.parametrize(
    "name, implementation", [*((name, None) for name in FAMILIES), *((name, "eager") for name in EAGER)]
)
def test_family_with_an_attention_of_its_own_is_scored_as_trl_does(name, implementation):
    """In batches below, at and beyond every length of its config, also those where TRL's rows are taken."""
    kind, options, expected = FAMILIES[name]
    theirs, ours = (family(kind, options, implementation) for _ in range(2))
    pairs = PairForward(ours)
    assert pairs.pack() is None
    found = pairs.packing.piecewise, pairs.packing.limit, pairs.packing.row_limit
    assert found == expected
    for batch in BATCHES.values():
        assert_equal(scored(ours, batch), scored(theirs, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_its_own_attention_back_outside_shared_rows(name, monkeypatch):
    """Logits and loss, after batches in shared rows, bit by bit: those of a model and an SDPA that are left alone."""
    kind, options, _ = FAMILIES[name]
    untouched, ours = family(kind, options), family(kind, options)
    PairForward(ours).pack()
    scored(ours, BATCHES["short"])
    inputs = {key: BATCHES["long sequences"][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        got = ours(**inputs, labels=inputs["input_ids"])
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
        expected = untouched(**inputs, labels=inputs["input_ids"])
    assert ours.config._attn_implementation == untouched.config._attn_implementation
    assert (got.logits == expected.logits).all()
    assert got.loss == expected.loss


def test_a_window_that_the_model_does_not_pass_on_is_found_out(monkeypatch):
    """The layers' attention does not hear of it: sequences within the window alone are shared."""

    def deaf(*args, sliding_window=None, **kwargs):
        return attention.packed_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", deaf)
    _, _, pairs = both("mistral_short_window")
    assert pairs.pack() is None
    assert (pairs.packing.piecewise, pairs.packing.limit) == (True, 6)
    _, ours, pairs = both("mistral", sliding_window=4096)
    assert pairs.pack() is None
    assert (pairs.packing.piecewise, pairs.packing.limit) == (True, 4096)
    assert ours.config.sliding_window == 4096  # after the trial


# How far apart rounding alone sets two ways


PRECISIONS = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float16, False),
]


@pytest.mark.parametrize("weights, autocast", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2", "stablelm"])
def test_probe_passes_what_is_exact_in_every_precision(name, weights, autocast):
    model = both(name)[0].to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert PairForward(model).pack() is None


@pytest.mark.parametrize("weights, autocast", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probe_finds_a_fault_of_less_than_a_tenth_of_a_nat(name, weights, autocast, monkeypatch):
    """Scores too large by a twentieth; with weights in 16 bits, whose rounding is 0.005 nats and more, by half."""
    pieces, factor = attention.pieces, 1.05 if weights == torch.float32 else 1.5
    _, model, pairs = both(name, **({"initializer_range": 0.1} if name == "llama" else {}))
    model.to(weights)
    off = []
    apart = probe._apart
    monkeypatch.setattr(probe, "_apart", lambda *args: off.append(apart(*args)) or off[-1])
    monkeypatch.setattr(attention, "pieces", lambda query, *args: pieces(query * factor, *args))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pairs.pack()
    assert off[0] < 0.1
    assert not pairs.packing.piecewise  # with a mask instead


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_limit_of_a_learnt_mask_is_found_whatever_the_weights(seed):
    """Each pair beyond the limit may come out right by chance; which do depends on the weights and the processor."""
    kind, options, _ = FAMILIES["a learnt mask"]
    model = family_model(family_config(kind, **options), seed)
    add_fused_lm_head(model)
    pairs = PairForward(model)
    assert pairs.pack() is None
    assert pairs.packing.limit == model.config.keep_window_size == 16
