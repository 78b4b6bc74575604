"""How far rounding moves a model's answers, in the arithmetic that it computes with; and what it is asked about."""

import pytest
import torch

import dpo_runs
from pair_forwards import both
from trl_ext.models.probe import arithmetic, ordinary_tokens, rounded_once
from trl_ext.packing import probe


def test_rounding_is_that_of_the_numbers_computed_with():
    model = both("llama")[1]
    batch = probe.pairs(model, [(4, 3, 2)])
    plain = model(**vars(batch), fused_lm_head=True, use_cache=False).log_probs
    apart = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert arithmetic(model) == dtype
            with rounded_once(model, torch.finfo(dtype).eps):
                rounded = model(**vars(batch), fused_lm_head=True, use_cache=False).log_probs
        apart[dtype] = (rounded - plain).abs().max().item()
    assert apart[torch.float32] < 1e-4 < 1e-3 < apart[torch.bfloat16]
    again = model(**vars(batch), fused_lm_head=True, use_cache=False).log_probs
    assert (again == plain).all()


@pytest.mark.parametrize("weight", [torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_are_read_in_16_bits(weight):
    model = dpo_runs.tiny_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=weight), requires_grad=False)
    assert arithmetic(model) == torch.bfloat16
    assert arithmetic(dpo_runs.tiny_model().double()) == torch.float64


def test_trial_rows_hold_ordinary_tokens_only():
    """No padding, and no place of an image, whose features would be asked for."""
    model = dpo_runs.tiny_model()
    model.config.image_token_id = 7
    model.config.eos_token_id = [2, 9]
    assert ordinary_tokens(model).tolist() == sorted(set(range(64)) - {0, 1, 2, 7, 9})
