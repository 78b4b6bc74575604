"""Log-probabilities and their statistics from trunk states, on CPUs: what TRL's kernel does on GPUs."""

from typing import Any

import torch
from torch import Tensor


# Logits in one tile: 8 MB in float32, so that the passes over a tile stay in the cache.
TILE = 2**21

# Logits kept for the backward pass, 1 GiB in float32; more are computed again.
KEPT = 2**28


class TokenLogProbs(torch.autograd.Function):
    """
    Statistics of softmax(states · weightᵀ · scale), each (N,), computed in tiles over the vocabulary: log π(target);
    the entropy −Σ_v p_v log p_v; log Σ_v p_v²; the mean logit; whether the target is the first of the largest logits.
    The first two have gradients. The last four are those named in `outputs`, else `None`.

    Args:
        states (N, H), weight (V, H): float32.
        targets (N,): token ids.
        scale: factor of the logits, 1 / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        outputs: tuple[str, ...],
        with_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        scaled = states * scale
        (size, vocabulary), width = (len(states), len(weight)), max(TILE // max(len(states), 1), 1)
        keep = with_grad and size * vocabulary <= KEPT
        buffer = states.new_empty(size * (vocabulary if keep else min(width, vocabulary)))
        top, of_target = states.new_full((2, size), -torch.inf)
        total, weighted, squares, plain = states.new_zeros(4, size)
        top_token = torch.zeros_like(targets)
        for start in range(0, vocabulary, width):
            rows = weight[start : start + width]
            logits = _tile(buffer, start if keep else 0, size, len(rows))
            torch.mm(scaled, rows.t(), out=logits)
            new_top = torch.maximum(top, logits.amax(-1))
            if "is_top1" in outputs:
                top_token = torch.where(new_top > top, start + logits.argmax(-1), top_token)
            shrink = (top - new_top).exp_()
            exp = (logits - new_top.unsqueeze(-1)).exp_()
            total.mul_(shrink).add_(exp.sum(-1))
            if "entropy" in outputs:
                weighted.mul_(shrink).add_(torch.linalg.vecdot(exp, logits))
            if "log_sum_sq_probs" in outputs:
                squares.mul_(shrink * shrink).add_(torch.linalg.vecdot(exp, exp))
            if "mean_logits" in outputs:
                plain.add_(logits.sum(-1))
            inside = (targets >= start) & (targets < start + len(rows))
            column = (targets - start).clamp(0, len(rows) - 1).unsqueeze(-1)
            of_target = torch.where(inside, logits.gather(-1, column).squeeze(-1), of_target)
            top = new_top
        log_z = top + total.log()
        entropy = log_z - weighted / total if "entropy" in outputs else None
        log_sum_sq_probs = squares.log() - 2 * total.log() if "log_sum_sq_probs" in outputs else None
        mean_logits = plain / vocabulary if "mean_logits" in outputs else None
        is_top1 = top_token == targets if "is_top1" in outputs else None
        ctx.mark_non_differentiable(*(x for x in (log_sum_sq_probs, mean_logits, is_top1) if x is not None))
        ctx.save_for_backward(states, weight, targets, log_z, entropy)
        ctx.scale, ctx.width, ctx.buffer = scale, width, buffer if keep else None
        return of_target - log_z, entropy, log_sum_sq_probs, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple:
        states, weight, targets, log_z, entropy = ctx.saved_tensors
        (size, vocabulary), width = (len(states), len(weight)), ctx.width
        scaled = states * ctx.scale
        grad_states = torch.zeros_like(states)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_logps is None:
            grad_logps = torch.zeros_like(log_z)
        buffer = states.new_empty(size * min(width, vocabulary))
        for start in range(0, vocabulary, width):
            rows = weight[start : start + width]
            grad = _tile(buffer, 0, size, len(rows))
            if ctx.buffer is None:
                logits = torch.mm(scaled, rows.t(), out=grad)
            else:
                logits = _tile(ctx.buffer, start, size, len(rows))
            # d logits = grad_logps · (1[target] − p) − grad_entropy · p (log p + entropy); the 1[target] comes last.
            if grad_entropy is None:
                torch.sub(logits, log_z.unsqueeze(-1), out=grad).exp_().mul_(-grad_logps.unsqueeze(-1))
            else:
                p = (logits - log_z.unsqueeze(-1)).exp_()
                constant = grad_logps + grad_entropy * (entropy - log_z)
                torch.mul(logits, -grad_entropy.unsqueeze(-1), out=grad).sub_(constant.unsqueeze(-1)).mul_(p)
            grad_states.addmm_(grad, rows)
            if grad_weight is not None:
                torch.mm(grad.t(), scaled, out=grad_weight[start : start + width])
        ctx.buffer = None  # the graph outlives this call, and the embedding's gradient is about to need the room
        of_targets = grad_logps.unsqueeze(-1)
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, of_targets * scaled)
        return (grad_states + of_targets * weight[targets]) * ctx.scale, grad_weight, None, None, None, None


def _tile(buffer: Tensor, start: int, size: int, width: int) -> Tensor:
    """Return the (size, width) tile that begins at column `start`; the buffer holds the tiles in sequence."""
    return buffer[start * size : (start + width) * size].view(size, width)
