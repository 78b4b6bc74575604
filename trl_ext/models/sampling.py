"""Sampling that reads a prompt once, without its padding, and computes nothing for responses that have ended."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .probe import in_mode, probe_rows, tolerance


# The share of a batch that has to count for nothing, as padding or as rows that have ended, before it is left out.
WASTE = 0.25
# Prompts are read in so many parts, each of about one length.
PARTS = 4
# What transformers calls a cache, since 5.24 and before.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"


@contextmanager
def sampling_what_counts(
    model: Any, trunk: Any, config: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """
    Within the context `model.generate` gives, for calls with this `config`, the samples that it gives without, from
    the same random numbers. Equal prompts that stand side by side are read once, prompts are read with others of about
    their length, and rows that have ended leave the batch.

    Args:
        model: a causal language model, perhaps a `PeftModel`, without wrappers of distribution.
        trunk: what of it makes the last hidden states ([`why_not_from_cache`]).
        config: a `GenerationConfig` that samples at a temperature from the whole distribution.
        autocast: the context that the model's own forward computes in.
    """
    generate, of_itself = model.generate, vars(model).get("generate")
    greedy: Any = copy.deepcopy(config)  # the noise samples
    greedy.do_sample, greedy.temperature, greedy.top_k, greedy.return_dict_in_generate = False, 1.0, 50, True
    ends_at = [] if config.eos_token_id is None else config.eos_token_id

    @torch.no_grad()
    def sample(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs.keys() != CALLED_WITH or kwargs["generation_config"] is not config:
            return generate(*args, **kwargs)
        prompts, mask = kwargs["input_ids"], kwargs["attention_mask"]
        ends = torch.tensor(ends_at, dtype=torch.long, device=prompts.device)
        written, longest = prompts.size(1), prompts.size(1) + config.max_new_tokens
        samples = prompts.new_full((len(prompts), longest), config.pad_token_id)
        noise = _Noise(len(prompts), config.temperature)
        rows, ids = torch.arange(len(prompts), device=prompts.device), prompts
        with autocast():  # the trunk is called without the wrapper that has it
            cache = _of_prompts(trunk, prompts, mask)
        while len(rows) and written < longest:
            noise.rows, greedy.max_new_tokens = rows, longest - written
            output = generate(
                input_ids=ids,
                attention_mask=pad(mask[rows], (0, ids.size(1) - prompts.size(1)), value=1),
                generation_config=greedy,
                logits_processor=[noise],
                stopping_criteria=[_EnoughEnded(ends)],
                **{CACHE: cache},
            )
            written = output.sequences.size(1)
            samples[rows, :written] = output.sequences
            goes_on = ~torch.isin(output.sequences[:, prompts.size(1) :], ends).any(1)
            rows, ids, cache = rows[goes_on], output.sequences[goes_on], output[CACHE]
            cache.batch_select_indices(goes_on.nonzero().squeeze(1))
        return samples[:, :written]

    model.generate = sample
    try:
        yield
    finally:
        del model.generate
        if of_itself is not None:  # some libraries replace the method of a model
            model.generate = of_itself


CALLED_WITH = {"input_ids", "attention_mask", "generation_config"}


def _of_prompts(trunk: Any, ids: Tensor, mask: Tensor) -> DynamicCache:
    """Return the cache of all prompt tokens but the last; empty if reading them here saves nothing."""
    config = trunk.config.get_text_config(decoder=True)
    cache, width = DynamicCache(config=config), ids.size(1) - 1
    is_new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    is_new[1:] = (ids[1:] != ids[:-1]).any(1) | (mask[1:] != mask[:-1]).any(1)
    row_of = is_new.long().cumsum(0) - 1
    ids, mask = ids[is_new, :-1], mask[is_new, :-1]
    can_be_joined = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    in_parts = can_be_joined and width > 0 and mask.float().mean() < 1 - WASTE
    if width == 0 or (is_new.all() and not in_parts):
        return cache
    lengths = mask.sum(1)
    by_length = lengths.argsort(stable=True)
    parts = []
    for rows in by_length.chunk(PARTS if in_parts else 1):
        size = max(int(lengths[rows].max()), 1) if in_parts else width
        of_part, attended = DynamicCache(config=config), mask[rows, -size:]
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids[rows, -size:], "attention_mask": attended, "position_ids": positions}
        trunk(**inputs, use_cache=True, **{CACHE: of_part})
        parts.append(of_part)
    if not in_parts:
        [cache] = parts
    else:
        for i, layers in enumerate(zip(*(part.layers for part in parts), strict=True)):
            if layers[0].is_initialized:  # else it reads the keys and values of another layer
                keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
                cache.update(*(torch.cat([_padded(part, width) for part in of]) for of in (keys, values)), i)
    cache.batch_select_indices(by_length.argsort()[row_of])
    return cache


def _padded(states: Tensor, width: int) -> Tensor:
    """Pad keys or values (b, h, L, d) with zeros on the left to `width`."""
    return pad(states, (0, 0, width - states.size(-2), 0))


class _Noise(LogitsProcessor):
    """
    Turns the scores of the next token into p / q, q ~ Exp(1), whose largest is a sample: so `torch.multinomial` draws.
    The noise is drawn for all rows, so that the samples of a row do not depend on which others are left.
    """

    def __init__(self, count: int, temperature: float):
        self.count, self.temperature = count, temperature
        self.rows = torch.arange(count)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores / self.temperature).softmax(-1)
        if not probabilities.amax() < torch.inf:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # torch's words
        noise = probabilities.new_empty(self.count, probabilities.size(-1)).exponential_(1)
        return probabilities / (noise if len(self.rows) == self.count else noise[self.rows])


class _EnoughEnded(StoppingCriteria):
    """Stops all rows as soon as a share of them has ended."""

    def __init__(self, ends: Tensor):
        self.ends = ends
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ends_now = torch.isin(input_ids[:, -1], self.ends)
        self.ended = ends_now if self.ended is None else self.ended | ends_now
        return torch.full_like(ends_now, bool(self.ended.float().mean() >= WASTE))


@torch.no_grad()
def why_not_from_cache(trunk: Any) -> str | None:
    """
    Return why a trunk cannot go on from the cache of prompts that was copied to other rows and padded; `None` if it
    gives the states that it gives without.
    """
    rows = probe_rows(trunk)
    width = 2 * max(row.size(1) for row in rows)  # so that they are read in parts
    ids = torch.cat([pad(row, (width - row.size(1), 0)) for row in rows]).repeat_interleave(2, 0)
    mask = torch.cat([pad(torch.ones_like(row), (width - row.size(1), 0)) for row in rows]).repeat_interleave(2, 0)

    def plain() -> Tensor:
        states = [trunk(input_ids=row, use_cache=False).last_hidden_state[0, -1].float() for row in rows]
        return torch.stack(states).repeat_interleave(2, 0)

    with in_mode(trunk, training=False):
        try:
            from_cache = {CACHE: _of_prompts(trunk, ids, mask), "use_cache": True}
            inputs = {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            states = trunk(**inputs, **from_cache).last_hidden_state[:, -1].float()
        except Exception as error:  # whatever it is, it is a reason
            return f"{type(error).__name__}: {error}"
        expected = plain()
        off, allowed = (states - expected).abs().mean().item(), tolerance(trunk, plain, expected.abs().mean().item())
    return None if off <= allowed else f"its states differ by {off:.2g}, where rounding explains {allowed:.2g}"
