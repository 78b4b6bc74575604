"""The lines that a run prints: its plan, and sample completions."""

import math

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ..runs.tables import counted, show_table
from .config import PPOConfigX
from .rollout import Rollout


def batch_plan(args: PPOConfigX, num_prompts: int | None) -> str:
    """Return the arithmetic of a run in words; `args` is the loop's, and a stream has no `num_prompts`."""
    steps = planned_steps(args, num_prompts)
    rollouts = math.ceil(steps / args.optimizer_steps_per_rollout)
    prompts, n = counted(args.num_prompts, "prompt"), args.num_generations
    if n > 1:
        prompts += f" with {n} responses each"
    micro_batches = f"{args.per_device_train_batch_size}"
    if args.micro_batch_tokens is not None:
        micro_batches = f"up to {args.micro_batch_tokens} tokens"
    return (
        f"PPO plan: {prompts} per rollout ({args.local_batch_size} × {counted(args.world_size, 'process')}), "
        f"{counted(args.num_mini_batches, 'mini-batch')} of {args.mini_batch_size}, micro-batches of "
        f"{micro_batches} per process, {counted(args.num_ppo_epochs, 'epoch')}; {counted(steps, 'optimizer step')}, "
        f"{args.optimizer_steps_per_rollout} per rollout; {counted(rollouts, 'rollout')}, "
        f"{counted(rollouts * args.batch_size, 'episode')}."
    )


def steps_of_pass(args: PPOConfigX, responses: int) -> int:
    """Return the optimizer steps of the critic's pretraining in one pass over so many responses."""
    return responses // args.batch_size * args.num_mini_batches


def pretraining_plan(args: PPOConfigX, responses: int, held_out: int) -> str:
    """Return the arithmetic of the critic's pretraining in words; `args` is the loop's of a `CriticConfigX`."""
    steps, passes = steps_of_pass(args, responses), args.max_passes
    return (
        f"Critic plan: {counted(responses, 'response')} to learn from, {held_out} held out; up to "
        f"{counted(passes, 'pass')} of {counted(steps, 'optimizer step')}, each over "
        f"{counted(args.mini_batch_size, 'response')} in {counted(args.world_size, 'process')}."
    )


def planned_steps(args: PPOConfigX, num_prompts: int | None) -> int:
    """Return the optimizer steps of a run, from the loop's config and the size of the training set."""
    if args.max_steps > 0:
        return args.max_steps
    rollouts_per_epoch = (num_prompts or 0) // args.num_prompts  # an epoch has whole rollouts only
    return math.ceil(args.num_train_epochs * rollouts_per_epoch * args.optimizer_steps_per_rollout)


def print_samples(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, step: int, rows: int = 5
) -> None:
    """Print a table of the first prompts with their responses and scores, on the main process."""
    prompts = [ids[kept].tolist() for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = [ids[kept].tolist() for ids, kept in zip(rollout.response_ids, rollout.attended, strict=True)]
    samples = list(
        zip(
            tokenizer.batch_decode(prompts, skip_special_tokens=True),
            tokenizer.batch_decode(responses),
            rollout.scores.tolist(),
            rollout.scored.tolist(),
            strict=True,
        )
    )
    samples = gather_object(samples)
    if accelerator.is_main_process:
        cells = [(*texts, f"{score:.3f}" if is_scored else "none") for *texts, score, is_scored in samples[:rows]]
        show_table(f"Samples at step {step}", ("prompt", "response", "score"), cells)
