"""Samples of `generate` with and without what counts for nothing: the same from the same random numbers."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import tiny
from trl_ext.models import sampling
from trl_ext.models.sampling import sampling_what_counts, why_not_from_cache


SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "phi3": {"sliding_window": 8},
}
CONFIG = GenerationConfig(
    max_new_tokens=30, do_sample=True, temperature=0.9, top_k=0, pad_token_id=0, eos_token_id=[2, 3], use_cache=True
)


def model_of(family):
    own = {name: value for name, value in SIZES.items() if family != "gpt2" or not name.startswith(("num_", "head"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(own | FAMILIES[family]))).eval()


def prompts(repeats):
    """Five prompts padded on the left, each `repeats` times."""
    ids = torch.randint(4, 24, (5, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :15], mask[1, :10], mask[2, :11] = 0, 0, 0
    return {
        "input_ids": (ids * mask).repeat_interleave(repeats, 0),
        "attention_mask": mask.repeat_interleave(repeats, 0),
    }


def sampled(model, config=CONFIG, repeats=1, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model.generate(**prompts(repeats), generation_config=config, **kwargs)


def sizes_of_calls(model):
    """Rows and tokens per row of every call of the trunk, in the list."""
    sizes = []

    def note(module, args, kwargs):
        sizes.append(tuple((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_generate(family, repeats):
    model = model_of(family)
    assert why_not_from_cache(model.base_model) is None
    expected = sampled(model, repeats=repeats)
    sizes = sizes_of_calls(model)
    with sampling_what_counts(model, model.base_model, CONFIG):
        samples = sampled(model, repeats=repeats)
    assert torch.equal(samples, expected)
    rows = [count for count, _ in sizes]
    assert sizes[:3] == [(2, 8), (2, 19), (1, 19)]  # a prompt once, with others of its length
    ended = (torch.isin(expected[:, 20:], torch.tensor([2, 3])).cumsum(1) > 0)[:, :-1].float().mean(0)
    assert ended.max() >= 0.25
    assert min(rows[3:]) < 5 * repeats


def test_prompts_are_read_in_the_arithmetic_of_the_models_forward():
    """accelerate wraps a model's forward in autocast, and the trunk is called without it."""
    model, dtypes = model_of("llama"), set()
    in_16_bits = partial(torch.autocast, "cpu", torch.bfloat16)
    model.forward = in_16_bits()(model.forward)

    def note(module, args, output):
        dtypes.add(output.dtype)

    model.base_model.layers[0].mlp.register_forward_hook(note)
    with sampling_what_counts(model, model.base_model, CONFIG, in_16_bits):
        sampled(model, repeats=2)
    assert dtypes == {torch.bfloat16}


def test_generate_that_was_set_on_the_model_is_back_afterwards():
    model = model_of("llama")
    model.generate = own = partial(model.generate)
    with sampling_what_counts(model, model.base_model, CONFIG):
        assert model.generate is not own
    assert model.generate is own


def test_other_calls_are_left_alone():
    model = model_of("llama")
    expected = sampled(model, max_new_tokens=3), sampled(model, GenerationConfig(max_new_tokens=3, pad_token_id=0))
    with sampling_what_counts(model, model.base_model, CONFIG):
        got = sampled(model, max_new_tokens=3), sampled(model, GenerationConfig(max_new_tokens=3, pad_token_id=0))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert "generate" not in vars(model)


def test_probabilities_that_are_not_finite_stop_the_sampling():
    model = model_of("llama")
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with (
        sampling_what_counts(model, model.base_model, CONFIG),
        pytest.raises(RuntimeError, match="probability tensor"),
    ):
        sampled(model)


def test_mistakes_are_noticed(monkeypatch):
    """Noise for none but the rows that are left gives other samples."""
    model = model_of("gpt2")
    expected = sampled(model, repeats=2)
    with monkeypatch.context() as patch, sampling_what_counts(model, model.base_model, CONFIG):
        patch.setattr(sampling, "WASTE", 2.0)  # nothing leaves the batch: still the same
        assert torch.equal(sampled(model, repeats=2), expected)
    noise = sampling._Noise.__call__

    def of_those_left(self, ids, scores):
        self.count, self.rows = len(scores), torch.arange(len(scores))
        return noise(self, ids, scores)

    monkeypatch.setattr(sampling._Noise, "__call__", of_those_left)
    with sampling_what_counts(model, model.base_model, CONFIG):
        assert not torch.equal(sampled(model, repeats=2), expected)


def test_trunk_without_such_a_cache_is_left_alone(monkeypatch):
    trunk = model_of("llama").base_model
    original = sampling._of_prompts

    def of_a_later_position(*args):
        cache = original(*args)
        for layer in cache.layers:
            layer.keys = layer.keys.roll(1, dims=2)
        return cache

    monkeypatch.setattr(sampling, "_of_prompts", of_a_later_position)
    assert "states differ" in why_not_from_cache(trunk)
    monkeypatch.setattr(sampling, "DynamicCache", lambda config: None)
    assert "AttributeError" in why_not_from_cache(tiny.tiny_actor().base_model)
