"""
Checks that stop a run: a sequence beyond a budget of tokens, rewards, losses and gradients that are not finite, and a
reference that differs from the actor at the start.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .config import PPOConfigX
from .losses import PPOTerms
from .rollout import Rollout


def require_room(
    rollout: Rollout,
    args: PPOConfigX,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[str] = ("micro_batch_tokens", "score_batch_tokens"),
) -> None:
    """Raise `ValueError` for a sequence that is longer than one of the budgets of tokens."""
    prompts, answers = rollout.lengths()
    longest = int((prompts + answers).argmax())
    size = int(prompts[longest] + answers[longest])
    given = {name: getattr(args, name) for name in budgets}
    small = [f"`{name}={budget}`" for name, budget in given.items() if budget is not None and size > budget]
    if small:
        prompt = tokenizer.decode(rollout.prompt_ids[longest][rollout.prompt_mask[longest]])
        raise ValueError(
            f"A pass of {' and '.join(small)} tokens has no room for a sequence of {size}, a response of "
            f"{int(answers[longest])} to {prompt!r:.200}. Set at least {size} for this one, or leave longer prompts "
            "out."
        )


def needing_less(phase: str | None, args: PPOConfigX) -> str:
    """Return the options that lower the memory of a phase, as the end of a sentence; a resumed run may change most."""
    offload = [] if args.offload_frozen_models else ["set `offload_frozen_models=True`"]
    checkpointing = [] if args.gradient_checkpointing else ["set `gradient_checkpointing=True`"]
    budget = "lower `score_batch_tokens`, {}, " if args.score_batch_tokens else "set `score_batch_tokens`, "
    scoring = [f"{budget.format(args.score_batch_tokens)}the tokens of a pass"]
    if phase == "generate":
        smaller = "in a new run, lower `gradient_accumulation_steps`: a rollout is generated at once"
        return "; ".join([*offload, "lower `response_length`", "let vLLM generate (`use_vllm`)", smaller])
    if phase == "score":
        return "; ".join([*scoring, *offload])
    if phase == "evaluate":
        return "; ".join(["lower `per_device_eval_batch_size`", *scoring, *offload])
    if args.micro_batch_tokens:
        learning = [f"lower `micro_batch_tokens`, {args.micro_batch_tokens}, the tokens of a pass"]
    else:
        learning = [
            "in a new run, set `micro_batch_tokens`, or halve `per_device_train_batch_size` and double "
            "`gradient_accumulation_steps`"
        ]
    return "; ".join([*checkpointing, *offload, *learning])


def refuse_clip(reward_clip: float | None, sources: list[str]) -> None:
    """Raise `ValueError` for `reward_clip` with reward `sources` that pay at single tokens."""
    if reward_clip is not None and sources:
        raise ValueError(
            f"`reward_clip={reward_clip}` clips one score for each response, and the reward {sources[0]!r} pays at "
            "single tokens or turns. Remove `reward_clip`, and clip within the reward."
        )


def require_finite_rewards(
    rewards: Tensor, is_model: list[bool], names: list[str], samples: list[tuple[Any, Any]], first: int, step: int
) -> None:
    """
    Raise `FloatingPointError` for NaN from a reward model, or ±inf from any source. NaN from a function is its `None`.

    Args:
        rewards: (all samples, sources), gathered from all ranks.
        samples: prompt and response of this rank's samples, which begin at row `first`.
    """
    bad = rewards.isinf() | (rewards.isnan() & torch.tensor(is_model, device=rewards.device))
    if not bad.any():
        return
    row, source = bad.nonzero()[0].tolist()
    local = row - first
    of_rank = (
        f"prompt {samples[local][0]!r}, response {samples[local][1]!r}" if 0 <= local < len(samples) else f"row {row}"
    )
    raise FloatingPointError(
        f"The reward {names[source]!r} is {rewards[row, source].item()} at step {step} for {of_rank}. A score must be "
        "finite; look at what the reward model does with this text."
    )


# The tensors that the models give of a rollout before it is learned from, and how an error begins.
_SAID_BY = {
    "ref_logps": "The reference model gives log-probabilities",
    "old_logps": "The actor gives log-probabilities",
    "old_values": "The critic gives values",
}


@contextmanager
def naming_the_actor(step: int) -> Iterator[None]:
    """Within the context, torch's error for probabilities that are not finite becomes a `FloatingPointError`."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        cure = "Lower the learning rate, or look" if step else "It has not been trained here: look"
        raise FloatingPointError(
            f"The actor gives probabilities that are not finite while it samples at step {step} ({error}). {cure} at "
            "its weights and its dtype."
        ) from error


def require_finite_scores(rollout: Rollout, step: int) -> None:
    """Raise `FloatingPointError`, naming model and response, for NaN or ±inf at a token that counts."""
    for name, said in _SAID_BY.items():
        scores = getattr(rollout, name)
        if scores is None or scores is rollout.sampling_logps:  # vLLM has no number for some tokens
            continue
        bad = ~torch.isfinite(scores) & rollout.mask
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            still = step == 0 or name == "ref_logps"
            cure = "It has not been trained here: look" if still else "Lower the learning rate, or look"
            raise FloatingPointError(
                f"{said} that are not finite at step {step}: {scores[row, token].item()} in the response with token "
                f"ids {rollout.response_ids[row].tolist()}. {cure} at its weights and its dtype."
            )


def require_finite_terms(
    terms: PPOTerms, per_token: dict[str, Tensor | None], rollout: Rollout, step: int, steps_alone: int = 0
) -> None:
    """Raise `FloatingPointError` when the loss of a micro-batch is not finite."""
    named = {f.name: getattr(terms, f.name) for f in fields(terms) if f.name not in ("total", "ratio_max")}
    require_finite_loss(terms.total, named, per_token, rollout, step, steps_alone)


def require_finite_loss(
    total: Tensor,
    terms: dict[str, Tensor | None],
    per_token: dict[str, Tensor | None],
    rollout: Rollout,
    step: int,
    steps_alone: int = 0,
) -> None:
    """
    Raise `FloatingPointError`, naming the step, the terms and the first sample, when the total is not finite.

    `steps_alone`: that the critic has taken on this mini-batch before.
    """
    if torch.isfinite(total):
        return
    bad_terms = [name for name, value in terms.items() if value is not None and not torch.isfinite(value)]
    rows = [
        row
        for value in per_token.values()
        if value is not None
        for row in (~torch.isfinite(value) & rollout.mask).any(dim=1).nonzero().flatten().tolist()
    ]
    sample = f" First in the response with token ids {rollout.response_ids[min(rows)].tolist()}." if rows else ""
    raise FloatingPointError(
        f"The loss is {total.item()} at step {step}; not finite: {', '.join(bad_terms) or 'the total'}.{sample} "
        f"{_updated(steps_alone)} {'Lower the learning rate, or look' if step or steps_alone else 'Look'} at the data "
        "and the dtype."
    )


def _updated(steps_alone: int) -> str:
    if not steps_alone:
        return "Nothing was updated."
    return f"In this mini-batch only the critic was updated, in {steps_alone} steps of its own."


def require_finite_gradient(
    norm: float | Tensor | None,
    parameters: Iterable[tuple[str, nn.Parameter]],
    step: int,
    applied: bool = False,
    steps_alone: int = 0,
) -> None:
    """
    Raise `FloatingPointError`, naming the step and some parameters, when the gradient norm is not finite.

    `applied`: the optimizer has already taken its step, as DeepSpeed's does within the backward pass.
    """
    value = torch.as_tensor(0.0 if norm is None else norm)
    if torch.isfinite(value):
        return
    gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
    bad = [name for name, gradient in gradients if not torch.isfinite(gradient).all()]
    # Clipping by a norm of nan makes every gradient nan.
    where = "every parameter" if len(bad) == len(gradients) else ", ".join(bad[:3])
    updated = "The weights were updated with it: start again from a checkpoint." if applied else _updated(steps_alone)
    raise FloatingPointError(
        f"The gradient norm is {value.item()} at step {step}; not finite in {where if bad else 'no local shard'}. "
        f"{updated} {'Lower the learning rate, or look' if step else 'Look'} at the data and the dtype."
    )


def require_same_policy(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, tolerance: float, adapters: Any = None
) -> None:
    """
    Raise `ValueError` when a reference made from the actor differs from it before the first step.

    Args:
        logps, ref_logps: (b, T) nats.
        tolerance: largest difference of a token's log-probability that rounding explains.
        adapters: PEFT's configs of the actor's adapters by name, if it has any.
    """
    difference = (logps - ref_logps).masked_fill(~mask, 0).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(
            f"KL(actor ‖ reference) must be 0 before the first step, but log-probabilities differ by {difference:.3g} "
            f"nats. {_why_they_differ(adapters)} Pass the starting policy as `ref_model`."
        )


def _why_they_differ(adapters: Any) -> str:
    """Return the usual cause. It is not noise, which was looked for before."""
    starts = {
        name: getattr(config, "init_lora_weights", True) for name, config in (adapters or {}).items() if name != "ref"
    }
    changing = [f"`init_lora_weights={start!r}`" for start in starts.values() if start is not True]
    if changing:
        return f"The adapter's initial weights change the model ({changing[0]})."
    if adapters:
        return "The adapter's initial weights change the model."
    return "The weights of one of the two have changed since the reference was made."
