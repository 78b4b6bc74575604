"""Is PPO exact on a family? One rollout and its step beside slow loops over the plain forward of each model."""

import contextlib
import copy
import io
import math
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification as CLASSIFIER
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import dpo_runs
import oracles
import ppo_runs
import tiny
from plain import apart, chosen, gradients, in_precision, one_line, plain_distribution, plain_values

from .configs import member
from .verdict import NOISE, ROUNDINGS, WITHOUT_AUX_LOSS, Verdict, is_refusal


EXACT = 3e-4  # of the plain forward's numbers, which sum in another order; one family's gradient is at 2.1e-4
READS_PADDING = "its forward gives a sequence other numbers when padding is behind it, as with ties in a top-k"
COEFFICIENTS = {"kl_coef": 0.1, "vf_coef": 0.5, "ent_coef": 0.05}


def prompts() -> Dataset:
    """Four prompts of 1 to 19 words, so that the batch is padded on the left."""
    rng = random.Random(0)
    return Dataset.from_dict({"prompt": [" ".join(rng.sample(tiny.WORDS, count)) for count in (19, 7, 1, 12)]})


def has_classifier(family: str) -> bool:
    return family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def models(family: str, critic: str, noise: float) -> dict[str, nn.Module]:
    """Actor, another reference, and a reward model: of the family where the critic is a copy of it, else a Llama."""
    of_family = critic == "model"
    return {
        "model": member(family, 0, noise),
        "ref_model": member(family, 1, noise),
        "reward_model": member(family, 2, noise, of=CLASSIFIER) if of_family else tiny.tiny_reward_model(),
    }


class Step:
    """One rollout and its optimizer step: what the trainer holds of them, as lists of each sequence's real tokens."""

    def __init__(self, family: str, critic: str, precision: str, noise: float, **more: Any):
        keep = dpo_runs.KeepGradients()
        given = models(family, critic, noise) | {"train_dataset": prompts(), "callbacks": [keep]}
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_ppo_epochs": 1}
        options |= {"total_episodes": 4, "response_length": 8, "num_sample_generations": 0, "max_grad_norm": 1e9}
        options |= {"missing_eos_penalty": None, "gradient_checkpointing": False, "use_cpu": True}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            trainer = ppo_runs.ppo_trainer(
                folder, given, critic=critic, bf16=precision == "bf16", **options, **COEFFICIENTS, **more
            )
            if critic == "head":  # it starts at 0
                torch.manual_seed(3)
                torch.nn.init.normal_(trainer.critic.score.weight, std=0.5)
                torch.nn.init.normal_(trainer.critic.score.bias, std=0.5)
            self.head = {name: tensor.clone() for name, tensor in trainer.critic.state_dict().items()}
            trainer.train()
        self.args, self.line, self.gradient = trainer.args, ppo_runs.log_lines(trainer)[0], keep.steps[0]
        held = trainer.run_state.rollout
        self.prompts, self.responses = zip(*ppo_runs.sequences(held), strict=True)
        per_token = {"logps": held.old_logps, "ref_logps": held.ref_logps, "values": held.old_values}
        self.columns = {name: tensor[held.mask].float() for name, tensor in per_token.items()}
        self.columns["scores"] = held.scores
        self.columns["entropy"] = torch.tensor([self.line["terms/entropy"]])


class Plainly:
    """The same rollout from the plain forward of each model, and the gradient of the total from slow loops."""

    def __init__(self, family: str, critic: str, step: Step, precision: str, noise: float):
        self.step = step
        made = models(family, critic, noise)  # in evaluation mode
        self.actor, self.reference, self.reward_model = (made[name] for name in ("model", "ref_model", "reward_model"))
        self.critic: Any = copy.deepcopy(self.reward_model)
        if critic == "head":
            self.critic = nn.Linear(step.head["score.weight"].size(-1), 1)
            self.critic.load_state_dict({name.removeprefix("score."): value for name, value in step.head.items()})
        else:
            self.critic.config.pad_token_id = -1  # an answer may go on from the pad token, as from any other
        with in_precision(precision):
            rows = [self._score(*pair) for pair in zip(step.prompts, step.responses, strict=True)]
        columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        self._total(**columns).backward()
        self.columns = {name: column.detach() for name, column in columns.items()}
        prefix = "critic.score." if critic == "head" else "critic.model."
        of_critic = {prefix + name: gradient for name, gradient in gradients(self.critic).items()}
        self.gradient = gradients(self.actor) | of_critic

    def _score(self, prompt: list[int], response: list[int]) -> dict[str, Tensor]:
        """What the models say of a sequence, (T,) each, and its score (1,)."""
        temperature = self.step.args.temperature
        distribution = plain_distribution(self.actor, prompt, response, temperature)
        ended = response[:-1] if response[-1] < len(tiny.SPECIAL_TOKENS) else response
        as_trained = torch.tensor([prompt + ended + [2]])  # a reward model knows answers that end
        with torch.no_grad():
            of_reference = plain_distribution(self.reference, prompt, response, temperature)
            scores = self.reward_model(input_ids=as_trained).logits[0].float()
        return {
            "logps": chosen(distribution, response),
            "ref_logps": chosen(of_reference, response),
            "values": self._values(prompt, response),
            "entropy": -(distribution.exp() * distribution).sum(-1),
            "scores": scores,
        }

    def _values(self, prompt: list[int], response: list[int]) -> Tensor:
        if not isinstance(self.critic, nn.Linear):
            return plain_values(self.critic, prompt, response).float()
        trunk = self.actor.base_model(input_ids=torch.tensor([prompt + response]))
        with torch.autocast("cpu", enabled=False):  # the head is in float32
            return self.critic(trunk.last_hidden_state[0, len(prompt) - 1 : -1].float())[:, 0]

    def _total(self, logps: Tensor, ref_logps: Tensor, values: Tensor, entropy: Tensor, scores: Tensor) -> Tensor:
        """Of the first step: the ratio is 1, the advantages are whitened, the KL is k2; a mean over all tokens."""
        args = self.step.args
        old_values = values.split([len(response) for response in self.step.responses])
        advantages, returns = [], []
        for old, score in zip((value.tolist() for value in old_values), scores.tolist(), strict=True):
            own = oracles.gae([0.0] * (len(old) - 1) + [score], old, args.gamma, args.lam)
            advantages += own
            returns += [advantage + value for advantage, value in zip(own, old, strict=True)]
        _, mean, variance = oracles.moments(advantages)
        white = torch.tensor([(advantage - mean) / math.sqrt(variance + 1e-8) for advantage in advantages])
        return (
            -(white * (logps - logps.detach()).exp()).mean()
            + COEFFICIENTS["kl_coef"] * (0.5 * (logps - ref_logps).square()).mean()
            + COEFFICIENTS["vf_coef"] * (0.5 * (values - torch.tensor(returns)).square()).mean()
            - COEFFICIENTS["ent_coef"] * entropy.mean()
        )


def judge(family: str, noise: float = NOISE) -> dict[str, Verdict]:
    """The verdicts by kind of critic, and under bf16 autocast."""
    last = "model" if has_classifier(family) else "head"
    variants = {"head": ("head", "float32"), "model": (last, "float32"), "bf16": (last, "bf16")}
    if last == "head":  # transformers has no such critic
        del variants["model"]
    return {name: judge_one(family, *variant, noise) for name, variant in variants.items()}


def judge_one(family: str, critic: str, precision: str, noise: float) -> Verdict:
    for more in ({}, WITHOUT_AUX_LOSS):
        try:
            step = Step(family, critic, precision, noise, **more)
            break
        except Exception as error:  # a crash is a verdict
            if is_refusal(error):
                return Verdict("refused", reason=one_line(error))
            reason = one_line(error)
    else:
        failure = transformers_fails(family, precision)
        return Verdict("transformers fails" if failure else "crashed", reason=failure or reason)
    try:
        right = Plainly(family, critic, step, "float32", noise)
        rounded = right if precision == "float32" else Plainly(family, critic, step, precision, noise)
    except Exception as error:  # there is nothing to compare with
        return Verdict("transformers fails", reason=one_line(error))
    numbers = _numbers(step, right, rounded)
    if max(numbers.values()) <= 1:
        return Verdict("exact", numbers=numbers)
    if reads_padding(member(family, 0, noise), step):
        return Verdict("transformers fails", reason=READS_PADDING, numbers=numbers)
    return Verdict("wrong", numbers=numbers)


def _numbers(step: Step, right: Plainly, rounded: Plainly) -> dict[str, float]:
    """Differences, by root mean square, over what order of sums and, in bfloat16, rounding explain."""
    numbers = {}
    for name, column in right.columns.items():
        allowed = EXACT * (1 + _rms(column)) + ROUNDINGS * _rms(rounded.columns[name] - column)
        held = step.columns[name]
        if len(held) == 1:  # logged as a mean
            column = column.mean()
        numbers[name] = _rms(held - column) / allowed
    allowed = EXACT + ROUNDINGS * apart(rounded.gradient, right.gradient)
    return numbers | {"gradient": apart(step.gradient, right.gradient) / allowed}


def _rms(numbers: Tensor) -> float:
    return numbers.square().mean().sqrt().item()


@torch.no_grad()
def reads_padding(actor: nn.Module, step: Step) -> bool:
    """Whether the model's own forward gives a sequence other numbers when padding is behind it."""
    for prompt, response in zip(step.prompts, step.responses, strict=True):
        ids = torch.tensor([prompt + response])
        padded, mask = nn.functional.pad(ids, (0, 9)), nn.functional.pad(torch.ones_like(ids), (0, 9))
        alone, beside = actor(input_ids=ids).logits, actor(input_ids=padded, attention_mask=mask).logits
        if (beside[:, : ids.size(1)] - alone).abs().max() > EXACT * alone.abs().max():
            return True
    return False


def transformers_fails(family: str, precision: str) -> str:
    """What goes wrong when transformers generates with the family, padded on the left, or trains it; else empty."""
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    sampling = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    try:
        with in_precision(precision):
            member(family, 0).generate(input_ids=ids, attention_mask=mask, **sampling)
            plain_distribution(member(family, 0), ids[0, :4].tolist(), ids[0, 4:].tolist()).sum().backward()
    except Exception as error:  # whatever it is, it is the family's
        return one_line(error)
    return ""
