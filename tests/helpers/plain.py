"""A model's own forward of one sequence at a time, without padding: what proofs compare with. No trl_ext here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Ids = list[int]


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Within the context, models compute in "float32" or, as mixed precision does, under "bf16" autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


def plain_distribution(model: nn.Module, prompt: Ids, response: Ids, temperature: float = 1.0) -> Tensor:
    """(T, V) log-probabilities of the next token, nats, at the positions that choose the response's T tokens."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1)


def chosen(distribution: Tensor, response: Ids) -> Tensor:
    """(T,) log-probabilities of the response's tokens."""
    return distribution.gather(-1, torch.tensor(response)[:, None])[:, 0]


def plain_logps(model: nn.Module, prompt: Ids, response: Ids, temperature: float = 1.0) -> Tensor:
    """(T,) log-probabilities of the response's tokens, nats."""
    return chosen(plain_distribution(model, prompt, response, temperature), response)


def plain_values(classifier: nn.Module, prompt: Ids, response: Ids) -> Tensor:
    """(T,) what a classifier says of the sequence as it is before each of the response's tokens."""
    ids = torch.tensor([prompt + response])
    return torch.stack([classifier(input_ids=ids[:, : len(prompt) + t]).logits[0, 0] for t in range(len(response))])


def dpo_loss(pairs: list[tuple[Tensor, Tensor]], ref_pairs: list[tuple[Tensor, Tensor]], beta: float) -> Tensor:
    """Rafailov 2023, eq. 7: the mean of −log σ(β(log-ratio of the chosen − that of the rejected)), nats per pair."""
    margins = [
        (good - ref_good) - (bad - ref_bad) for (good, bad), (ref_good, ref_bad) in zip(pairs, ref_pairs, strict=True)
    ]
    return -F.logsigmoid(beta * torch.stack(margins)).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by the parameter's name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖one − other‖ / ‖other‖ over all parameters; a missing gradient is 0."""

    def square(tensors: Iterator[Tensor]) -> float:
        return sum(tensor.double().square().sum().item() for tensor in tensors)

    names = one.keys() | other.keys()
    shape = {name: one.get(name, other.get(name)) for name in names}
    difference = (
        one.get(name, torch.zeros_like(like)) - other.get(name, torch.zeros_like(like)) for name, like in shape.items()
    )
    return (square(difference) / square(iter(other.values()))) ** 0.5


def one_line(error: BaseException) -> str:
    """An error's type and message, without what differs between runs, in one line."""
    message = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '…/', message)}"
