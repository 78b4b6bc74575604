"""Frozen models that wait in host memory or have 4 bits, on two processes, and what the runs log."""

import os
import tempfile
from unittest import mock

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import dpo_runs
import ppo_runs
import tiny
import zero_runs
from trl_ext.ppo.roles import offload


LOGGED = ("loss", "terms/", "kl/", "reward/", "rewards/", "value/")
QUARTER = {"reward_model_quantization": "4bit", "ref_model_quantization": "4bit"}
RUNS = {"plain": {}, "waiting": {"offload_frozen_models": True}, "4 bits": QUARTER}


SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # what bitsandbytes can pack on a CPU


def save(folder):
    """Writes the models; `text_reward` has a tokenizer of its own."""
    own_tokenizer = tiny.tiny_tokenizer()
    own_tokenizer.add_tokens(["zebra"])
    models = {
        "model": (tiny.tiny_actor(**SIZES), tiny.tiny_tokenizer()),
        "reference": (tiny.tiny_actor(5, **SIZES), tiny.tiny_tokenizer()),
        "reward_model": (tiny.tiny_reward_model(**SIZES), tiny.tiny_tokenizer()),
        "text_reward": (tiny.tiny_reward_model(7, vocab_size=65, **SIZES), own_tokenizer),
    }
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


class Poisoned(offload.WaitingWeights):
    """While weights wait, those in the model are NaN."""

    def _put(self, tensors):
        if tensors is self._waiting:
            tensors = [torch.full_like(t, torch.nan) if t.is_floating_point() else t for t in tensors]
        super()._put(tensors)


def ppo(folder, **options):
    """Log lines of two rollouts, and the kinds of linear layers in reference and rewards."""
    unset_hf_deepspeed_config()  # of the run before
    paths = {name: os.path.join(folder, name) for name in ("model", "reward_model", "reference", "text_reward")}
    models = {"model": paths["model"], "reward_model": paths["reward_model"], "ref_model": paths["reference"]}
    models |= {"value_model": paths["reward_model"], "reward_funcs": [paths["text_reward"]]}
    fixed = {"use_cpu": True, "num_sample_generations": 0, "optim": "sgd", "learning_rate": 0.1, "total_episodes": 16}
    waiting = options.get("offload_frozen_models", False)
    with (
        tempfile.TemporaryDirectory() as output,
        mock.patch.object(offload, "on_host", return_value=not waiting),
        mock.patch.object(offload, "WaitingWeights", Poisoned),
    ):
        trainer = ppo_runs.ppo_run(output, models, **(fixed | options))
    first, second = trainer.reward_funcs
    roles = {"reference": trainer.ref_model, "reward_model": first.model, "text_reward": second}
    layers = {name: sorted({type(m).__name__ for m in _linear(model)}) for name, model in roles.items()}
    lines = [{k: v for k, v in line.items() if k.startswith(LOGGED)} for line in ppo_runs.log_lines(trainer)]
    gigabytes = trainer._reference_weights.gigabytes, trainer._reward_weights.gigabytes
    return {"lines": lines, "layers": layers, "gigabytes": gigabytes}


def dpo(folder, **options):
    """Log lines of DPO with a reference in 4 bits."""
    unset_hf_deepspeed_config()
    models = {"model": os.path.join(folder, "model"), "ref_model": os.path.join(folder, "reference")}
    with tempfile.TemporaryDirectory() as output:
        trainer = dpo_runs.dpo_run(output, models, ref_model_quantization="4bit", **options)
    layers = sorted({type(m).__name__ for m in _linear(trainer.ref_model)})
    return {"losses": [line["loss"] for line in dpo_runs.lines(trainer)], "layers": layers}


def _linear(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def measure(folder, engine):
    """Of the models of `save`, under "ddp" or "zero2"."""
    options = {"deepspeed": zero_runs.only_stage(2)} if engine == "zero2" else {}
    measured = {name: ppo(folder, **run, **options) for name, run in RUNS.items()}
    return measured | {"dpo": dpo(folder, **options)}
