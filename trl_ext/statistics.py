"""95% confidence intervals of a proportion and of a mean. Pure."""

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor  # takes seconds, which a report need not wait for


Z = 1.96  # of 95%


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """
    Return the 95% interval of a proportion (Wilson 1927), which stays within 0 and 1 also near the ends.

    center ± half = (p + z²/2n) / (1 + z²/n) ± z √(p(1−p)/n + z²/4n²) / (1 + z²/n)
    """
    if count <= 0:
        raise ValueError(f"A proportion of {count} cases has no interval; evaluate on at least one.")
    p, n, z = successes / count, count, Z
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return center - half, center + half


def half_width(values: "Tensor") -> float:
    """Return half the width of the 95% interval of the mean of `values` (N,), N > 1: z · std / √N."""
    if len(values) < 2:
        raise ValueError(f"The mean of {len(values)} values has no interval; it takes at least 2.")
    return Z * values.std().item() / math.sqrt(len(values))
