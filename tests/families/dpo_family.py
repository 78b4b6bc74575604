"""Is DPO exact on a family? One step of the trainer beside the plain forward's and `trl.DPOTrainer`'s."""

import contextlib
import functools
import io
import logging
import math
import random
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import dpo_runs
import tiny
from plain import apart, chosen, dpo_loss, gradients, in_precision, one_line, plain_distribution

from .configs import member
from .verdict import NOISE, ROUNDINGS, WITHOUT_AUX_LOSS, Verdict, is_refusal


EXACT = 2e-5  # of TRL's loss, metrics and gradient in float32; on some processors one family is at 1.05e-5
PLAIN = 2e-4  # of the plain forward's, which sums in another order

Pairs = list[tuple[list[int], ...]]  # ids of prompt, chosen and rejected completion


def pairs() -> Dataset:
    """
    Ragged pairs, longer than every window of `configs`; completions that begin alike, and one that is empty. No word
    comes twice in a sequence: top-k over tokens would have ties, which some layouts break otherwise.
    """
    rng = random.Random(0)
    rows = [rng.sample(tiny.WORDS, len(tiny.WORDS)) for _ in range(4)]
    sizes = [
        (19, 0, 12, 17),
        (7, 11, 14, 1),
        (1, 0, 25, 0),
        (12, 11, 0, 9),
    ]  # prompt, common beginning, chosen, rejected
    texts = [_pair(words, *of_row) for words, of_row in zip(rows, sizes, strict=True)]
    return Dataset.from_list(texts)


def _pair(words: list[str], prompt: int, alike: int, good: int, bad: int) -> dict[str, str]:
    common, rest = words[prompt : prompt + alike], words[prompt + alike :]
    sides = (common + rest[:good], common + rest[good : good + bad])
    chosen_text, rejected_text = (" ".join(side) or "<eos>" for side in sides)
    return {"prompt": " ".join(words[:prompt]) + " ", "chosen": chosen_text, "rejected": rejected_text}


def tokenised_pairs() -> Pairs:
    """The ids of `pairs` as TRL's trainer makes them: a completion ends with an eos."""
    tokenizer = tiny.tiny_tokenizer()
    ids = [{part: tokenizer(row[part])["input_ids"] for part in row} for row in pairs().to_list()]
    sides = [[row[side] + [2] * (row[side][-1:] != [2]) for side in ("chosen", "rejected")] for row in ids]
    return [(row["prompt"], *both) for row, both in zip(ids, sides, strict=True)]


def models(family: str, noise: float) -> dict[str, nn.Module]:
    """Actor and another reference."""
    return {role: member(family, seed, noise) for seed, role in enumerate(("model", "ref_model"))}


class Step:
    """One optimizer step of a trainer: its log line, its gradients, and how the actor read the pairs."""

    def __init__(self, side: tuple[type, type], family: str, precision: str, noise: float, more: dict[str, float]):
        keep = dpo_runs.KeepGradients()
        given = models(family, noise) | {"train_dataset": pairs(), "callbacks": [keep]}
        options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9, "bf16": precision == "bf16", **more}
        silent = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, heard() as self.warnings, silent:
            trainer = dpo_runs.dpo_trainer(folder, given, side, train_sampling_strategy="sequential", **options)
            read: list[int] = []  # rows of every batch that the actor embeds; the last one is the loss's
            embeddings = given["model"].get_input_embeddings()
            embeddings.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
            trainer.train()
        self.line, self.gradient = dpo_runs.lines(trainer)[0], keep.steps[0]
        self.rows = "TRL's rows" if read[-1:] == [2 * len(pairs())] else "shared rows"
        self.aux_loss_coef = trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Within the context, the warnings of trl_ext's own loggers, in the list that it yields."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trl_ext")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class Plainly:
    """The same step from the plain forward of both models, sequence by sequence."""

    def __init__(self, family: str, precision: str, noise: float, aux_loss_coef: float = 0.0):
        both, rows = models(family, noise), tokenised_pairs()  # models in evaluation mode
        with in_precision(precision):
            own = [[_logp(both["model"], prompt, side) for side in sides] for prompt, *sides in rows]
            with torch.no_grad():
                ref = [[_logp(both["ref_model"], prompt, side) for side in sides] for prompt, *sides in rows]
            loss = dpo_loss(own, ref, beta=0.1)
            if aux_loss_coef:
                loss = loss + aux_loss_coef * _aux_loss(both["model"], rows)
        loss.backward()
        self.gradient = gradients(both["model"])
        self.logps = torch.tensor(own)
        chosen_logps, rejected_logps = self.logps.mean(dim=0).tolist()
        self.line = {"loss": loss.item(), "logps/chosen": chosen_logps, "logps/rejected": rejected_logps}


def _logp(model: nn.Module, prompt: list[int], side: list[int]) -> Tensor:
    return chosen(plain_distribution(model, prompt, side), side).sum()


def _aux_loss(model: nn.Module, rows: Pairs) -> Tensor:
    """The load-balancing loss, which by TRL's definition is of the padded batch."""
    whole = [prompt + sides[i] for i in (0, 1) for prompt, *sides in rows]
    length = max(map(len, whole))
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in whole])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in whole])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


def of_line(line: dict[str, float], right: dict[str, float]) -> float:
    """The largest relative difference of a number of a log line; what is nearly 0 counts as 0.1."""
    left_out = ("runtime", "per_second", "time", "total_flos", "rewards/accuracies", "epoch", "step")
    names = [name for name in right if not name.endswith(left_out)]
    return max(abs(line.get(name, math.nan) - right[name]) / max(abs(right[name]), 0.1) for name in names)


def differences(step: Any, right: Any, tolerance: float, whose: str) -> dict[str, float]:
    """Of the log line and of the gradient, over the tolerance."""
    return {
        f"{whose} numbers": of_line(step.line, right.line) / tolerance,
        f"{whose} gradient": apart(step.gradient, right.gradient) / tolerance,
    }


plainly = functools.cache(Plainly)


@functools.cache
def trls_step(family: str, precision: str) -> tuple[Step | None, str]:
    """TRL's own step, or `None` and why; without the auxiliary loss, and why, where TRL cannot compute that."""
    reasons = []
    for more in ({}, WITHOUT_AUX_LOSS):
        try:
            return Step(dpo_runs.TRLS, family, precision, 0.0, more), "".join(reasons)
        except Exception as error:  # whatever it is, it is TRL's
            reasons.append(one_line(error))
    return None, reasons[0]


def judge(family: str, noise: float = NOISE) -> dict[str, Verdict]:
    """The verdicts by precision."""
    return {precision: judge_one(family, precision, noise) for precision in ("float32", "bf16")}


def judge_one(family: str, precision: str, noise: float) -> Verdict:
    try:
        plainly(family, precision, noise)
    except Exception as error:  # there is nothing to compare with
        return Verdict("transformers fails", reason=one_line(error))
    _, without_aux_loss = trls_step(family, "float32")
    try:
        step = Step(dpo_runs.OURS, family, precision, noise, WITHOUT_AUX_LOSS if without_aux_loss else {})
    except Exception as error:
        if is_refusal(error):
            return Verdict("refused", reason=one_line(error))
        trls, _ = trls_step(family, precision)
        return Verdict("crashed" if trls else "TRL fails", reason=one_line(error))
    numbers = _in_float32(family, noise, step) if precision == "float32" else _in_bf16(family, noise, step)
    outcome = "exact" if max(numbers.values()) <= 1 else "wrong"
    return Verdict(outcome, step.rows, "; ".join(step.warnings), numbers)


def _in_float32(family: str, noise: float, step: Step) -> dict[str, float]:
    """Differences over their tolerances; from TRL's numbers where these are the model's."""
    right, (trls, _) = plainly(family, "float32", noise, step.aux_loss_coef), trls_step(family, "float32")
    numbers = differences(step, right, PLAIN, "the plain forward's")
    if trls is not None and max(differences(trls, right, PLAIN, "TRL's").values()) <= 1:
        numbers |= differences(step, trls, EXACT, "TRL's")
    return numbers


def _in_bf16(family: str, noise: float, step: Step) -> dict[str, float]:
    """Differences from float32, over three times what rounding alone makes of the plain forward."""
    right, rounded = (plainly(family, precision, noise, step.aux_loss_coef) for precision in ("float32", "bf16"))
    of_gradient = apart(rounded.gradient, right.gradient)
    of_logps = (rounded.logps - right.logps).square().mean().sqrt().item() + 1e-3  # nats of a sequence
    allowed = {"loss": 0.1 * of_logps, "logps/chosen": of_logps, "logps/rejected": of_logps}
    numbers = {name: abs(step.line[name] - right.line[name]) / size / ROUNDINGS for name, size in allowed.items()}
    return numbers | {"gradient": apart(step.gradient, right.gradient) / of_gradient / ROUNDINGS}
