"""
Count what transformers builds from a config, on a meta model. No weight is loaded.

    python -m trl_ext.planner.counting    # writes counts.json anew, for the models of catalogue.py
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from ..data.json_values import key_of
from .catalogue import SHAPES, load_config
from .counts import COUNTS, Adapted, Counts, Part, is_stacked


# What families call the experts of a layer, and those that a token visits.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
VISITED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")  # of the MLP
KEY_HEADS = ("num_key_value_heads", "num_attention_heads")

_COUNTS: dict[str, Counts] = {}  # by config
_ADAPTED: dict[str, list[Adapted]] = {}  # by config and modules


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


def count(config: PretrainedConfig, with_score: bool = False) -> Counts:
    """Return what is counted in the model of a config; `ValueError` for one that the planner does not understand."""
    key = key_of([config.to_dict(), with_score])
    if key not in _COUNTS:
        try:
            _COUNTS[key] = _count(meta_model(config, with_score), config.get_text_config(), with_score)
        except Exception as error:  # the code of some 150 families, on configs that may be anybody's
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"The planner cannot read the sizes of a {config.model_type!r} model ({reason:.200}): it knows models "
                "with attention heads, an embedding and a head."
            ) from error
    return _COUNTS[key]


def _count(model: Any, text: PretrainedConfig, with_score: bool) -> Counts:
    embedding = model.get_input_embeddings().weight
    if with_score:  # a family may have another kind of classifier than a linear one
        heads = [getattr(model, name, None) for name in ("score", "classifier", "classification_head")]
        head = next((module.weight for module in heads if isinstance(module, nn.Linear)), None)
    else:
        head = model.get_output_embeddings().weight
    inner, visited = _experts(model, text)
    return Counts(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        inner=inner,
        query=_mean(text, lambda layer: layer.num_attention_heads * _head_size(layer)),
        key=_mean(text, _key_width),
        heads=_mean(text, lambda layer: layer.num_attention_heads),
        visited=visited,
        head=text.hidden_size if head is None else head.numel(),
        tied=head is embedding,
        parts=_parts(model, head),
    )


def _parts(model: nn.Module, head: torch.Tensor | None) -> list[Part]:
    """Return the modules that hold parameters, those of the same sizes together; a shared parameter counts once."""
    found: list[tuple[str, str, list[list[int]]]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if not own:
            continue
        kinds = {"linear": nn.Linear, "embedding": nn.Embedding}
        kind = next((kind for kind, of in kinds.items() if isinstance(module, of)), "other")
        if any(parameter is head for parameter in own) and kind != "embedding":
            kind = "head"
        found.append((name, kind, [list(parameter.shape) for parameter in own]))
    return [Part(name, kind, tensors, number) for (name, kind, tensors), number in _alike(found)]


def _alike(found: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return what is the same but for the number of its layer once, with how often it is there."""
    counted = Counter(json.dumps([re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), *fields]) for name, *fields in found)
    return [(json.loads(key), number) for key, number in counted.items()]


def _mean(text: PretrainedConfig, size: Callable[[Any], float]) -> int:
    """Return a size, or its mean where layers differ."""
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    return round(sum(size(layer) for layer in layers) / len(layers))


def _head_size(layer: PretrainedConfig) -> int:
    latent = getattr(layer, "qk_nope_head_dim", None)  # DeepSeek's attention: parts with and without a position
    if latent:
        return latent + layer.qk_rope_head_dim
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def _key_width(layer: PretrainedConfig) -> float:
    """Return the width of the keys; where values have another, the mean: transformers keeps DeepSeek's unpacked."""
    heads, size = _first_of(layer, KEY_HEADS), _head_size(layer)
    values = getattr(layer, "v_head_dim", None) if getattr(layer, "qk_nope_head_dim", None) else None
    return heads * (size + (values or size)) / 2


def _first_of(config: PretrainedConfig, names: Iterable[str]) -> Any:
    """Return the first of these fields that a config has and that is not 0; `None` without one."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _experts(model: nn.Module, text: PretrainedConfig) -> tuple[int, float]:
    """Return the width of the MLP that a token meets, and the share of the experts that it visits."""
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return _mean(text, _width), 1.0
    visited = _first_of(text, VISITED)
    if visited is None:
        raise AttributeError(f"its config has none of {', '.join(VISITED)}, the experts that a token visits")
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return visited * width, visited / (_first_of(text, EXPERTS) or 1)


def _width(text: PretrainedConfig) -> int:
    """Return the width of the MLP; some older families leave it at four times the hidden width."""
    size = _first_of(text, WIDTHS) or 4 * text.hidden_size
    return round(sum(size) / len(size)) if isinstance(size, list) else size  # Gemma 3n has one for each layer


def adapted_by_peft(name: str | PretrainedConfig, modules: str | tuple[str, ...]) -> list[Adapted]:
    """Return what PEFT adapts of the meta model; `ValueError` when it finds nothing, or nothing that it can adapt."""
    from peft import LoraConfig, get_peft_model  # takes seconds, and is asked seldom
    from peft.tuners.lora import LoraLayer

    config = load_config(name) if isinstance(name, str) else name
    targets = modules if isinstance(modules, str) else list(modules)
    key = key_of([config.to_dict(), targets])
    if key not in _ADAPTED:
        lora = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
        try:
            model = get_peft_model(meta_model(config), lora, low_cpu_mem_usage=True)
        except Exception as error:  # PEFT's, on modules that are not there or of a kind that it cannot adapt
            reason = str(error).split("Please")[0].strip()
            raise ValueError(f"A LoRA adapter on {targets} of a {config.model_type!r} model: {reason:.300}") from error
        found = [
            (name, layer.in_features, layer.out_features, layer.lora_A["default"].weight.shape[0] // lora.r)
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        _ADAPTED[key] = [
            Adapted(name, inside, outside, number, ranks) for (name, inside, outside, ranks), number in _alike(found)
        ]
    return _ADAPTED[key]


def count_with_adapter(name: str) -> Counts:
    """Return what is counted of a model of the catalogue, with what PEFT adapts of stacked experts."""
    counts = count(load_config(name))
    has_stacks = any(is_stacked(part) for part in counts.parts)
    return replace(counts, adapted=adapted_by_peft(name, "all-linear") if has_stacks else [])


if __name__ == "__main__":
    counted = {name: asdict(count_with_adapter(name)) for name in SHAPES}
    lines = [f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in counted.items()]
    COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
