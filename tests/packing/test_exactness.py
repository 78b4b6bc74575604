"""The lengths in a config that packed rows must not go beyond, and those that they may."""

import pytest

import dpo_runs
from attention_families import FAMILIES, family
from families.configs import family_config, family_model
from pair_forwards import DYNAMIC
from trl_ext.packing.exactness import is_harmless, length_limit, lengths, why_not_model


def test_lengths_are_the_fields_that_count_tokens():
    config = {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = dpo_runs.tiny_model("mistral", **config)
    assert lengths(model) == [("sliding_window", 6), ("max_position_embeddings", 128)]
    assert is_harmless(model, "max_position_embeddings", 128)
    assert not is_harmless(model, "sliding_window", 6)
    kind, options, _ = FAMILIES["a mask over all positions"]
    assert not is_harmless(family(kind, options), "max_position_embeddings", 40)


@pytest.mark.parametrize(
    "name, overrides, limit", [("llama", {}, None), ("llama", DYNAMIC, 128), ("mistral", {}, None)]
)
def test_length_limit_is_the_length_a_rotary_embedding_was_made_for(name, overrides, limit):
    assert length_limit(dpo_runs.tiny_model(name, **overrides)) == limit


@pytest.mark.parametrize("family", ["roberta", "data2vec-text"])
def test_positions_that_do_not_begin_at_0_are_known(family):
    assert "begins its positions behind that of its pad token" in why_not_model(family_model(family_config(family)))
