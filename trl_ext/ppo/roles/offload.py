"""Placement of the frozen models: in fewer bits, or in host memory except while a phase reads them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...models.quantization import check_quantizable, quantization, spread_by
from ..config import PPOConfigX
from .reward_models import token_scorer


# The tensors of bitsandbytes' 4-bit state, beside the packed weights.
QUANT_STATE = ("absmax", "code", "offset")


def check_placement(
    args: PPOConfigX, model: Any, ref_model: Any, reward_model: Any, reward_funcs: list[Any], has_adapter: bool
) -> None:
    """
    Raise `ValueError`, before loading, for frozen models that cannot be quantised or moved as the options say.

    Args:
        model, ref_model, reward_model: as given to the trainer.
        has_adapter: whether the actor trains an adapter, so that without a `ref_model` it is its own reference.
    """
    sources = [("reward_model", reward_model)] if reward_model is not None else []
    sources += [("reward_funcs", source) for source in reward_funcs]
    rewards = [(name, source) for name, source in sources if isinstance(source, str | nn.Module)]
    if args.reward_model_quantization is not None:
        if not rewards:
            raise ValueError(
                f"`reward_model_quantization={args.reward_model_quantization!r}` has nothing to quantise: no reward "
                "is a model. Leave it out."
            )
        for name, source in rewards:
            check_quantizable("reward_model_quantization", source, name, args)
    if args.ref_model_quantization is not None:
        if ref_model is None and has_adapter:
            raise ValueError(
                f"`ref_model_quantization={args.ref_model_quantization!r}` has nothing to quantise: the reference is "
                "the actor under another adapter or none. Leave it out; `quantization_config` quantises their base."
            )
        name, source = ("model", model) if ref_model is None else ("ref_model", ref_model)
        check_quantizable("ref_model_quantization", source, name, args)
    if args.offload_frozen_models:
        _check_movable(args, [*rewards, ("ref_model", ref_model)])


def _check_movable(args: PPOConfigX, models: list[tuple[str, Any]]) -> None:
    if spread_by(args) is not None:
        raise ValueError(
            f"`offload_frozen_models` does not go together with {spread_by(args)}, which has partitioned the frozen "
            "models over the ranks already. Leave it out; ZeRO-3 keeps them in host memory with `offload_param`."
        )
    for name, model in models:
        if getattr(model, "is_loaded_in_8bit", False):
            raise ValueError(
                f"`offload_frozen_models` cannot move `{name}`: an 8-bit layer of bitsandbytes keeps its weights "
                "outside its parameters once it has run. Load it in 4 bits, or leave the option out."
            )


def frozen_kwargs(args: PPOConfigX, init_kwargs: dict[str, Any], bits: str | None) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments for a frozen model in fewer `bits` or, to be offloaded, on the host."""
    if bits is not None:
        return init_kwargs | {"quantization_config": quantization(bits, args)}
    if args.offload_frozen_models and "quantization_config" not in init_kwargs:
        return {"device_map": None} | init_kwargs
    return init_kwargs


def send_to_host(
    args: PPOConfigX, actor: nn.Module, reference: nn.Module | None, reward_funcs: list[Any], accelerator: Accelerator
) -> "tuple[WaitingWeights, WaitingWeights]":
    """
    Move the weights of the reference and of the reward models to host memory, with a line, if `offload_frozen_models`
    says so; return the handles that bring them back.
    """
    if not args.offload_frozen_models:
        return WaitingWeights([]), WaitingWeights([])
    references = [] if reference is None else [reference]
    sources = [getattr(token_scorer(source), "model", source) for source in reward_funcs]
    rewards = [source for source in sources if isinstance(source, nn.Module)]
    stays = []
    if args.kl_estimator == "full":  # the exact KL reads the reference's head while learning
        stays = [accelerator.unwrap_model(model).get_output_embeddings() for model in references]
    of_reference = WaitingWeights(without_models_of(actor, references), stays)
    of_rewards = WaitingWeights(without_models_of(actor, rewards))
    accelerator.print(placement_line(of_reference, of_rewards, accelerator.device))
    return of_reference, of_rewards


class WaitingWeights:
    """
    Weights of frozen models that wait in host memory, and are on their devices within `on_device()`.

    They are not trained, so the host copy is made once, and moving back only drops the device's tensors. Weights that
    are in host memory from the start stay there.

    Args:
        models: frozen models, wrapped or not, on their devices.
        stays: modules whose parameters stay on the device.
    """

    def __init__(self, models: Iterable[nn.Module], stays: Iterable[nn.Module] = ()):
        kept = {id(parameter) for module in stays for parameter in module.parameters()}
        places = {(id(owner), name): (owner, name) for model in models for owner, name in _places(model)}
        self._places = [
            (owner, name)
            for owner, name in places.values()
            if id(owner) not in kept and not on_host(getattr(owner, name))
        ]
        self._devices = [getattr(owner, name).device for owner, name in self._places]
        self._waiting = [getattr(owner, name).to("cpu", copy=True) for owner, name in self._places]
        self._put(self._waiting)

    @property
    def gigabytes(self) -> float:
        """Size of the waiting weights in units of 10⁹ bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._waiting) / 1e9

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within the context, the models can be run."""
        there = (waiting.to(device, copy=True) for waiting, device in zip(self._waiting, self._devices, strict=True))
        try:
            self._put(there)
            yield
        finally:
            self._put(self._waiting)

    def _put(self, tensors: Iterable[Tensor]) -> None:
        for (owner, name), tensor in zip(self._places, tensors, strict=True):
            setattr(owner, name, tensor)


def on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield the places of a model's tensors, as object and attribute: parameters, buffers, 4-bit state."""
    for tensor in chain(model.parameters(), model.buffers()):
        yield tensor, "data"
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from ((part, name) for name in QUANT_STATE if isinstance(getattr(part, name, None), Tensor))


def without_models_of(actor: nn.Module, models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the models that share no parameter with the actor; the others stay where the actor is."""
    of_actor = {id(parameter) for parameter in actor.parameters()}
    return [model for model in models if not any(id(p) in of_actor for p in model.parameters())]


def placement_line(reference: WaitingWeights, rewards: WaitingWeights, device: torch.device) -> str:
    """Return the line that says what `offload_frozen_models` does in this run."""
    if reference.gigabytes + rewards.gigabytes > 0:
        return (
            f"Frozen models wait in host memory while nothing reads them: {rewards.gigabytes:.2f} GB of reward "
            f"models, {reference.gigabytes:.2f} GB of the reference."
        )
    why = "the run is on the CPU" if device.type == "cpu" else "no frozen model has weights of its own"
    return f"`offload_frozen_models` moves nothing: {why}."
