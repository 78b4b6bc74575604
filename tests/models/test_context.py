"""The longest sequence a model takes: checked against the model where it fails beyond, by hand elsewhere."""

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

import dpo_runs
import ppo_runs
import tiny
from families.configs import family_config
from trl_ext.models.context import context_limit
from trl_ext.models.sampling import CACHE


# Families with a table of positions: what their config says the length in.
TABLES = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen", "ctrl", "openai-gpt"), "n_positions"),
    **dict.fromkeys(("gpt_neo", "opt", "biogpt", "roberta", "xlm-roberta", "bart"), "max_position_embeddings"),
    "mpt": "max_seq_len",
}


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.filterwarnings("ignore")
def test_model_takes_sequences_up_to_its_limit_and_none_beyond(family):
    of_bart = {"is_encoder_decoder": False} if family == "bart" else {}
    config = family_config(family, **{TABLES[family]: 20}, **of_bart)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    limit = context_limit(config.get_text_config())
    with torch.no_grad():
        assert model(input_ids=torch.full((1, limit), 5), use_cache=False).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5), use_cache=False)


def rope(kind, original=None, **parameters):
    parameters |= {"rope_type": kind, "rope_theta": 1e4}
    return parameters | ({} if original is None else {"original_max_position_embeddings": original})


LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Family, what its config says, and the limit, by hand.
DECLARED = {
    "plain": ("Llama", {"max_position_embeddings": 64}, 64),
    "linear": ("Llama", {"max_position_embeddings": 64, "rope_parameters": rope("linear", factor=4.0)}, 256),
    "dynamic": ("Llama", {"max_position_embeddings": 64, "rope_parameters": rope("dynamic", factor=4.0)}, None),
    "yarn of Qwen2.5's card": (
        "Qwen2",
        {"max_position_embeddings": 64, "rope_parameters": rope("yarn", 64, factor=4.0)},
        256,
    ),
    "yarn that is declared": (
        "DeepseekV3",
        {
            "max_position_embeddings": 160,
            "rope_parameters": rope("yarn", 4, factor=40.0, mscale=1.0, mscale_all_dim=1.0),
        },
        160,
    ),
    "old spelling": ("Qwen2", {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    "Llama 3.1": (
        "Llama",
        {"max_position_embeddings": 128, "rope_parameters": rope("llama3", 8, factor=8.0, **LLAMA_3)},
        128,
    ),
    "longrope": (
        "Phi3",
        {"max_position_embeddings": 131072, "rope_parameters": rope("longrope", 4096, **LONG)},
        131072,
    ),
    "one set per kind of layer": (
        "Gemma3Text",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "sliding_attention": rope("default"),
                "full_attention": rope("linear", factor=8.0),
            },
        },
        512,
    ),
    "rotary Falcon": ("Falcon", {"max_position_embeddings": 64}, 64),
    "ALiBi": ("Falcon", {"max_position_embeddings": 64, "alibi": True}, None),
    "Bloom": ("Bloom", {}, None),
    "no end": ("XLNet", {}, None),
    "no end, written large": ("Llama", {"max_position_embeddings": int(1e30)}, None),
    "a state": ("Mamba", {}, None),
}


@pytest.mark.parametrize("case", DECLARED)
@pytest.mark.filterwarnings("ignore")
def test_limit_is_what_the_config_declares(case):
    family, options, expected = DECLARED[case]
    assert context_limit(getattr(transformers, f"{family}Config")(**options)) == expected


def test_virtual_tokens_take_positions():
    config = tiny.tiny_config(max_position_embeddings=20)
    adapters = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), LoraConfig()
    assert context_limit(config, *adapters) == 17


ACCEPTED = {
    "yarn": ("qwen2", {"rope_parameters": rope("yarn", 12, factor=4.0), "max_position_embeddings": 12}),
    "dynamic": ("llama", {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 12}),
    "ALiBi": ("falcon_alibi", {"max_position_embeddings": 12}),
}


@pytest.mark.integration
@pytest.mark.parametrize("case", ACCEPTED)
def test_dpo_trains_beyond_max_position_embeddings_where_that_is_no_limit(tmp_path, case):
    name, options = ACCEPTED[case]
    trainer = dpo_runs.dpo_run(
        tmp_path, {"model": dpo_runs.tiny_model(name, **options), "ref_model": None}, max_steps=1
    )
    rows = trainer.train_dataset
    assert max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows) > 12
    assert dpo_runs.lines(trainer)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_ppo_takes_prompts_beyond_max_position_embeddings_where_that_is_no_limit(tmp_path):
    """But not where keys in the cache would have another rotation than those that are scored."""
    for parameters in (None, rope("dynamic", factor=4.0)):
        actor = tiny.tiny_actor(max_position_embeddings=8, rope_parameters=parameters)
        with pytest.raises(ValueError, match="does not fit the model's context of 8"):
            ppo_runs.ppo_trainer(tmp_path, {"model": actor})
    actor = tiny.tiny_actor(max_position_embeddings=8, rope_parameters=rope("yarn", 8, factor=4.0))
    ppo_runs.ppo_trainer(tmp_path, {"model": actor})


@torch.no_grad()
def test_embedding_that_adapts_to_the_length_scores_other_than_it_generates():
    """The reason for PPO's limit; within it both are the same."""
    model = tiny.tiny_actor(max_position_embeddings=8, rope_parameters=rope("dynamic", factor=4.0)).eval()
    for length, same in ((8, True), (14, False)):
        ids = torch.arange(5, 5 + length)[None]
        whole, cache, by_token = model(input_ids=ids).logits, None, []
        for t in range(length):
            step = model(input_ids=ids[:, t : t + 1], use_cache=True, **{CACHE: cache})
            cache = getattr(step, CACHE)
            by_token.append(step.logits)
        assert torch.allclose(torch.cat(by_token, dim=1), whole, atol=1e-5) == same
