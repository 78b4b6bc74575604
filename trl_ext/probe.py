"""A few random sequences to ask a model about before the first step, and how far rounding alone moves its answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


LENGTHS = (12, 9)
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")

# A mean difference in nats that is rounding whatever the model; and how many times what one rounding, of the
# embeddings, does to a model's answers is still rounding: there is one in every layer.
FLOOR, ROUNDINGS = 1e-4, 8


def probe_rows(model: Any) -> list[Tensor]:
    """Two rows (1, L) of random token ids, of different lengths within the context, without special tokens."""
    config = model.config.get_text_config()
    contexts = [value for name in CONTEXTS if isinstance(value := getattr(config, name, None), int) and value > 0]
    shorten = max(LENGTHS) - min([max(LENGTHS), *contexts])
    special: set[Any] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = getattr(config, name, None)
        special |= set(ids) if isinstance(ids, list) else {ids}
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(ordinary), (1, max(length - shorten, 1)), generator=generator) for length in LENGTHS]
    return [ordinary[row].to(_device(model)) for row in rows]


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """
    Within the context every module trains, or evaluates, and draws no random number that the run would miss. Weights
    in float32 are asked in float32, also where the run computes in 16 bits: what differs there hides in rounding.
    """
    modes = {module: module.training for module in model.modules()}
    device = _device(model)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    autocast = nullcontext() if dtypes - {torch.float32} else torch.autocast(device.type, enabled=False)
    model.train(training)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tolerance(model: Any, answer: Callable[[], Tensor], scale: float = 1.0) -> float:
    """
    The mean difference of `answer()` that rounding explains on this model, in its arithmetic: ROUNDINGS times what
    it changes when the output of the embeddings is rounded once more, and at least FLOOR · `scale`.
    """
    generator = torch.Generator().manual_seed(1)

    def round_once_more(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        up = torch.rand(output.shape, generator=generator).round().to(output)
        return output + output * (2 * up - 1) * _precision(model)

    expected = answer()
    handle = _embeddings(model).register_forward_hook(round_once_more)
    try:
        moved = (answer() - expected).abs().mean().item()
    finally:
        handle.remove()
    return max(FLOOR * scale, ROUNDINGS * moved)


def _precision(model: Any) -> float:
    """The relative rounding error of the arithmetic at hand, by the model's weights, autocast and quantisation."""
    device = _device(model).type
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if any(not dtype.is_floating_point for dtype in dtypes):  # packed weights, read in 16 bits
        dtypes.add(torch.bfloat16)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return max(coarsest, 2**-11) if device == "cuda" else coarsest  # TF32 is float32 with 10 bits


def _device(model: Any) -> torch.device:
    return _embeddings(model).weight.device


def _embeddings(model: Any) -> Any:
    """The module that reads token ids; of a wrapper that does not say, the first of its kind."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return next(module for module in model.modules() if isinstance(module, nn.Embedding))
