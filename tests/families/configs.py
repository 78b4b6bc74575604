"""
A tiny random model of every causal language model family that transformers has.

A config is built from its fields: what a field is called says how small it can be; `SPECIAL` has what names do not
say. Windows, chunks, blocks and top-k are shorter than the proofs' rows, so that these reach beyond each of them.
"""

import copy
import functools
import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tiny


LAYERS = 4
LARGEST = 3_000_000  # parameters; a larger model has a size that its names do not tell

# What a field's name says about its size; the first that fits the whole name counts.
SIZES: list[tuple[str, Any]] = [
    (r"(decoder_|unpadded_)?vocab_size(_per_layer_input)?|ngram_vocab_size_base", len(tiny.VOCABULARY)),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    # windows, chunks, blocks, top-k
    (r"(.*_)?window(_size)?|sliding_window_size|attention_window_size", 6),
    (r"(.*_)?chunk_size|(index_)?block_size", 8),
    (r"index_topk|indexer_budget|rel_extent", 8),
    (r"index_topk_blocks", 2),
    # widths
    (r"hidden_size|d_model|n_embd|emb(edding)?_dim|(input_|output_)?embedding_size|lru_width", 32),
    (r"word_embed_proj_dim", 16),
    (r"attention_hidden_size", 32),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|d?ff|dim_ff|feed_forward_size|n_inner|d_inner", 48),
    (r"router_hidden_size|hidden_size_per_layer_input", 8),
    # depths
    (r"num_hidden_layers|num_layers|n_layers?|num_(de|en)coder_layers|(de|en)coder_layers|num_blocks", LAYERS),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # heads
    (r"index_n_heads", 16),  # with fewer, scores are often 0, and rounding decides which of them are highest
    (r"linear_num_key_heads|mamba_n_groups|n_groups", 2),
    (r"(.*_)?num_key_value_heads|num_kv_heads", 2),
    (r"(.*_)?attention_heads|n_heads?|num_heads|mamba_n(um)?_heads?|mamba_n_heads|linear_num_value_heads", 4),
    (r"index_head_dim|mamba_d_head|mamba_head_?dim", 16),
    (r"qk_head_dim", 16),
    (r"(.*_)?head_dim|kv_channels|dim_head|d_head|rotary_dim", 8),
    (r"(kv|q|o)_lora_rank|laurel_rank|mamba_d_ssm", 16),
    # experts
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|(num|n|moe_num)_shared_experts", 1),
    # states
    (r"state_size|ssm_state_size|mamba_d_state", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 128),
    (r"initializer_range|init_std", 0.2),
    # what comes after the head; never 1, so that it shows where it is forgotten
    (r"logit_scale|logits_scaling|logits_mup_width_multiplier|lm_head_multiplier", 0.5),
    (r"final_logit_softcapping|(output_)?logits?_soft_cap", 3.0),
]
# Sizes that are also set where they are not: the rest of `None` is a choice.
MAY_BE_NONE = (
    r"head_dim|num_key_value_heads|n_routed_experts|n_shared_experts|num_experts_per_tok|(n|topk)_group|"
    r".*_token_id|logit_scale"
)

NOISE = r".*dropout.*|.*_pdrop|.*layerdrop|.*jitter_noise"  # rates of noise in training

_ALTERNATE = ["linear_attention", "full_attention"] * (LAYERS // 2)
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _ALTERNATE},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffllama": {"attention_dropout": 0.0},  # it refuses any other
    "dots3_note_text": {"per_layer_config": {"01": {"kv_lora_rank": 32}, "03": {"kv_lora_rank": 32}}, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}}},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": _ALTERNATE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "heads_per_ngram": 2,
        "ple_embed_dim": 8,
        "hc_count": 2,
        "hc_lowrank": 8,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
    },
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "reformer": {"axial_pos_embds": False},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The families of this transformers, by `model_type`."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def family_config(family: str, noise: float = 0.0, **overrides: Any) -> PreTrainedConfig:
    """A tiny config of a family; `noise` is the rate of every dropout and jitter."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    if default.get_text_config() is not default:
        raise ValueError(f"a model of several parts, whose text part is `{default.get_text_config().model_type}`")
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if re.fullmatch(NOISE, name) and isinstance(value, float):
            options[name] = noise
        elif re.fullmatch(r"(.*_)?layer_types|layers_block_type|indexer_types", name) and value:
            kinds = sorted(set(value), key=value.index)
            options[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif name == "is_decoder":
            options[name] = True
        elif not isinstance(value, (bool, dict)):
            of_name = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if of_name is not None and (value is not None or re.fullmatch(MAY_BE_NONE, name)):
                options[name] = of_name
    if "kv_lora_rank" in options:  # every head has its own key and value
        options["num_key_value_heads"] = options["num_attention_heads"]
    return kind(**(options | SPECIAL.get(family, {}) | overrides))


def family_model(config: PreTrainedConfig, seed: int = 0, of: Any = None) -> nn.Module:
    """A model in float32 and evaluation mode, causal unless `of` another class. The seed alone decides its weights."""
    _require_tiny(config)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = (of or AutoModelForCausalLM).from_config(config, dtype=torch.float32)
        _fill_zeros(model)
    return model.eval()


@torch.no_grad()
def _fill_zeros(model: nn.Module) -> None:
    """What is 0 at the start would hide its part: biases, the pad token's embedding, and some families' own."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or not parameter.any():
            parameter += 0.05 * torch.randn(parameter.shape)
        elif parameter.dim() == 2 and not parameter.any(dim=1).all():
            parameter += 0.2 * torch.randn(parameter.shape) * ~parameter.any(dim=1, keepdim=True)


def _require_tiny(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        size = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters()
        )
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: a size of its config is not understood")


@functools.cache
def _built(family: str, seed: int, noise: float, of: Any) -> nn.Module:
    config = family_config(family, noise)
    if of is AutoModelForSequenceClassification:
        config.num_labels = 1
    return family_model(config, seed, of)


def member(family: str, seed: int, noise: float = 0.0, of: Any = None) -> nn.Module:
    """A new copy of a family's model, the same weights at every `noise`; a classifier (`of`) has one label."""
    model = copy.deepcopy(_built(family, seed, noise, of))
    if noise:
        model.load_state_dict(_built(family, seed, 0.0, of).state_dict())
    return model
