"""Generation from a model's own distribution, without what its `generation_config` would add to a call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, device: Any) -> list[str]:
    """Return a causal language model's greedy completions of prompts (token ids), as text."""
    batch = tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
    known = model.generation_config
    pad = next(i for i in (known.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=known.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if known.eos_token_id is None else known.eos_token_id,
        pad_token_id=pad,
    )
    with evaluating(model), generating_by(model, greedy):
        output = model.generate(**batch.to(device), generation_config=greedy)
    return tokenizer.batch_decode(output[:, batch["input_ids"].size(1) :], skip_special_tokens=True)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode, and restore every module's mode afterwards."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


@contextmanager
def generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """
    Have `model.generate` follow `config` and nothing else within the context. transformers fills every option that a
    call leaves `None` (min_p, typical_p, num_beams, suppress_tokens, …) from the generation config that came with the
    model, which is meant for its users. It is restored afterwards.
    """
    models = [model, model.get_base_model()] if is_peft_model(model) else [model]
    # A `PeftModel` has its own only if somebody has set it; `generate` then copies it to the base.
    holders = [each for each in models if "generation_config" in vars(each)]
    own = [each.generation_config for each in holders]
    for each in holders:
        each.generation_config = config
    try:
        yield
    finally:
        for each, before in zip(holders, own, strict=True):
            each.generation_config = before
