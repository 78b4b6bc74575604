"""
Tell the sizes of a model and of an adapter. What is counted is what transformers builds from a model's config: of the
models of `catalogue.py` it stands in counts.json, of all others `counting.py` counts it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .catalogue import changed, find, read_config
from .counts import Adapted, Counts, Part, is_stacked, of_catalogue
from .optimizers import Learned


if TYPE_CHECKING:
    from transformers import PretrainedConfig


# What stands in the names of modules that see and hear.
TOWERS = ("vision", "visual", "audio", "multi_modal")
# Targets of LoRA that PEFT may turn into stacked experts or their router.
MAY_BE_EXPERTS = set("gate gate_proj up_proj down_proj gate_up_proj w1 w2 w3 experts".split())


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
    stacked: int  # in such experts
    tower: int  # in modules that see and hear
    head: int  # of the LM head (a tied one's are the embedding's), or of the score head
    tied: bool  # whether the LM head is the embedding
    largest_module: int  # held by one module directly: DeepSpeed's `largest_layer_params`
    largest_linear: int  # weights of the largest linear layer outside the head
    learned: Learned  # all parameters, as an optimizer sees them


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of a LoRA adapter; all but the counts of parameters are means over layers."""

    parameters: int  # of A and B
    # Widths of the distinct inputs that adapted modules read and keep; attention keeps its output anyway.
    inputs: float
    modules: float  # sum of the adapted modules' input widths, an input counted once for each reader
    ranks: float  # sum of the adapted modules' ranks
    learned: Learned  # the parameters, as an optimizer sees them


def model_shape(name: "str | PretrainedConfig", with_score: bool = False) -> ModelShape:
    """
    Return the sizes of a model, from a name of the catalogue, a folder, a hub name or a config; with a score head
    instead of its own. `ValueError` when there is no such model, or its config cannot be read.
    """
    label = name if isinstance(name, str) else getattr(name, "name_or_path", "") or name.model_type
    return replace(shape_of(_counts(name, with_score)), name=label)


def adapter_shape(name: "str | PretrainedConfig", rank: int, targets: Iterable[str] | str) -> AdapterShape:
    """
    Return the sizes of a LoRA adapter of one rank; `targets` are PEFT's `target_modules`: names of modules, a regular
    expression, or "all-linear". `ValueError` when PEFT finds no such module.
    """
    counts = _counts(name, False)
    modules = targets if isinstance(targets, str) else tuple(targets)
    adapted = _adapted(counts, modules)
    if not adapted:  # a pattern of the whole name, experts, modules that are not linear, or none
        from .counting import adapted_by_peft

        adapted = adapted_by_peft(name, modules)
    # Projections of one block read one input: what stands before the last "." names the block. Layers whose
    # projections have other sizes add up, projections of one layer do not.
    readers: Counter[tuple[str, int, str]] = Counter()
    for each in adapted:
        block, _, projection = each.name.rpartition(".")
        if projection != "o_proj":
            readers[block, each.inside, projection] += each.number
    blocks = {(block, width) for block, width, _ in readers}
    read = sum(width * max(n for (*of, _), n in readers.items() if of == [block, width]) for block, width in blocks)
    tensors = [(rank * each.ranks, size, each.number) for each in adapted for size in (each.inside, each.outside)]
    learned = Learned(
        parameters=sum(ranks * size * number for ranks, size, number in tensors),
        in_32_bits=sum(ranks * size * number for ranks, size, number in tensors if ranks * size < 4096),
        factored=sum((ranks + size) * number for ranks, size, number in tensors),
    )
    return AdapterShape(
        parameters=learned.parameters,
        inputs=read / counts.layers,
        modules=sum(each.inside * each.number for each in adapted) / counts.layers,
        ranks=rank * sum(each.number for each in adapted) / counts.layers,
        learned=learned,
    )


def _adapted(counts: Counts, targets: str | tuple[str, ...]) -> list[Adapted]:
    """Return the linear layers that PEFT would adapt, by one word for all or by the ends of names; empty if unsure."""
    if targets == "all-linear" and counts.adapted:
        return counts.adapted
    has_stacks = any(is_stacked(part) for part in counts.parts)
    if has_stacks and (targets == "all-linear" or MAY_BE_EXPERTS.intersection(targets)):
        return []
    return [
        Adapted(part.name, part.tensors[0][1], part.tensors[0][0], part.number)
        for part in counts.parts
        if part.kind == "linear" and _is_target(part.name, targets)
    ]


def _is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear"
    return any(f".{name}".endswith(f".{target}") for target in targets)


def shape_of(counts: Counts) -> ModelShape:
    """Return the sizes that follow from what was counted."""
    parts = counts.parts
    linear = [part for part in parts if part.kind == "linear"]
    total = sum(part.parameters * part.number for part in parts)
    of_experts = sum(part.parameters * part.number for part in parts if ".experts." in f"{part.name}.")
    return ModelShape(
        name="",
        hidden=counts.hidden,
        layers=counts.layers,
        vocab=counts.vocab,
        inner=counts.inner,
        query=counts.query,
        key=counts.key,
        heads=counts.heads,
        parameters=total,
        active=total - round(of_experts * (1 - counts.visited)),
        linear=sum(prod(part.tensors[0]) * part.number for part in linear),
        stacked=sum(part.parameters * part.number for part in parts if is_stacked(part)),
        tower=sum(part.parameters * part.number for part in parts if any(word in part.name for word in TOWERS)),
        head=counts.head,
        tied=counts.tied,
        largest_module=max(part.parameters for part in parts),
        largest_linear=max((prod(part.tensors[0]) for part in linear), default=0),
        learned=_learned(parts),
    )


def _learned(parts: list[Part]) -> Learned:
    """Count what a model trains, as an optimizer sees it."""
    tensors = [(part, sizes) for part in parts for sizes in part.tensors]
    return Learned(
        parameters=sum(prod(sizes) * part.number for part, sizes in tensors),
        in_32_bits=sum(
            prod(sizes) * part.number for part, sizes in tensors if prod(sizes) < 4096 or part.kind == "embedding"
        ),
        factored=sum(_rows_and_columns(sizes) * part.number for part, sizes in tensors),
    )


def _rows_and_columns(sizes: list[int]) -> int:
    if len(sizes) < 2:
        return prod(sizes)
    return prod(sizes[:-1]) + prod(sizes[:-2]) * sizes[-1]


def _counts(name: "str | PretrainedConfig", with_score: bool) -> Counts:
    """Return what is counted; the catalogue comes before the hub."""
    if not isinstance(name, str):
        from .counting import count  # imports transformers, which takes seconds

        return count(name, with_score)
    known = None if Path(name).is_dir() else find(name)
    if known is None:
        return _of_name(name, changed(name), with_score)
    counts = of_catalogue()[known]
    return counts.with_score() if with_score else counts


@cache
def _of_name(name: str, changed: int, with_score: bool) -> Counts:
    """Count a folder's or the hub's model once: a search asks for the same sizes hundreds of times."""
    return _counts(read_config(name, changed), with_score)
