"""A rollout cut into micro-batches, and the share of the loss terms that each gives."""

import torch
from torch import Tensor

from ..masked import AllReduce, masked_sum, zero_masked
from ..packing.budget import cut_by_tokens
from .config import PPOConfigX
from .kl import estimate_kl
from .losses import PPOTerms, ppo_terms, value_errors
from .roles.forward import ActorCriticOutput
from .rollout import MicroBatch, Rollout
from .terms import PPOCoefficients


Parts = tuple[Tensor, ...]


def draw_micro_batches(
    rollout: Rollout, args: PPOConfigX, all_reduce: AllReduce, all_max: AllReduce, num_processes: int, packs: bool
) -> list[list[MicroBatch]]:
    """
    Return a fresh permutation of the rollout, cut into mini-batches and those into micro-batches. The responses to a
    prompt stay together.

    Args:
        all_max: from a tensor to its largest element on any rank.
        packs: whether sequences stand in rows without padding. If not, those of about the same length share a
            micro-batch. Which ones share a mini-batch stays as drawn.

    Returns:
        The micro-batches of each step of the Trainer: one, or with `micro_batch_tokens` all of a mini-batch.
    """
    n, device = args.num_generations, rollout.mask.device
    groups = torch.randperm(len(rollout) // n).to(device)
    if not packs:
        prompts, answers = rollout.lengths()
        lengths = (prompts + answers).view(-1, n).amax(1)[groups].view(args.num_mini_batches, -1)
        groups = groups.view_as(lengths).gather(1, lengths.argsort(dim=1, stable=True)).flatten()
    rows = groups.unsqueeze(1) * n + torch.arange(n, device=device)
    mini_batches = rows.view(args.num_mini_batches, -1)
    tokens = rollout.mask.sum(dim=1)
    positive = torch.zeros_like(tokens)
    if args.positive_min_score is not None:
        positive = tokens * rollout.at_least(args.positive_min_score)
    counts = torch.stack([each[mini_batches].sum(dim=1).float() for each in (tokens, positive)])
    steps = []
    for mini_batch, (num_tokens, num_positive) in zip(mini_batches, all_reduce(counts).T.tolist(), strict=True):
        sizes = (args.per_device_train_batch_size, args.micro_batch_tokens)
        parts, spare = cut(rollout, mini_batch, *sizes, packs, args.shares_prompts, all_max)
        whole = len(mini_batch) * num_processes
        drawn = [MicroBatch(rollout, part, num_tokens, len(part) / whole, num_positive) for part in parts]
        drawn += [MicroBatch(rollout, part, num_tokens, share=0.0, num_positive=num_positive) for part in spare]
        steps += [[each] for each in drawn] if args.micro_batch_tokens is None else [drawn]
    return steps


def cut(
    rollout: Rollout, rows: Tensor, size: int, budget: int | None, packs: bool, shares: bool, all_max: AllReduce
) -> tuple[Parts, Parts]:
    """
    Cut the sequences at `rows` into parts of `size` sequences or, with a `budget`, of at most so many tokens: in rows
    without padding if `packs`, with equal prompts of neighbours once if `shares`.

    Returns:
        The parts, and with a budget spare ones of the shortest sequence, so that every rank has as many: a pass waits
        for its like on the other ranks.
    """
    if budget is None:
        return rows.split(size), ()
    drawn = rollout.select(rows)
    prompts, answers = drawn.lengths()
    groups = drawn.groups() if shares else [[row] for row in range(len(rows))]
    cuts = cut_by_tokens(prompts.tolist(), answers.tolist(), budget, packs, groups)
    count = int(all_max(torch.tensor(float(len(cuts)), device=rows.device)))
    shortest = rows[(prompts + answers).argmin()].unsqueeze(0)
    return tuple(rows[part] for part in cuts), (shortest,) * (count - len(cuts))


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
    now = output.log_probs.detach()
    old_logps, sampling_logps = (_known(logps, now) for logps in (rollout.old_logps, rollout.sampling_logps))
    kl = None
    if reads_full_kl(args):
        kl = output.ref_kl
    elif args.needs_reference and args.kl_placement == "loss":
        kl = estimate_kl(args.kl_estimator, output.log_probs, rollout.ref_logps, rollout.mask)
    if old_logps is None:
        old_logps = now
        if inputs.share > 0:
            inputs.rollout.keep_first_logps(inputs.rows, old_logps)
    return ppo_terms(
        logps=output.log_probs,
        old_logps=old_logps,
        advantages=rollout.advantages,
        mask=rollout.mask,
        num_tokens=inputs.num_tokens,
        coef=coef,
        sampling_logps=sampling_logps,
        policy_objective=args.policy_objective,
        cliprange=args.cliprange,
        cliprange_high=args.cliprange_high,
        dual_clip=args.dual_clip,
        entropy=output.entropy,
        values=output.state_values,
        old_values=rollout.old_values,
        returns=rollout.returns,
        cliprange_value=args.cliprange_value,
        kl=kl,
        importance_sampling_ratio=rollout.importance_sampling_ratio,
        aux_loss=output.aux_loss if coef.aux else None,
        aux_weight=inputs.share,
        positive=rollout.at_least(args.positive_min_score) if args.positive_min_score is not None else None,
        num_positive=inputs.num_positive,
    )


def _known(logps: Tensor | None, now: Tensor) -> Tensor | None:
    """Return log-probabilities with those of `now` where vLLM gave none, so that the ratio is 1, as in GRPO."""
    return None if logps is None else logps.where(~logps.isnan(), now)


def critic_loss(values: Tensor, rollout: Rollout, inputs: MicroBatch, args: PPOConfigX) -> Tensor:
    """Return the value loss of one micro-batch as it stands in the total, for a step of the critic alone."""
    mask = rollout.mask
    values, old_values, returns = (zero_masked(each, mask) for each in (values, rollout.old_values, rollout.returns))
    errors, _ = value_errors(values, old_values, returns, args.cliprange_value)
    return args.vf_coef * masked_sum(errors, mask) / max(inputs.num_tokens, 1)
