"""Model families with an attention of their own, tiny."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dpo_runs
from pair_forwards import FIELDS
from trl_ext._trl import add_fused_lm_head


LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

INDEX = LATENT | {"index_n_heads": 2, "index_head_dim": 8}

NEO = {
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 40,
    **dict.fromkeys(("embed_dropout", "resid_dropout", "attention_dropout"), 0.0),
}

ALTERNATING = ["sliding_attention", "full_attention"]

PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}

# Name -> type of config, what it needs beside the usual sizes, and what comes of it: piece by piece, limit of a
# sequence, limit of a row.
FAMILIES = {
    "a window over places of the row": ("gpt_neo", NEO | {"window_size": 16}, (False, None, 16)),
    "a mask over all positions": ("gpt_neo", NEO | {"window_size": 39}, (False, None, 39)),
    "a learnt mask": ("doge", {"keep_window_size": 16, "head_dim": 8}, (False, 16, None)),
    "an index of the best keys": ("deepseek_v32", INDEX | {"index_topk": 16}, (False, 16, None)),
    "sinks": ("gpt_oss", {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4}, (False, None, None)),
    "a window in every layer": ("phi3", {"sliding_window": 6}, (True, None, None)),
    "a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        (True, None, None),
    ),
    "a window too long to try": ("mistral", {"sliding_window": 4096}, (True, None, None)),
    "values narrower than queries": ("deepseek_v3", LATENT, (True, None, None)),
    "heads wider in some layers": (
        "gemma4_text",
        PER_LAYER | {"head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "layer_types": ALTERNATING},
        (True, None, None),
    ),
}


def family_in(name, seed=0):
    """The model of a row of `FAMILIES`, or else of an architecture of `dpo_runs`, before TRL has had it."""
    if name not in FAMILIES:
        return dpo_runs.tiny_model(name, seed)
    return plain_family(*FAMILIES[name][:2], seed=seed)


def family(kind, options, attn_implementation=None):
    """A model of a family with TRL's fused head."""
    model = plain_family(kind, options, attn_implementation)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


def plain_family(kind, options, attn_implementation=None, seed=0):
    """A model of a family, with weights that let every part of it be heard."""
    sizes = dpo_runs.SIZES
    if kind == "gpt_neo":
        sizes = {key: value for key, value in sizes.items() if not key.startswith("num_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(sizes | options))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "dt_proj" in name or name.endswith(".A"):
                parameter.data.normal_(std=0.3)
    return model.float().eval()
