"""Model families with an attention of their own, tiny."""

import dpo_runs
from families.configs import family_config, family_model
from pair_forwards import FIELDS
from trl_ext._trl import add_fused_lm_head


# Name -> type of config, what it has beside the usual sizes, and what comes of it: piece by piece, limit of a
# sequence, limit of a row.
FAMILIES = {
    "a window over places of the row": ("gpt_neo", {"window_size": 16}, (False, None, 16)),
    "a mask over all positions": ("gpt_neo", {"window_size": 39, "max_position_embeddings": 40}, (False, None, 39)),
    "a learnt mask": ("doge", {"keep_window_size": 16}, (False, 16, None)),
    "an index of the best keys": ("deepseek_v32", {"index_topk": 16, "index_n_heads": 2}, (False, 16, None)),
    "sinks": ("gpt_oss", {}, (True, None, None)),
    "sinks in some layers": ("mimo_v2_flash", {}, (True, None, None)),
    "a cap on scores": ("gemma2", {"attn_logit_softcapping": 1.0}, (True, None, None)),
    "a window in every layer": ("phi3", {"sliding_window": 6}, (True, None, None)),
    "a window in some layers": (
        "qwen2",
        {"sliding_window": 6, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
        (True, None, None),
    ),
    "a window too long to try": ("mistral", {"sliding_window": 4096}, (True, None, None)),
    "values narrower than queries": ("deepseek_v3", {"v_head_dim": 6}, (True, None, None)),
    "heads wider in some layers": ("gemma4_text", {}, (True, None, None)),
}


def family_in(name, seed=0):
    """The model of a row of `FAMILIES`, or else of an architecture of `dpo_runs`, before TRL has had it."""
    if name not in FAMILIES:
        return dpo_runs.tiny_model(name, seed)
    kind, options, _ = FAMILIES[name]
    return family_model(family_config(kind, **options), seed)


def family(kind, options, attn_implementation=None):
    """A model of a family with TRL's fused head."""
    config = family_config(kind, **options)
    config._attn_implementation = attn_implementation
    model = family_model(config)
    add_fused_lm_head(model, outputs=FIELDS)
    return model
