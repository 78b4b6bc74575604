"""Random sequences to try a model with before the first step, and how far rounding alone moves its answers."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .loading import base_of


LENGTHS = (12, 9)
SPECIAL = re.compile(r"_token_(id|index)$")
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")

# Differences that count as rounding: a mean of FLOOR nats for any model, and ROUNDINGS times the effect of rounding
# the embeddings once, since every layer rounds.
FLOOR, ROUNDINGS = 1e-4, 8


def probe_rows(model: Any) -> list[Tensor]:
    """Return two rows (1, L) of random ordinary tokens, of different lengths within the context."""
    config = model.config.get_text_config()
    contexts = [value for name in CONTEXTS if isinstance(value := getattr(config, name, None), int) and value > 0]
    shorten = max(LENGTHS) - min([max(LENGTHS), *contexts])
    ordinary = ordinary_tokens(model)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(ordinary), (1, max(length - shorten, 1)), generator=generator) for length in LENGTHS]
    return [ordinary[row].to(_device(model)) for row in rows]


def ordinary_tokens(model: Any) -> Tensor:
    """Return up to 1000 token ids without a special meaning in the config, such as padding or an image's place."""
    special: set[Any] = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if SPECIAL.search(name):
                special |= set(value) if isinstance(value, list) else {value}
    size = model.config.get_text_config().vocab_size
    return torch.tensor([token for token in range(min(size, 1000)) if token not in special] or [0])


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """
    Within the context every module is in training or in evaluation mode, and the run's random numbers are untouched.
    Float32 weights compute in float32 even if the run computes in 16 bits, whose rounding would hide differences.
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
    Return the mean difference of `answer()` that rounding explains on this model: ROUNDINGS times its change when the
    output of the embeddings is rounded once more, and at least FLOOR · `scale`.
    """
    expected = answer()
    with rounded_once(model):
        moved = (answer() - expected).abs().mean().item()
    return max(FLOOR * scale, ROUNDINGS * moved)


def require_causal(name: str, logps: Callable[[Tensor], Tensor], row: Tensor, allowed: float, do: str) -> None:
    """
    Raise `ValueError` for a model whose prediction after a token depends on the tokens that follow it: `logps`, from a
    row (1, L) to (L, V), by more nats on average than `allowed`. `name` and what it would `do` with answers are for
    the error.
    """
    half = (row.size(1) + 1) // 2
    change = (logps(row)[:half] - logps(row[:, :half])).abs().mean().item()
    if not change <= allowed:
        raise ValueError(
            f"{name} reads the tokens that follow: log-probabilities change by {change:.2g} nats on average "
            f"when they are taken away. It would {do} answers that it has read. Use a causal language "
            "model; families that can be both have `is_decoder=True` in the config for that."
        )


@torch.no_grad()
def apart_in_float32(
    policy: Any, reference: Any, as_reference: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> bool | None:
    """
    Return whether two models with float32 weights give different log-probabilities of random rows in float32; `None`
    if that cannot be tried. Within `as_reference`, the policy is the reference, if they are one model.
    """
    models = (policy, reference)
    if any(parameter.dtype != torch.float32 for model in models for parameter in model.parameters()):
        return None
    rows = probe_rows(policy)
    with in_mode(policy, training=False), in_mode(reference, training=False):
        try:
            expected = plain_logps(policy, rows)
            allowed = tolerance(policy, lambda: plain_logps(policy, rows))
            with as_reference():
                difference = (plain_logps(reference, rows) - expected).abs().mean().item()
        except Exception:  # of the family's own code, which asks for more than ids: nothing has been learnt
            return None
    return difference > allowed


def plain_logps(model: Any, rows: list[Tensor]) -> Tensor:
    """Return log-probabilities of rows (1, L) of ids by the model's own forward, without wrappers or autocast."""
    base = base_of(model)
    logits = [type(base).forward(base, input_ids=row, use_cache=False).logits[0, :-1] for row in rows]
    logps = [x.float().log_softmax(-1) for x in logits]
    return torch.cat([x.gather(-1, row[0, 1:, None].to(x.device))[:, 0] for x, row in zip(logps, rows, strict=True)])


@contextmanager
def rounded_once(model: Any, unit: float | None = None) -> Iterator[None]:
    """Within the context, embeddings are off by a share `unit`, by default the rounding unit of the arithmetic."""
    generator = torch.Generator().manual_seed(1)

    def shift(module: nn.Module, args: Any, states: Tensor) -> Tensor:
        sign = torch.randint(2, states.shape, generator=generator).to(states.device) * 2 - 1
        by = unit
        if by is None:
            by = torch.finfo(arithmetic(model)).eps
            by = max(by, 2**-11) if _device(model).type == "cuda" else by  # TF32 is float32 with 10 bits
        wide = states if states.dtype == torch.float64 else states.float()
        return (wide * (1 + by * sign)).to(states.dtype)

    handle = _embeddings(model).register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


def arithmetic(model: Any) -> torch.dtype:
    """Return the coarsest dtype that a model computes in here, by its weights, autocast and quantisation."""
    device = _device(model).type
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.is_autocast_enabled(device) and dtypes != {torch.float64}:
        dtypes.add(torch.get_autocast_dtype(device))
    wide = {dtype for dtype in dtypes if dtype.is_floating_point and torch.finfo(dtype).bits >= 16}
    if wide != dtypes:  # packed weights, read in 16 bits
        wide.add(torch.bfloat16)
    return max(wide, key=lambda dtype: torch.finfo(dtype).eps)


def _device(model: Any) -> torch.device:
    return _embeddings(model).weight.device


def _embeddings(model: Any) -> Any:
    """Return the module that reads token ids; if a wrapper does not name it, the first `nn.Embedding`."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return next(module for module in model.modules() if isinstance(module, nn.Embedding))
