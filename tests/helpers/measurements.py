"""How far apart two runs are, by what was measured of them."""

from typing import Any


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """
    The largest relative difference by name: of logged numbers, and of gradients and parameters by their norms. What is
    nearly 0 counts as 0.1: there float32 has digits after the point, not significant ones.
    """
    largest: dict[str, float] = {}
    for mine, theirs in zip(one["lines"], other["lines"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, number in theirs.items():
            largest[key] = max(largest.get(key, 0.0), abs(mine[key] - number) / max(abs(number), 0.1))
    tensors = ([*run.get("gradients", []), run["parameters"]] for run in (one, other))
    for mine, theirs in zip(*tensors, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            apart = (mine[name] - tensor).norm().item() / max(tensor.norm().item(), 0.1)
            largest[name] = max(largest.get(name, 0.0), apart)
    return largest


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of all."""
    return max(differences(one, other).values())
