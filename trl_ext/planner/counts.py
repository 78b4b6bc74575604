"""Record what is counted in a model, and read counts.json, which has that of the models of `catalogue.py`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar


COUNTS = Path(__file__).with_name("counts.json")
T = TypeVar("T")


class Part(NamedTuple):
    """Modules of the same kind and sizes."""

    name: str  # with "*" for a layer's number
    kind: str  # "linear", "embedding", "head" or "other"
    tensors: list[list[int]]  # sizes of each parameter that it holds itself; of a linear layer the matrix comes first
    number: int  # of such modules

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.tensors))


class Adapted(NamedTuple):
    """Matrices of the same sizes that an adapter is put on."""

    name: str
    inside: int
    outside: int
    number: int  # of such modules
    ranks: int = 1  # times the adapter's rank: PEFT gives every expert of a stack its own


@dataclass(frozen=True)
class Counts:
    """What is read in a config, or its mean over layers, and counted in the model."""

    hidden: int
    layers: int
    vocab: int
    inner: int
    query: int
    key: int
    heads: int
    visited: float  # share of the experts that a token visits
    head: int  # parameters of the LM head, which may be the embedding's, or of the score head
    tied: bool
    parts: list[Part]
    # What PEFT's "all-linear" adapts where that is not the linear layers: in some families stacked experts, too.
    adapted: list[Adapted] = field(default_factory=list)

    def with_score(self) -> "Counts":
        """Return the model with a score head instead of its own."""
        trunk = [part for part in self.parts if part.kind != "head"]
        return replace(
            self, head=self.hidden, tied=False, parts=[*trunk, Part("score", "head", [[1, self.hidden]], 1)]
        )


def is_stacked(part: Part) -> bool:
    """Return whether the experts of a layer are one tensor."""
    return part.kind == "other" and ".experts." in f"{part.name}."


@cache
def of_catalogue() -> dict[str, Counts]:
    """Return what is counted by name."""
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return {
        name: Counts(
            **(fields | {"parts": _each(Part, fields["parts"]), "adapted": _each(Adapted, fields["adapted"])})
        )
        for name, fields in counts.items()
    }


def _each(kind: Callable[..., T], rows: list[list[Any]]) -> list[T]:
    return [kind(*row) for row in rows]
