"""
Frozen models that wait in host memory or have 4 bits, on two processes under DDP or ZeRO-2, and what the runs log:

    PYTHONPATH=.:tests/helpers torchrun --standalone --nproc_per_node 2 tests/helpers/two_processes.py \\
        tests/helpers/frozen_layouts.py MEASURED.pt FOLDER [zero2]

`FOLDER` holds `model`, `reward_model`, `reference` and `text_reward`, which has a tokenizer of its own.
"""

import os
import sys
import tempfile
from unittest import mock

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import dpo_runs
import ppo_runs
import two_processes
from trl_ext.ppo.roles import offload


LOGGED = ("loss", "terms/", "kl/", "reward/", "rewards/", "value/")
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
QUARTER = {"reward_model_quantization": "4bit", "ref_model_quantization": "4bit"}
RUNS = {"plain": {}, "waiting": {"offload_frozen_models": True}, "4 bits": QUARTER}


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


def main(path, folder, engine="ddp"):
    options = {"deepspeed": ZERO2} if engine == "zero2" else {}
    measured = {name: ppo(folder, **run, **options) for name, run in RUNS.items()}
    two_processes.write(measured | {"dpo": dpo(folder, **options)}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
