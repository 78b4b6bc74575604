"""Runs with four roles on one base, from what `prepare` writes: base, reward adapter, adapter to start from."""

import tempfile
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import layouts
import ppo_runs
import tiny
from trl_ext import save_base_fingerprint


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def lora(task_type="CAUSAL_LM", **options):
    """Visible at this width: rank 2, scaled by 2."""
    return LoraConfig(
        **({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options), task_type=task_type
    )


def fill(model, seed, of=("lora_B", "score.modules_to_save")):
    """Makes an adapter one that changes the model, and its score head one that scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in of):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def save_adapter(base, folder, task_type, seed, fingerprint=True, **options):
    """An adapter for the model in `base`, with its tokenizer; for SEQ_CLS with a score head."""
    if task_type == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    fill(get_peft_model(model, lora(task_type, **options)), seed).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    if fingerprint:
        save_base_fingerprint([folder], base)
    return str(folder)


def prepare(folder, **overrides):
    """{name: path} of a base, a reward adapter of another form than the actor's, an adapter to start from."""
    base = tiny.save_tiny(folder, **overrides)["actor"]
    return {
        "base": base,
        "reward": save_adapter(base, Path(folder) / "reward", "SEQ_CLS", 1, r=3, target_modules=["k_proj", "up_proj"]),
        "start": save_adapter(base, Path(folder) / "start", "CAUSAL_LM", 2),
    }


def models(paths, start=False, quantization=NF4, **given):
    """Arguments of the trainer: a new adapter on the base, or training that starts from an adapter."""
    if start:
        base = AutoModelForCausalLM.from_pretrained(paths["base"], quantization_config=quantization)
        actor = {"model": PeftModel.from_pretrained(base, paths["start"], is_trainable=True)}
    else:
        actor = {"model": paths["base"], "peft_config": lora(), "quantization_config": quantization}
    return actor | {"reward_model": paths["reward"]} | given


def tensors_of_base(*modules):
    """{address: bytes} of every tensor of weights in `modules`, 4-bit states included, adapters and heads left out."""
    found = {}
    for module in modules:
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            if any(part in name for part in ("lora_", "score", "modules_to_save")):
                continue
            state = getattr(tensor, "quant_state", None)
            nested = getattr(state, "state2", None)
            parts = [
                tensor,
                *(getattr(s, n, None) for s in (state, nested) if s for n in ("absmax", "code", "offset")),
            ]
            for part in parts:
                if isinstance(part, torch.Tensor):
                    storage = part.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


# --- two processes

FOLDERS = {"base": "actor", "reward": "reward", "start": "start"}
CASES = {
    "new adapter, 4 bits": {"start": False, "quantization": NF4},
    "from an adapter, checkpointed": {"start": True, "quantization": None, "gradient_checkpointing": True},
}


def run(paths, size, accumulation, start, quantization, **options):
    """Log lines and trained parameters of a run on given responses, `size × accumulation` prompts per process."""
    given = models(paths, start, quantization, train_dataset=layouts.PROMPTS, rollout_func=layouts.answer)
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    settings = layouts.SETTINGS | sizes | {"critic": "adapter", "gradient_checkpointing": False} | options
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        trainer = ppo_runs.ppo_trainer(folder, given, **settings)
        fill(trainer.model, 5, of=("lora_B.critic",))
        for parameter in trainer.model.parameters():  # bfloat16 rounds the sums of two layouts apart
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer.train()
    lines = [{k: line[k] for k in line if k.startswith(layouts.LOGGED)} for line in ppo_runs.log_lines(trainer)]
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"lines": lines, "parameters": trained}


def measure(folder):
    """In each of two processes: every case."""
    return {name: run(paths_in(folder), 2, 2, **case) for name, case in CASES.items()}


def paths_in(folder):
    """What `prepare` has written there."""
    return {name: str(folder / part) for name, part in FOLDERS.items()}
