"""Sums, means, variance and whitening over the tokens that count.

Symbols: B sequences, T response tokens. `values` is (B, T), or any shape that `mask` shares; `mask` is bool, True =
counts. What stands at a position that does not count never reaches a result or a gradient: it is replaced before any
arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor


AllReduce = Callable[[Tensor], Tensor]
"""Element-wise sum of a tensor over the ranks. Every rank calls it the same number of times."""

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is divided by, so that the rounding noise of a constant is not blown up to 1."""


def identity(tensor: Tensor) -> Tensor:
    """Return the sum over ranks when there is one rank."""
    return tensor


def require_shape(mask: Tensor, **tensors: Tensor) -> None:
    """Raise unless `mask` is bool and every named tensor has its shape: broadcasting would hide a mistake."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; a bool mask (True = counts) is needed: pass mask.bool().")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and mask has shape {tuple(mask.shape)}; they must be equal: "
                f"expand or slice {name} to one number per token."
            )


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with 0, and no gradient, where `mask` is False; nan and inf are allowed there."""
    return torch.where(mask, values, 0)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum over the positions that count, in float32 or wider; over everything, or along `dim`."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return zero_masked(values, mask).sum(dim=dim, dtype=dtype)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean over the positions that count, 0 if none does; over everything, or along `dim`."""
    return masked_sum(values, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor, all_reduce: AllReduce = identity) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and population variance over the positions that count, on all ranks.

    mean = Σ x / n;  variance = Σ (x − mean)² / n  (no Bessel correction; 0, 0, 0 where nothing counts)

    Three scalars, the same on every rank. The mean is computed before the deviations from it: Σ x² − n·mean² would
    lose all digits to a large mean.
    """
    values = zero_masked(values, mask).to(torch.promote_types(values.dtype, torch.float32))
    count, total = all_reduce(torch.stack([masked_sum(mask, mask), masked_sum(values, mask)]))
    divisor = count.clamp(min=1)
    mean = total / divisor
    squares = all_reduce(masked_sum((values - mean).square(), mask))
    return count, mean, squares / divisor


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, all_reduce: AllReduce = identity) -> Tensor:
    """Scale to variance 1 over the positions that count, on all ranks; 0 at the others.

    (x − mean) / sqrt(variance + 1e-8), plus mean unless `shift_mean`  (the convention of TRL's PPOTrainer)

    A batch without spread, such as a single token, has nothing to scale: with `shift_mean` it is centred (0), without
    it unchanged. Shape (B, T) to (B, T); the result has no unit, except for the mean that is kept.
    """
    require_shape(mask, values=values)
    values = zero_masked(values, mask)
    _, mean, variance = masked_moments(values, mask, all_reduce)
    whitened = (values - mean) * torch.rsqrt(variance + VARIANCE_FLOOR)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_reduce: AllReduce = identity) -> Tensor:
    """Return the share of the returns' variance that the critic explains, over the positions that count, on all ranks.

    1 − Var(returns − values) / Var(returns): 1 is a perfect critic up to a constant, 0 no better than a constant,
    negative worse than one. nan if the returns do not vary. Scalar, no unit.
    """
    require_shape(mask, values=values, returns=returns)
    residual = masked_moments(returns - values, mask, all_reduce)[2]
    spread = masked_moments(returns, mask, all_reduce)[2]
    return torch.where(spread > 0, 1 - residual / spread, torch.nan)
