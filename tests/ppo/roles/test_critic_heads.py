"""Classifiers whose head is no critic's: they read another token than the last."""

import pytest
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
)

import ppo_runs
import tiny


pytestmark = pytest.mark.integration

SIZES = {"vocab_size": len(tiny.VOCABULARY), "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize("bf16", [False, True])
def test_classifier_that_reads_the_first_token_is_refused_as_a_critic(tmp_path, bf16):
    config = RobertaConfig(**SIZES, num_hidden_layers=1, num_labels=1, is_decoder=True, initializer_range=0.2)
    models = {"value_model": RobertaForSequenceClassification(config)}
    with pytest.raises(ValueError, match=r"RobertaForSequenceClassification.*reads other tokens than the last"):
        ppo_runs.ppo_run(tmp_path, models, critic="model", bf16=bf16, use_cpu=True)
