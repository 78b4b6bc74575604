"""A rollout cut into micro-batches, and the share of the loss terms that each gives."""

import torch

from ..masked import AllReduce
from .config import PPOConfigX
from .kl import estimate_kl
from .roles.forward import ActorCriticOutput
from .rollout import MicroBatch, Rollout
from .terms import PPOCoefficients, PPOTerms, ppo_terms


def draw_micro_batches(
    rollout: Rollout, args: PPOConfigX, all_reduce: AllReduce, num_processes: int, by_length: bool = False
) -> list[MicroBatch]:
    """
    Return a fresh permutation of the rollout, cut into mini-batches and those into micro-batches.

    Args:
        by_length: whether sequences of about the same length share a micro-batch, so that padded rows have little
            padding. Which ones share a mini-batch stays as drawn.
    """
    rows = torch.randperm(len(rollout)).to(rollout.mask.device)
    if by_length:
        lengths = (rollout.prompt_mask.sum(1) + rollout.attended.sum(1))[rows].view(args.num_mini_batches, -1)
        rows = rows.view_as(lengths).gather(1, lengths.argsort(dim=1, stable=True)).flatten()
    tokens = rollout.mask.sum(dim=1)[rows].view(args.num_mini_batches, -1).sum(dim=1)
    num_tokens = all_reduce(tokens.float()).tolist()
    per_step = args.gradient_accumulation_steps
    share = 1 / (per_step * num_processes)
    return [
        MicroBatch(rollout, part, num_tokens[i // per_step], share)
        for i, part in enumerate(rows.split(args.per_device_train_batch_size))
    ]


def reads_full_kl(args: PPOConfigX) -> bool:
    """Return whether the loss holds the exact KL to the reference, summed over the vocabulary."""
    return args.needs_reference and args.kl_placement == "loss" and args.kl_estimator == "full"


def micro_batch_terms(
    output: ActorCriticOutput, rollout: Rollout, inputs: MicroBatch, args: PPOConfigX, coef: PPOCoefficients
) -> PPOTerms:
    """
    Return the loss terms of one micro-batch.

    Args:
        output: of actor and critic, on `rollout`.
        rollout: the sequences of `inputs`. Without `old_logps` the policy is still the one that sampled, and its
            log-probabilities are kept in the whole rollout.
        coef: the current weights of the terms.
    """
    old_logps, kl = rollout.old_logps, None
    if reads_full_kl(args):
        kl = output.ref_kl
    elif args.needs_reference and args.kl_placement == "loss":
        kl = estimate_kl(args.kl_estimator, output.log_probs, rollout.ref_logps, rollout.mask)
    if old_logps is None:
        old_logps = output.log_probs.detach()
        inputs.rollout.keep_first_logps(inputs.rows, old_logps)
    return ppo_terms(
        logps=output.log_probs,
        old_logps=old_logps,
        advantages=rollout.advantages,
        mask=rollout.mask,
        num_tokens=inputs.num_tokens,
        coef=coef,
        cliprange=args.cliprange,
        entropy=output.entropy,
        values=output.state_values,
        old_values=rollout.old_values,
        returns=rollout.returns,
        cliprange_value=args.cliprange_value,
        kl=kl,
        importance_sampling_ratio=rollout.importance_sampling_ratio,
        aux_loss=output.aux_loss if coef.aux else None,
        aux_weight=inputs.share,
    )
