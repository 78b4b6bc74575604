"""Generation from a model's own distribution: what its `generation_config` would add to a call stays out of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers import GenerationConfig


@contextmanager
def generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """
    Has `model.generate` follow `config` and nothing else within the context.

    transformers fills every option that a call leaves `None` (min_p, typical_p, num_beams, suppress_tokens, …) from
    the configuration that came with the model, which is made for those who use it. The model has that one back after.

    Args:
        model: a causal language model, perhaps a `PeftModel`, without wrappers of distribution.
        config: complete: what it leaves `None` is transformers' default.
    """
    models = [model, model.get_base_model()] if is_peft_model(model) else [model]
    # A `PeftModel` has one of its own only where somebody has set it; `generate` then copies it to the base.
    holders = [each for each in models if "generation_config" in vars(each)]
    own = [each.generation_config for each in holders]
    for each in holders:
        each.generation_config = config
    try:
        yield
    finally:
        for each, before in zip(holders, own, strict=True):
            each.generation_config = before


def greedy_decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """The most probable token each time, up to an end token that the model declares, else the tokenizer's."""
    known = model.generation_config
    pad = next(i for i in (known.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=known.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if known.eos_token_id is None else known.eos_token_id,
        pad_token_id=pad,
    )
