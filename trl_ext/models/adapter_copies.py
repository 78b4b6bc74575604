"""Complete copies of an adapter, which do not change the base; and the check that nothing trains the base."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel


# Initialisations of LoRA that subtract the adapter's first weights from the base whenever an adapter with that config
# is added: adding a copy would subtract them a second time.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_copyable(config: PeftConfig | None) -> None:
    """Raise `ValueError` for an adapter that trains biases of the base: PEFT cannot hold a copy beside it."""
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"The adapter that training starts from has `bias={bias!r}`: it trains biases of the base, so that no "
            "frozen copy of it can be the reference. Make it with `bias='none'`, or pass a `ref_model`."
        )


def check_base_is_kept(model: Any) -> None:
    """Raise `ValueError` for a `PeftModel` that also trains its base, which the reference stands on."""
    if not isinstance(model, PeftModel):
        return
    prefix = getattr(model.base_model, "prefix", None)
    trained = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not model.peft_config.keys() & set(name.split("."))
        and not (prefix and prefix in name)
    ]
    if trained:
        raise ValueError(
            f"{len(trained)} parameters of the base are trained beside the adapter, the first is {trained[0]}. The "
            "reference is that base, with a frozen adapter or none, so it would move with them. Freeze them (an "
            "adapter with `bias='none'` leaves biases alone), or pass a `ref_model`."
        )


def config_of_copy(config: PeftConfig) -> PeftConfig:
    """Return the config for a frozen copy of an adapter. AdaLoRA allows a second one only if it is not trained."""
    if isinstance(config, AdaLoraConfig):
        config = copy.copy(config)
        config.inference_mode = True
    return config


@contextmanager
def base_left_alone(model: Any) -> Iterator[None]:
    """Within the context, an adapter that is added with one of the `PeftModel`'s configs does not change the base."""
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


def round_as_trained(model: PeftModel) -> None:
    """
    Round the trained weights of an adapter on a quantised base to bfloat16, as TRL's trainers do: after they have
    copied it, so that the copy would be another model than training starts from.
    """
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def copy_weights(model: PeftModel, name: str, copy_name: str) -> None:
    """Copy the weights of the adapter `name` to the adapter `copy_name` of the same config."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for place, tensor in tensors.items():
        parts = place.split(".")
        twin = tensors.get(".".join(copy_name if part == name else part for part in parts))
        if name in parts and twin is not None and twin.shape == tensor.shape:
            twin.data = tensor.detach().clone()


@contextmanager
def copied_whole(model: Any, name: str) -> Iterator[None]:
    """Within the context, an adapter that is added to a `PeftModel` is a copy of its adapter `name`."""
    if not isinstance(model, PeftModel):
        yield
        return
    add = model.add_adapter

    def add_copy(adapter_name: str, config: PeftConfig) -> None:
        add(adapter_name, config_of_copy(config))
        copy_weights(model, name, adapter_name)

    model.add_adapter = add_copy
    try:
        yield
    finally:
        del model.add_adapter
