"""Log-probabilities and entropy straight from trunk states, for CPUs: TRL's kernel for GPUs, in fewer passes."""

from typing import Any

import torch
from torch import Tensor


# Logits in one tile: 8 MB in float32, so that the passes over a tile stay in the cache.
TILE = 2**21

# Logits kept for the backward pass, 1 GiB in float32; more are computed again.
KEPT = 2**28


class TokenLogProbs(torch.autograd.Function):
    """
    log π(target) and −Σ_v p_v log p_v of softmax(states · weightᵀ · scale), both (N,), in tiles over the vocabulary.

    Args:
        states (N, H), weight (V, H): float32.
        targets (N,): token ids.
        scale: what the logits are multiplied by, 1 / temperature.
        with_grad: whether a backward pass may follow.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, scale: float, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        scaled = states * scale
        (size, vocabulary), width = (len(states), len(weight)), max(TILE // max(len(states), 1), 1)
        keep = with_grad and size * vocabulary <= KEPT
        buffer = states.new_empty(size * (vocabulary if keep else min(width, vocabulary)))
        top, total, weighted = states.new_full((size,), -torch.inf), states.new_zeros(size), states.new_zeros(size)
        for start in range(0, vocabulary, width):
            rows = weight[start : start + width]
            logits = _tile(buffer, start if keep else 0, size, len(rows))
            torch.mm(scaled, rows.t(), out=logits)
            new_top = torch.maximum(top, logits.amax(-1))
            shrink = (top - new_top).exp_()
            exp = (logits - new_top.unsqueeze(-1)).exp_()
            total.mul_(shrink).add_(exp.sum(-1))
            weighted.mul_(shrink).add_(torch.linalg.vecdot(exp, logits))
            top = new_top
        log_z = top + total.log()
        entropy = log_z - weighted / total
        ctx.save_for_backward(states, weight, targets, log_z, entropy)
        ctx.scale, ctx.width, ctx.buffer = scale, width, buffer if keep else None
        return (scaled * weight[targets]).sum(-1) - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, log_z, entropy = ctx.saved_tensors
        (size, vocabulary), width = (len(states), len(weight)), ctx.width
        scaled = states * ctx.scale
        grad_states = torch.zeros_like(states)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        # d logits = grad_logps · (1[target] − p) − grad_entropy · p (log p + entropy); the 1[target] comes last.
        constant = grad_logps + grad_entropy * (entropy - log_z)
        buffer = states.new_empty(size * min(width, vocabulary))
        for start in range(0, vocabulary, width):
            rows = weight[start : start + width]
            grad = _tile(buffer, 0, size, len(rows))
            if ctx.buffer is None:
                logits = torch.mm(scaled, rows.t(), out=grad)
            else:
                logits = _tile(ctx.buffer, start, size, len(rows))
            p = (logits - log_z.unsqueeze(-1)).exp_()
            torch.mul(logits, -grad_entropy.unsqueeze(-1), out=grad).sub_(constant.unsqueeze(-1)).mul_(p)
            grad_states.addmm_(grad, rows)
            if grad_weight is not None:
                torch.mm(grad.t(), scaled, out=grad_weight[start : start + width])
        ctx.buffer = None  # the graph outlives this call, and the embedding's gradient is about to need the room
        of_targets = grad_logps.unsqueeze(-1)
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, of_targets * scaled)
        return (grad_states + of_targets * weight[targets]) * ctx.scale, grad_weight, None, None, None


def _tile(buffer: Tensor, start: int, size: int, width: int) -> Tensor:
    """The (size, width) tile that begins at column `start`; tiles lie one after the other in the buffer."""
    return buffer[start * size : (start + width) * size].view(size, width)
