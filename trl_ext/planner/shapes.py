"""Count the sizes of a model and of an adapter on a meta model built from the config. No weight is loaded."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from ..data.json_values import key_of
from .optimizers import Learned


def _shape(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab}
    return {"model_type": kind, "tie_word_embeddings": False} | sizes | more


TIED = {"tie_word_embeddings": True}
# The published configs of models whose size people name. A hub name finds its entry by what follows the last "/".
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": _shape("llama", 576, 1536, 30, 9, 3, 49152, **TIED),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, **TIED),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "llama-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "llama-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-33b": _shape("llama", 6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _shape("llama", 8192, 22016, 80, 64, 64, 32000),
    "llama-3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256),
}
ALIASES = {"135m": "smollm2-135m-instruct", "0.5b": "qwen2.5-0.5b", "1.5b": "qwen2.5-1.5b", "7b": "qwen2.5-7b"}
ALIASES |= {"8b": "llama-3.1-8b", "13b": "llama-13b", "33b": "llama-33b", "llama-30b": "llama-33b"}
ALIASES |= {"65b": "llama-65b", "70b": "llama-3.1-70b"}


# What families call the experts of a layer, and those that a token visits.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
VISITED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")  # of the MLP
KEY_HEADS = ("num_key_value_heads", "num_attention_heads")

_SUFFIX = re.compile(r"-(instruct|chat|base|it|hf|dpo|sft|v[0-9.]+)+$")

# Counted once for each config: a search asks for the same sizes hundreds of times.
_MODELS: dict[str, "ModelShape"] = {}
_ADAPTERS: dict[str, "AdapterShape"] = {}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. Widths are elements per token, counts are parameters."""

    name: str  # what the user called it
    hidden: int
    layers: int
    vocab: int
    inner: int  # width of the MLP; of a mixture of experts, that of the experts that one token visits
    query: int  # heads × head size of the queries
    key: int  # of the keys, and of the values
    heads: int
    parameters: int  # all, tied ones once
    active: int  # those that one token meets; fewer than `parameters` in a mixture of experts
    # In linear layers outside the head: what 4- and 8-bit loading packs. Experts that are one tensor of three
    # dimensions are not among them: bitsandbytes leaves those in 16 bits.
    linear: int
    head: int  # of the LM head (a tied one's are the embedding's), or of the score head
    tied: bool  # whether the LM head is the embedding
    largest_module: int  # held by one module directly: DeepSpeed's `largest_layer_params`
    largest_linear: int  # weights of the largest linear layer outside the head
    learned: Learned  # all parameters, as an optimizer sees them


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of a LoRA adapter; all but the counts of parameters are means over layers."""

    parameters: int  # of A and B
    inputs: (
        float  # widths of the distinct inputs that adapted modules read and keep; attention keeps its output anyway
    )
    modules: float  # sum of the adapted modules' input widths, an input counted once for each reader
    ranks: float  # sum of the adapted modules' ranks
    learned: Learned  # the parameters, as an optimizer sees them


def load_config(name: str) -> PretrainedConfig:
    """
    Return the config of a name of the built-in table (`SHAPES`, `ALIASES`), a folder, or a hub name; if that cannot be
    read, of the table's name without its suffix, such as "-Instruct". `ValueError` when it is none of them.
    """
    key = name.lower().rstrip("/").split("/")[-1]
    if not Path(name).is_dir() and ALIASES.get(key, key) in SHAPES:
        return _from_table(key)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # a family's own checks raise what they like
        plain = _SUFFIX.sub("", key)
        if ALIASES.get(plain, plain) in SHAPES:
            return _from_table(plain)
        raise ValueError(
            f"{name!r} is no folder or hub name with a config that can be read ({type(error).__name__}), and no "
            f"built-in shape. Built-in shapes: {sorted([*ALIASES, *SHAPES])}."
        ) from error


def _from_table(key: str) -> PretrainedConfig:
    options = dict(SHAPES[ALIASES.get(key, key)])
    return AutoConfig.for_model(options.pop("model_type"), **options)


def meta_model(config: PretrainedConfig, with_score: bool = False) -> nn.Module:
    """
    Build the model of `config` without storage: a language model, of a multimodal one with its towers, or with
    `with_score` a model with one score; of a family that has none, the trunk with such a head.
    """
    config = type(config).from_dict(config.to_dict())  # from_config notes its attention in it
    config.architectures = None  # a text part names the whole model that it was taken from
    if with_score:
        config.num_labels = 1
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    if with_score:
        kinds = (AutoModelForSequenceClassification, AutoModel)
    known = [auto for auto in kinds if type(config) in auto._model_mapping]
    with torch.device("meta"):
        model = (known or kinds)[0].from_config(config)
        if with_score and known[:1] == [AutoModel]:
            model.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
    return model


def model_shape(name: str | PretrainedConfig, with_score: bool = False) -> ModelShape:
    """Return the sizes of a model, from a name for `load_config` or a config; with a score head instead of its own."""
    config = load_config(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(config, "name_or_path", "") or config.model_type
    key = key_of([config.to_dict(), with_score])
    if key not in _MODELS:
        try:
            _MODELS[key] = _count(meta_model(config, with_score), config.get_text_config(), with_score)
        except Exception as error:  # the code of some 150 families, on configs that may be anybody's
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"The planner cannot read the sizes of a {config.model_type!r} model ({reason:.200}): it knows models "
                "with attention heads, an embedding and a head."
            ) from error
    return replace(_MODELS[key], name=label)


def _count(model: Any, text: PretrainedConfig, with_score: bool) -> ModelShape:
    embedding = model.get_input_embeddings().weight
    if with_score:  # a family may have another kind of classifier than a linear one
        heads = [getattr(model, name, None) for name in ("score", "classifier", "classification_head")]
        head = next((module.weight for module in heads if isinstance(module, nn.Linear)), None)
    else:
        head = model.get_output_embeddings().weight
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    inside = [weight.numel() for weight in linears if weight is not head and weight is not embedding]
    total = sum(parameter.numel() for parameter in model.parameters())
    experts, width, share = _experts(model, text)
    return ModelShape(
        name="",
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        inner=width,
        query=_mean(text, lambda layer: layer.num_attention_heads * _head_size(layer)),
        key=_mean(text, lambda layer: _first_of(layer, KEY_HEADS) * _head_size(layer)),
        heads=_mean(text, lambda layer: layer.num_attention_heads),
        parameters=total,
        active=total - round(experts * (1 - share)),
        linear=sum(inside),
        head=text.hidden_size if head is None else head.numel(),
        tied=head is embedding,
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        largest_linear=max(inside, default=0),
        learned=_learned(model),
    )


def _learned(model: nn.Module) -> Learned:
    """Count what a model trains, as an optimizer sees it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return Learned(
        parameters=sum(p.numel() for p in trained),
        in_32_bits=sum(p.numel() for p in trained if id(p) in embeddings or p.numel() < 4096),
        factored=sum(p[..., 0].numel() + p[..., 0, :].numel() if p.dim() > 1 else p.numel() for p in trained),
    )


def _mean(text: PretrainedConfig, size: Callable[[Any], int]) -> int:
    """Return a size, or its mean where layers differ."""
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    return round(sum(size(layer) for layer in layers) / len(layers))


def _head_size(layer: PretrainedConfig) -> int:
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def _first_of(config: PretrainedConfig, names: Iterable[str]) -> Any:
    """Return the first of these fields that a config has and that is not 0; `None` without one."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _experts(model: nn.Module, text: PretrainedConfig) -> tuple[int, int, float]:
    """Return the parameters of all experts, the width of the MLP that a token meets, and its share of the experts."""
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    if not experts:
        return 0, _mean(text, _width), 1.0
    visited = _first_of(text, VISITED)
    if visited is None:
        raise AttributeError(f"its config has none of {', '.join(VISITED)}, the experts that a token visits")
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return experts, visited * width, visited / (_first_of(text, EXPERTS) or 1)


def _width(text: PretrainedConfig) -> int:
    """Return the width of the MLP; some older families leave it at four times the hidden width."""
    size = _first_of(text, WIDTHS) or 4 * text.hidden_size
    return round(sum(size) / len(size)) if isinstance(size, list) else size  # Gemma 3n has one for each layer


def adapter_shape(name: str | PretrainedConfig, rank: int, targets: Iterable[str] | str) -> AdapterShape:
    """
    Return the sizes of a LoRA adapter of one rank, counted on what PEFT makes of the meta model; `targets` are PEFT's
    `target_modules`: names of modules, a regular expression, or "all-linear".
    """
    config = load_config(name) if isinstance(name, str) else name
    modules = targets if isinstance(targets, str) else list(targets)
    key = key_of([config.to_dict(), rank, modules])
    if key not in _ADAPTERS:
        _ADAPTERS[key] = _count_adapter(config, rank, modules)
    return _ADAPTERS[key]


def _count_adapter(config: PretrainedConfig, rank: int, modules: str | list[str]) -> AdapterShape:
    lora = LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM")
    try:
        model = get_peft_model(meta_model(config), lora, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT's, on modules that are not there or of a kind that it cannot adapt
        reason = str(error).split("Please")[0].strip()
        raise ValueError(f"A LoRA adapter on {modules} of a {config.model_type!r} model: {reason:.300}") from error
    text = config.get_text_config()
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    # Projections of one block read one input: what stands before the last "." but one names the block.
    inputs = {(n.rsplit(".", 1)[0], m.in_features) for n, m in adapted.items() if not n.endswith("o_proj")}
    learned = _learned(model)
    return AdapterShape(
        parameters=learned.parameters,
        inputs=sum(width for _, width in inputs) / text.num_hidden_layers,
        modules=sum(m.in_features for m in adapted.values()) / text.num_hidden_layers,
        ranks=rank * len(adapted) / text.num_hidden_layers,
        learned=learned,
    )
