"""Attention piece by piece equals dense attention under the mask of who sees whom: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpo_runs
import oracles
import tiny
from dpo.test_prefix_sharing import PAIRS, PER_ROW, batch
from trl_ext.dpo import attention
from trl_ext.dpo.prefix_sharing import attention_mask_of, share_prefixes


def tensors(shared, heads, key_value_heads, size=4):
    generator = torch.Generator().manual_seed(0)
    rows, width = shared.input_ids.shape
    return [
        torch.randn(rows, count, width, size, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, key_value_heads, key_value_heads)
    ]


def real_tokens(shared):
    """(R, T): True where a row has a token."""
    sizes = torch.tensor([sum(span.size for span in row) for row in shared.rows])
    return torch.arange(shared.input_ids.size(1)) < sizes[:, None]


def dense(query, key, value, mask, scaling=None):
    """Scores between all tokens, softmax over those that are seen, written out."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def output_and_gradients(function, leaves, real):
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, torch.autograd.grad((output * weights)[real].sum(), leaves)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("per_row", PER_ROW)
@pytest.mark.parametrize("case", ["all", "plain", "equal", "nothing in common", "rejected goes on"])
def test_pieces_equal_dense_attention(case, per_row, heads, scaling):
    shared = share_prefixes(*batch(PAIRS[case]), per_row)
    leaves, real, module = tensors(shared, *heads), real_tokens(shared), nn.Module()

    def pieces(query, key, value):
        return attention.shared_attention(module, query, key, value, None, scaling=scaling, shared_rows=shared)[0]

    mask = attention_mask_of(shared)
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


def test_use_changes_a_model_with_sdpa_and_only_such_a_one():
    model, eager = dpo_runs.tiny_model(), dpo_runs.tiny_model(attn_implementation="eager")
    for each in (model, eager):
        attention.use(each)
    assert attention.in_use(model)
    assert not attention.in_use(eager)
    assert eager.config._attn_implementation == "eager"
    attention.stop_using(model)
    assert model.config._attn_implementation == "sdpa"


def test_generation_is_what_it_was():
    """Left-padded prompts, greedy, with a cache."""
    tokenizer = tiny.tiny_tokenizer()
    prompts = tokenizer(["the cat", "what is it of the two books ?"], padding=True, return_tensors="pt")
    model = dpo_runs.tiny_model()
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**prompts, **options)
    attention.use(model)
    after = model.generate(**prompts, **options)
    assert (after.sequences == before.sequences).all()
    for one, other in zip(after.logits, before.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
