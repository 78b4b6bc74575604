"""
Run every case of `parity_cases.py` with TRL 1.12's `PPOTrainer`, in an environment of its own, and save what it
computes: `python trl112_worker.py FOLDER`, where FOLDER holds the four models.
"""

import importlib
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from parity_cases import (
    CASES,
    COMMON,
    EQUAL,
    HELD_OUT,
    MORE,
    PAD,
    PENALTY,
    PROMPTS,
    watched_optimizer,
    whitening_scale,
)


# Locals of `PPOTrainer.train` when it whitens the advantages, (B, T) or (B,).
OF_A_ROLLOUT = (
    *("queries", "responses", "padding_mask", "padding_mask_p1", "logprobs", "ref_logprobs", "values", "scores"),
    *("kl", "non_score_reward", "rewards", "advantages", "returns"),
)


def in_order(*args: Any, **kwargs: Any) -> DataLoader:
    """Return a data loader that does not shuffle."""
    return DataLoader(*args, **kwargs | {"shuffle": False})


def run(name: str, folder: Path) -> dict[str, Any]:
    """Return the rollouts, micro-batches, optimizer steps, completions and log of a case."""
    # Not an import statement: those of TRL's private names belong in trl_ext/_trl.py, for the supported version.
    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    answers, more = CASES[name]
    options = COMMON | {"output_dir": str(folder / "trl112")} | more
    actor, reference = (AutoModelForCausalLM.from_pretrained(folder / role) for role in ("actor", "reference"))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / role) for role in ("reward", "value"))
    if name in PENALTY:
        actor.generation_config.repetition_penalty = PENALTY[name]
    # Its advantages are smaller than those here by this factor: so the actor moves equally far.
    scale = whitening_scale(name) if name in EQUAL else 1.0
    rate = options["learning_rate"]
    optimizer, steps = watched_optimizer(actor, value, (rate * scale, rate))
    with mock.patch.object(module, "DataLoader", in_order):
        trainer = module.PPOTrainer(
            args=module.PPOConfig(**options),
            processing_class=AutoTokenizer.from_pretrained(folder / "actor", padding_side="left"),
            model=actor,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": PROMPTS + MORE}),
            eval_dataset=Dataset.from_dict({"input_ids": HELD_OUT}),
            optimizers=(optimizer, None),
        )
    seen: dict[str, Any] = {"rollouts": [], "micro_batches": [], "steps": steps, "completions": []}
    generate, whiten, backward = module.batch_generation, module.masked_whiten, trainer.accelerator.backward

    def give(model: Any, queries: Any, *args: Any) -> Any:
        of_prompt = {tuple(prompt): answer for prompt, answer in zip(PROMPTS + MORE, answers + answers, strict=True)}
        given = [of_prompt[tuple(i for i in row if i != PAD)] for row in queries.tolist()]
        longest = max(map(len, answers))
        padded = torch.tensor([answer + [PAD] * (longest - len(answer)) for answer in given])
        sequences = torch.cat([queries, padded], 1)
        logits = module.forward(model, sequences, PAD).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits / (options["temperature"] + 1e-7)

    def keep_rollout(values: Any, mask: Any, shift_mean: bool = True) -> Any:
        whitened = whiten(values, mask, shift_mean)
        if shift_mean:
            names = inspect.currentframe().f_back.f_locals
            seen["rollouts"].append({each: names[each].detach().clone() for each in OF_A_ROLLOUT})
            seen["rollouts"][-1]["whitened"] = whitened.masked_fill(names["padding_mask"], 0)
        return whitened

    def keep_micro_batch(loss: Any, **kwargs: Any) -> None:
        names = inspect.currentframe().f_back.f_locals
        losses = {each: names[each].item() for each in ("pg_loss", "vf_loss", "loss")}
        seen["micro_batches"].append(losses | {"rows": names["micro_batch_inds"].tolist()})
        backward(loss, **kwargs)

    def keep_completions(model: Any, queries: Any, batch: int, pad: int, config: Any) -> Any:
        seen["completions"].append((len(queries), config.temperature))
        return generate(model, queries, batch, pad, config)

    trainer.accelerator.backward = keep_micro_batch
    batch_generation = generate if answers is None else give
    with mock.patch.multiple(module, masked_whiten=keep_rollout, batch_generation=batch_generation):
        trainer.train()
    with mock.patch.object(module, "batch_generation", keep_completions):
        trainer.generate_completions()
    return seen | {"log": [line for line in trainer.state.log_history if "loss/policy_avg" in line]}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in CASES:
        try:
            found[name] = run(name, folder)
        except AssertionError as error:
            found[name] = str(error)
    torch.save(found, folder / "trl112.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
