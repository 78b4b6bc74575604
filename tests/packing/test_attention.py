"""Attention piece by piece equals dense attention under the mask of who sees whom: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dpo_runs
import oracles
import segment_trees as trees
import tiny
from dense_attention import dense, output_and_gradients, tensors
from trl_ext.packing import attention, segments
from trl_ext.packing.segments import attention_mask_of


NAN = attention.placeholder(torch.float64, torch.device("cpu"))
HEADS = [(2, 2), (4, 2), (3, 1)]


def assert_equal_dense_attention(rows, heads=(4, 2), scaling=None, window=None, softcap=None, has_sinks=False):
    leaves, real = tensors(rows, *heads), trees.real_tokens(rows)
    if has_sinks:
        leaves.append(torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_())

    def pieces(query, key, value, sinks=None):
        asked = {"scaling": scaling, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
        asked |= {"packed_rows": rows, "is_eager": softcap is not None or has_sinks}
        output = attention.packed_attention(nn.Module(), query, key, value, NAN, **asked)[0]
        assert (output[~real] == 0).all()
        return output

    def expected(query, key, value, sinks=None):
        return dense(query, key, value, attention_mask_of(rows, window), scaling, softcap, sinks)

    both = (output_and_gradients(way, leaves, real) for way in (pieces, expected))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **oracles.FLOAT64)


CAPS = st.sampled_from([None, 0.5])


@trees.some_examples
@given(trees.trees(), st.sampled_from(HEADS), st.sampled_from([None, 0.7]), trees.windows, CAPS, st.booleans())
def test_pieces_of_any_trees_equal_dense_attention(rows, heads, scaling, window, softcap, has_sinks):
    assert_equal_dense_attention(rows, heads, scaling, window, softcap, has_sinks)


PAIRS = trees.packed(trees.side_by_side(trees.pair(3, 2, 1), trees.pair(5, 2, 2)), padding=1)


def test_pairs_take_one_call_for_each_sequence_and_no_copy_of_the_chosen_one(monkeypatch):
    """The common part and the chosen one are attended to in one call, of which only the keys that are shared recur."""
    sizes, sdpa = [], F.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        sizes.append((query.size(2), key.size(2)))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention.pieces(*tensors(PAIRS, 2, 2), PAIRS)
    assert sizes == [(5, 5), (1, 4), (7, 7), (2, 7)]


def without_ancestors(row):
    return tuple(segments.Piece(piece.size, ()) for piece in segments._pieces(row))


def seeing_siblings(row):
    """Every piece sees the whole of its parent's piece."""
    pieces = segments._pieces(row)
    return tuple(segments.Piece(size, tuple((j, pieces[j].size) for j, _ in before)) for size, before in pieces)


@pytest.mark.parametrize("mistake", [without_ancestors, seeing_siblings])
def test_control_a_mistake_in_the_pieces_is_noticed(mistake):
    fresh = trees.packed(*PAIRS.rows, padding=1)
    fresh.__dict__["pieces"] = tuple(map(mistake, fresh.rows))
    with pytest.raises(AssertionError):
        assert_equal_dense_attention(fresh)


def test_control_a_window_one_token_wider_is_noticed(monkeypatch):
    causal = attention._causal
    wider = lambda *args: causal(*args[:4], args[4] + 1, *args[5:])  # noqa: E731
    monkeypatch.setattr(attention, "_causal", wider)
    with pytest.raises(AssertionError):
        assert_equal_dense_attention(PAIRS, window=2)


@pytest.mark.parametrize("mask", [True, False])
def test_without_rows_it_is_sdpa(mask):
    query, key, value = torch.randn(3, 2, 2, 5, 4).unbind(0)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    visible = torch.rand(2, 1, 5, 5).add(torch.eye(5)) > 0.5 if mask else None
    output, weights = attention.packed_attention(module, query, key, value, visible)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=not mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


# What is refused


def attend(mask=NAN, keys=None, **kwargs):
    rows = trees.packed(trees.pair(3, 2, 1))
    query, key, value = (leaf.detach() for leaf in tensors(rows, 2, 2))
    if keys is not None:
        key, value = key[:, :, :keys], value[:, :, :keys]
    return attention.packed_attention(nn.Module(), query, key, value, mask, packed_rows=rows, **kwargs)[0]


@pytest.mark.parametrize(
    "name", ["s_aux", "sinks", "position_bias", "softcap", "head_mask", "indices", "block_indices", "another", "cache"]
)
def test_an_argument_that_is_not_understood_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"Module passes `{name}` to its attention"):
        attend(**{name: torch.ones(2)})
    attend(**{name: None})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"sliding_window": (4, 4)}, r"`sliding_window=\(4, 4\)`; a number of tokens is understood"),
        ({"sliding_window": 0}, "`sliding_window=0`"),
        ({"sliding_window": True}, "`sliding_window=True`"),
        ({"is_causal": False}, "attends to later tokens too"),
        ({"dropout": 0.1}, "passes `dropout`"),
        ({"mask": None}, "a mask of its own"),
        ({"mask": torch.ones(1, 1, 6, 6).bool()}, "a mask of its own"),
        ({"keys": 4}, "attends over 4 keys in rows of 6 tokens"),
    ],
)
def test_an_attention_of_another_kind_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attend(**kwargs)


def test_a_cap_and_sinks_are_read_where_the_eager_attention_reads_them():
    sinks = torch.zeros(2, dtype=torch.float64)
    for asked in ({"softcap": 0.1}, {"s_aux": sinks}):
        assert not torch.allclose(attend(is_eager=True, **asked), attend())


def test_what_changes_nothing_is_passed():
    harmless = {"position_ids": torch.arange(6), "use_cache": False, "is_causal": True, "dropout": 0.0}
    assert (attend(**harmless) == attend()).all()


def test_who_reads_the_placeholder_gets_nan():
    query = torch.randn(1, 2, 6, 4)
    mask = attention.placeholder(torch.float32, query.device)
    assert F.scaled_dot_product_attention(query, query, query, attn_mask=mask).isnan().all()


# In 16 bits


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtypes", [("float32", "float32", "bfloat16"), ("float32",) * 3, ("bfloat16",) * 3])
def test_pieces_are_cast_as_autocast_casts_for_sdpa(dtypes, window):
    """Rotary embeddings leave queries and keys in float32."""
    leaves = [x.detach().to(getattr(torch, dtype)) for x, dtype in zip(tensors(PAIRS, 2, 2), dtypes, strict=True)]
    mask, real = attention_mask_of(PAIRS, window), trees.real_tokens(PAIRS)
    asked = {"sliding_window": window, "packed_rows": PAIRS}
    with torch.autocast("cpu", torch.bfloat16):
        output = attention.packed_attention(nn.Module(), *leaves, NAN, **asked)[0]
        expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask).transpose(1, 2)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output[real], expected[real], rtol=1e-2, atol=1e-2)


def test_generation_is_what_it_was(monkeypatch):
    """Left-padded prompts, greedy, with a cache."""
    tokenizer = tiny.tiny_tokenizer()
    prompts = tokenizer(["the cat", "what is it of the two books ?"], padding=True, return_tensors="pt")
    model = dpo_runs.tiny_model()
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    before = model.generate(**prompts, **options)
    monkeypatch.undo()
    after = model.generate(**prompts, **options)
    assert (after.sequences == before.sequences).all()
    for one, other in zip(after.logits, before.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
