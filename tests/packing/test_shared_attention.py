"""Attention piece by piece equals dense attention under the mask of who sees whom: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dpo_runs
import oracles
import tiny
from dense_attention import dense, real_tokens, tensors
from pair_rows import PAIRS, PER_ROW, batch
from trl_ext.packing import attention
from trl_ext.packing.segments import attention_mask_of, share_prefixes


NAN = attention.placeholder(torch.float64, torch.device("cpu"))


def slow_mask(shared, window=None):
    """Who sees whom, (R, 1, T, T), token by token; a `window` of w tokens ends w - 1 positions before a token."""
    visible = attention_mask_of(shared)
    for row, positions in enumerate(shared.position_ids.tolist()):
        for i, own in enumerate(positions):
            for j, other in enumerate(positions):
                if window is not None and other <= own - window:
                    visible[row, 0, i, j] = False
    return visible


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("per_row", PER_ROW)
def test_mask_with_a_window_counts_positions_of_the_sequence(per_row, window):
    shared = share_prefixes(*batch(PAIRS["all"]), per_row)
    assert (attention_mask_of(shared, window) == slow_mask(shared, window)).all()


def output_and_gradients(function, leaves, real):
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, torch.autograd.grad((output * weights)[real].sum(), leaves)


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("per_row", PER_ROW)
@pytest.mark.parametrize("case", ["all", "plain", "equal", "nothing in common", "rejected goes on"])
def test_pieces_equal_dense_attention(case, per_row, heads, scaling, window):
    shared = share_prefixes(*batch(PAIRS[case]), per_row)
    leaves, real, module = tensors(shared, *heads), real_tokens(shared), nn.Module()

    def pieces(query, key, value):
        asked = {"scaling": scaling, "sliding_window": window, "shared_rows": shared}
        return attention.shared_attention(module, query, key, value, NAN, **asked)[0]

    mask = slow_mask(shared, window)
    output, gradients = output_and_gradients(pieces, leaves, real)
    expected, expected_gradients = output_and_gradients(lambda *qkv: dense(*qkv, mask, scaling), leaves, real)
    torch.testing.assert_close(output[real], expected[real], **oracles.FLOAT64)
    assert (output[~real] == 0).all()
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, **oracles.FLOAT64)


def test_control_a_rejected_token_that_sees_the_chosen_ones_is_noticed():
    shared = share_prefixes(*batch(PAIRS["plain"]))
    leaves = tensors(shared, 2, 2)
    causal = torch.ones(shared.input_ids.size(1), shared.input_ids.size(1)).tril().bool()
    apart = dense(*leaves, causal) - dense(*leaves, attention_mask_of(shared))
    assert apart[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("mask", [True, False])
def test_without_rows_it_is_sdpa(mask):
    query, key, value = torch.randn(3, 2, 2, 5, 4).unbind(0)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    visible = torch.rand(2, 1, 5, 5).add(torch.eye(5)) > 0.5 if mask else None
    output, weights = attention.shared_attention(module, query, key, value, visible)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=not mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


# What is refused


def attend(mask=NAN, keys=None, **kwargs):
    shared = share_prefixes(*batch(PAIRS["plain"]))
    query, key, value = (leaf.detach() for leaf in tensors(shared, 2, 2))
    if keys is not None:
        key, value = key[:, :, :keys], value[:, :, :keys]
    return attention.shared_attention(nn.Module(), query, key, value, mask, shared_rows=shared, **kwargs)[0]


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
    shared = share_prefixes(*batch(PAIRS["all"]), 2)
    leaves = [x.detach().to(getattr(torch, dtype)) for x, dtype in zip(tensors(shared, 2, 2), dtypes, strict=True)]
    mask, real = slow_mask(shared, window), real_tokens(shared)
    asked = {"sliding_window": window, "shared_rows": shared}
    with torch.autocast("cpu", torch.bfloat16):
        output = attention.shared_attention(nn.Module(), *leaves, NAN, **asked)[0]
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
