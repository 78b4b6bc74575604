"""
Hold the published configs of models that people name, and find the one that a name means.

Each line has the numbers of the model's public config.json, by transformers' names; `counts.json` beside this file has
what `counting.py` counts in the models that transformers builds from them:

    python -m trl_ext.planner.counting    # writes counts.json anew, after a change of these lines

The numbers were read in the copies of these configs that Lightning-AI/litgpt (litgpt/config.py) and
AI-Hypercomputer/maxtext (hf_model_configs.py) keep, and in transformers' own defaults for SmolLM3, gpt-oss and
Mistral Small 3.1.
"""

import difflib
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _sizes(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab}
    return {"model_type": kind, "tie_word_embeddings": False} | sizes | more


def _qwen3(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict:
    return _sizes("qwen3", hidden, inner, layers, heads, 8, 151936, head_dim=128, **more)


def _qwen3_moe(hidden: int, inner: int, layers: int, heads: int, of_expert: int) -> dict:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": of_expert}
    return _sizes("qwen3_moe", hidden, inner, layers, heads, 4, 151936, head_dim=128, **experts)


def _mixtral(hidden: int, inner: int, layers: int, heads: int, vocab: int) -> dict:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return _sizes("mixtral", hidden, inner, layers, heads, 8, vocab, **experts)


def _gpt_oss(layers: int, experts: int) -> dict:
    more = {"num_local_experts": experts, "num_experts_per_tok": 4, "head_dim": 64, "attention_bias": True}
    return _sizes("gpt_oss", 2880, 2880, layers, 64, 8, 201088, **more)


def _gemma3(hidden: int, inner: int, layers: int, heads: int, kv: int, head: int) -> dict:
    """Return a Gemma 3 with its vision tower, SigLIP's of 400M."""
    text = _sizes("gemma3_text", hidden, inner, layers, heads, kv, 262208, head_dim=head, **TIED)
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    tower |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "gemma3", "text_config": text, "vision_config": tower} | TIED


def _gemma4(
    hidden: int, inner: int, layers: int, heads: int, kv: int, period: int, is_small: bool, **more: Any
) -> dict:
    """Return a Gemma 4 with its towers: each `period`th layer sees everything, with wider heads."""
    kinds = [*["sliding_attention"] * (period - 1), "full_attention"] * (layers // period)
    text = _sizes("gemma4_text", hidden, inner, layers, heads, kv, 262144, head_dim=256, **TIED)
    text |= {"layer_types": kinds, "global_head_dim": 512, "vocab_size_per_layer_input": 262144} | more
    size, tall, deep, wide = (768, 3072, 16, 12) if is_small else (1152, 4304, 27, 16)
    tower = {"model_type": "gemma4_vision", "hidden_size": size, "intermediate_size": tall, "num_hidden_layers": deep}
    tower |= {"num_attention_heads": wide, "num_key_value_heads": wide, "head_dim": size // wide, "patch_size": 16}
    tower |= {"position_embedding_size": 10240, "use_clipped_linears": is_small, "standardize": not is_small}
    audio = {"model_type": "gemma4_audio"} if is_small else None
    return {"model_type": "gemma4", "text_config": text, "vision_config": tower, "audio_config": audio} | TIED


TIED = {"tie_word_embeddings": True}
PER_LAYER = {"hidden_size_per_layer_input": 256}
# All attention heads of a global layer read keys that are their values.
WHOLE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_kv_shared_layers": 0}
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
OF_V3 = LATENT | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8}
OF_V3 |= {"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "topk_group": 4}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _sizes("llama", 576, 1536, 30, 9, 3, 49152, **TIED),
    "smollm2-360m": _sizes("llama", 960, 2560, 32, 15, 5, 49152, **TIED),
    "smollm2-1.7b": _sizes("llama", 2048, 8192, 24, 32, 32, 49152, **TIED),
    "smollm3-3b": _sizes("smollm3", 2048, 11008, 36, 16, 4, 128256, **TIED),
    "qwen2.5-0.5b": _sizes("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED),
    "qwen2.5-1.5b": _sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, **TIED),
    "qwen2.5-3b": _sizes("qwen2", 2048, 11008, 36, 16, 2, 151936, **TIED),
    "qwen2.5-7b": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _sizes("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _sizes("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _sizes("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, **TIED),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, **TIED),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, **TIED),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 94, 64, 1536),
    "llama-7b": _sizes("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _sizes("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-33b": _sizes("llama", 6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _sizes("llama", 8192, 22016, 80, 64, 64, 32000),
    "llama-3.2-1b": _sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "llama-3.2-3b": _sizes("llama", 3072, 8192, 28, 24, 8, 128256, **TIED),
    "llama-3.1-8b": _sizes("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _sizes("llama", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _sizes("llama", 16384, 53248, 126, 128, 8, 128256),
    "gemma-3-1b": _sizes("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, **TIED),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128),
    "gemma-4-e2b": _gemma4(
        1536, 6144, 35, 8, 1, 5, is_small=True, num_kv_shared_layers=20, use_double_wide_mlp=True, **PER_LAYER
    ),
    "gemma-4-e4b": _gemma4(2560, 10240, 42, 8, 2, 6, is_small=True, num_kv_shared_layers=18, **PER_LAYER),
    "gemma-4-26b-a4b": _gemma4(
        2816,
        2112,
        30,
        16,
        8,
        6,
        is_small=False,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        **WHOLE,
    ),
    "gemma-4-31b": _gemma4(5376, 21504, 60, 32, 16, 6, is_small=False, num_global_key_value_heads=4, **WHOLE),
    "mistral-7b": _sizes("mistral", 4096, 14336, 32, 32, 8, 32768),
    "mistral-small-24b": _sizes("mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128),
    "mixtral-8x7b": _mixtral(4096, 14336, 32, 32, 32000),
    "mixtral-8x22b": _mixtral(6144, 16384, 56, 48, 32768),
    "phi-4": _sizes("phi3", 5120, 17920, 40, 40, 10, 100352, pad_token_id=0),
    "phi-4-mini": _sizes("phi3", 3072, 8192, 32, 24, 8, 200064, pad_token_id=0, **TIED),
    "olmo-2-7b": _sizes("olmo2", 4096, 11008, 32, 32, 32, 100352),
    "olmo-2-13b": _sizes("olmo2", 5120, 13824, 40, 40, 40, 100352),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "deepseek-v3": _sizes("deepseek_v3", 7168, 18432, 61, 128, 128, 129280, **OF_V3),
}
# What people call them -> their line above, beside its own name. A size alone means the newest dense model that is
# known by it; 7b, 8b and 13b mean what they have always meant here.
ALIASES = {
    "smollm2-135m": "135m",
    "smollm2-360m": "360m",
    "smollm3-3b": "smollm3",
    "qwen2.5-0.5b": "0.5b qwen2-0.5b",
    "qwen2.5-1.5b": "1.5b qwen2-1.5b",
    "qwen2.5-7b": "7b qwen-7b qwen2-7b deepseek-r1-distill-qwen-7b",
    "qwen2.5-14b": "deepseek-r1-distill-qwen-14b",
    "qwen2.5-32b": "qwq-32b deepseek-r1-distill-qwen-32b",
    "qwen2.5-72b": "72b qwen2-72b",
    "qwen3-0.6b": "0.6b",
    "qwen3-1.7b": "1.7b",
    "qwen3-4b": "4b qwen-4b",
    "qwen3-8b": "qwen-8b",
    "qwen3-14b": "14b qwen-14b",
    "qwen3-32b": "32b qwen-32b",
    "qwen3-30b-a3b": "30b-a3b qwen3-coder-30b-a3b",
    "qwen3-235b-a22b": "235b 235b-a22b",
    "llama-7b": "llama-2-7b",
    "llama-13b": "13b llama-2-13b",
    "llama-33b": "33b llama-30b",
    "llama-65b": "65b",
    "llama-3.2-1b": "1b llama-1b",
    "llama-3.2-3b": "3b llama-3b",
    "llama-3.1-8b": "8b llama-8b llama-3-8b deepseek-r1-distill-llama-8b",
    "llama-3.1-70b": "70b llama-70b llama-3-70b llama-3.3-70b deepseek-r1-distill-llama-70b",
    "llama-3.1-405b": "405b",
    "gemma-3-12b": "12b",
    "gemma-3-27b": "27b",
    "gemma-4-e2b": "e2b",
    "gemma-4-e4b": "e4b",
    "gemma-4-26b-a4b": "gemma-4-26b 26b-a4b",
    "gemma-4-31b": "31b",
    "mistral-7b": "mistral zephyr-7b zephyr-7b-beta",
    "mistral-small-24b": "24b mistral-small mistral-small-3.1-24b mistral-small-3.2-24b",
    "mixtral-8x7b": "mixtral 8x7b 47b",
    "mixtral-8x22b": "8x22b 141b",
    "olmo-2-7b": "olmo-2-1124-7b",
    "olmo-2-13b": "olmo-2-1124-13b",
    "gpt-oss-20b": "20b gpt-oss",
    "gpt-oss-120b": "120b",
    "deepseek-v3": "671b deepseek-r1 deepseek-v3.1",
}
# Qwen2.5's models for code and mathematics have the sizes of the others.
_SAME = re.compile(r"(?<=qwen2\.5)[-_ ](coder|math)(?=[-_ ])")
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z])")
_TUNED = re.compile(r"([-_ ](instruct|chat|base|it|pt|hf|dpo|sft|thinking|reasoning|plus|\d{4}|v0\.\d))+$")


def _squeezed(name: str) -> str:
    """Return a name as it is compared: of `meta-llama/Llama-3.1-8B` what "llama3.1 8b" has, too."""
    return re.sub(r"[-_ :]", "", name).removeprefix("meta")


_NAMES = {_squeezed(name): name for name in SHAPES}
_NAMES |= {_squeezed(word): name for name, words in ALIASES.items() for word in words.split()}


def find(name: str) -> str | None:
    """
    Return the entry of `SHAPES` that a name means: its own, an alias or a hub name, of which what follows the last "/"
    counts, in any case, with or without hyphens, and without an ending such as "-Instruct"; `None` without one.
    """
    word = _SAME.sub("", name.lower().rstrip("/").split("/")[-1])
    return next((_NAMES[key] for each in (word, _TUNED.sub("", word)) if (key := _squeezed(each)) in _NAMES), None)


def nearest(name: str) -> str:
    """
    Return what to give for a model that is not known: the names of its family, if that is known, whose size is
    nearest; without a size those that are written alike, and a few examples if none is.
    """
    said = name.lower().rstrip("/").split("/")[-1]
    size, family = _size(said), _family(said)
    sizes = {known: its for known in SHAPES if (its := _size(known)) is not None}
    of_family = [known for known in sizes if _family(known) == family] or list(sizes)
    if size is not None:
        near = sorted(of_family, key=lambda known: abs(math.log(sizes[known] / size)))[:3]
    else:
        near = list(dict.fromkeys(_NAMES[key] for key in difflib.get_close_matches(_squeezed(said), _NAMES, n=3)))
    first, *others = near or ("8b", "qwen3-14b", "gemma-3-4b")
    more = f" Others: {', '.join(others)}." if others else ""
    return f"{'Did you mean' if near else 'For example:'} `--model {first}`{'?' if near else '.'}{more}"


def _size(name: str) -> float | None:
    """Return the billions of parameters that a name has in it."""
    found = _SIZE.search(name)
    return None if found is None or not float(found[1]) else float(found[1]) / (1000 if found[2] == "m" else 1)


def _family(name: str) -> str:
    """Return the letters that a name begins with."""
    return re.match("[a-z]*", name.removeprefix("meta-"))[0]  # type: ignore[index]


def load_config(name: str) -> "PretrainedConfig":
    """Return the config of a name of the catalogue, a folder or a hub name; `ValueError` when it is none of them."""
    from transformers import AutoConfig  # takes seconds

    known = None if Path(name).is_dir() else find(name)
    if known is not None:
        options = dict(SHAPES[known])
        return AutoConfig.for_model(options.pop("model_type"), **options)
    return read_config(name, changed(name))


def changed(name: str) -> int:
    """Return when a folder's config was written, 0 for a hub name."""
    file = Path(name, "config.json")
    return file.stat().st_mtime_ns if file.is_file() else 0


@cache
def read_config(name: str, changed: int) -> "PretrainedConfig":
    """Read a config once; a folder's again after it has `changed`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # a family's own checks raise what they like
        known = "." if Path(name).is_dir() else f", and no built-in shape. {nearest(name)}"
        raise ValueError(f"{name!r} is no folder or hub name with a config that can be read{known}") from error
