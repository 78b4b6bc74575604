"""Copies of an adapter beside it, which leave the base as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel


# Starts of LoRA that take out of the base's weights what they put into the adapter, whenever one with that config is
# added: a copy of the adapter would take it out a second time.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def base_left_alone(model: Any) -> Iterator[None]:
    """Within the context, adapters that are added to a `PeftModel` with its own configs leave the base alone."""
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    changed = [c for c in configs if str(getattr(c, "init_lora_weights", "")).startswith(CHANGE_THE_BASE)]
    written = [config.init_lora_weights for config in changed]
    for config in changed:
        config.init_lora_weights = True
    try:
        yield
    finally:
        for config, start in zip(changed, written, strict=True):
            config.init_lora_weights = start
