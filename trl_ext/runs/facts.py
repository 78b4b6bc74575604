"""Describe a run in words: the model, the adapter, the data, the machine, the options."""

import dataclasses
import re
from importlib import import_module
from typing import Any

import peft
import torch
from accelerate.utils import is_peft_model

from .._trl import get_config_model_id
from ..models.loading import base_of
from .folder import read_facts, without_place


ATTACHED = ("critic", "reward_model")  # modules that hang on an actor and are no part of it


def base_name(model: Any) -> str:
    """Return what the model was trained from: a hub name, the name of a folder, or else the architecture."""
    return without_place(get_config_model_id(model.config) or "") or type(base_of(model)).__name__


def model_facts(model: Any) -> dict[str, Any]:
    """Return the model, and how much of it is trained; what is not known is `None`."""
    trained, total = _sizes(model)
    if is_peft_model(model):
        how = f"{adapter_words(model.peft_config[model.active_adapter])}; {trained:,} of {total:,} parameters"
    else:
        how = "in full" if trained == total else f"{trained:,} of {total:,} parameters"
    return {
        "model": base_name(model),
        "architecture": type(base_of(model)).__name__,
        "parameters": f"{total:,}",
        "trained": how,
        "quantisation": quantisation_words(getattr(model.config, "quantization_config", None)),
    }


def _sizes(model: Any) -> tuple[int, int]:
    """
    Return how many parameters are trained, and how many there are; under ZeRO-3 the full sizes. What hangs on an
    actor, and adapters that rest beside the trained one, such as the reference, do not count.
    """
    resting = set(model.peft_config) - set(model.active_adapters) if is_peft_model(model) else set()
    apart = {*ATTACHED, *resting}
    # A role that is an adapter has names of its own for the actor's base, so every name is looked at.
    named = model.named_parameters(remove_duplicate=False)
    parameters = {id(p): p for name, p in named if apart.isdisjoint(name.split("."))}
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters.values()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def adapter_words(config: Any) -> str:
    """Return an adapter's kind and size, such as "LoRA adapter, r = 16, alpha = 32, on q_proj, v_proj"."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    words = [f"{'LoRA' if kind == 'LORA' else kind} adapter"]
    sizes = {"r": getattr(config, "r", None), "alpha": getattr(config, "lora_alpha", None)}
    words += [f"{name} = {size}" for name, size in sizes.items() if size is not None]
    where = getattr(config, "target_modules", None)
    if where:  # PEFT writes "all-linear" out, layer by layer
        words.append(f"on {where if isinstance(where, str) else ', '.join(sorted({n.split('.')[-1] for n in where}))}")
    return ", ".join(words)


def quantisation_words(config: Any) -> str | None:
    """Return in how many bits a base is kept; `None` if it is not quantised."""
    if config is None:
        return None
    known = config if isinstance(config, dict) else config.to_dict()
    if known.get("load_in_4bit"):
        nested = ", nested" if known.get("bnb_4bit_use_double_quant") else ""
        return f"4 bits ({known.get('bnb_4bit_quant_type', 'fp4')}{nested}), bitsandbytes"
    return "8 bits, bitsandbytes" if known.get("load_in_8bit") else str(known.get("quant_method"))


def bits_of(words: str | None) -> dict[str, Any] | None:
    """Return the options by which bitsandbytes keeps a base as `quantisation_words` say; `None` unless in 4 bits."""
    found = re.match(r"4 bits \((\w+)(, nested)?\)", words or "")
    if found is None:
        return None
    kind, nested = found.groups()
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested is not None}


def data_facts(trainer: Any, dataset_name: str | None) -> dict[str, Any]:
    """Return what was trained on and held out; the name is `dataset_name`, else what `run.json` says."""
    name = without_place(dataset_name) or read_facts(trainer.args.output_dir).get("data")
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    rows = [f"{key} {rows_of(each)}".strip() for key, each in held_out.items() if each is not None]
    return {
        "training data": ", ".join(filter(None, (name, rows_of(trainer.train_dataset)))),
        "held-out data": ", ".join(rows),
    }


def rows_of(dataset: Any) -> str:
    """Return the number of rows in words; a stream has none."""
    if dataset is None:
        return ""
    if not hasattr(dataset, "__len__"):
        return "a stream"
    return "1 row" if len(dataset) == 1 else f"{len(dataset):,} rows"


def machine_facts(trainer: Any) -> dict[str, Any]:
    """Return the length of the run, the hardware, the precision and the versions."""
    args, state = trainer.args, trainer.state
    seconds = next((line["train_runtime"] for line in reversed(state.log_history) if "train_runtime" in line), None)
    own: Any = import_module(__package__.partition(".")[0])  # here, as the package imports the trainers
    versions = f"trl_ext {own.__version__}" + (f", PEFT {peft.__version__}" if is_peft_model(trainer.model) else "")
    return {
        "optimizer steps": state.global_step,
        "epochs": None if state.epoch is None else f"{state.epoch:.2f}",
        "time of the last `train()`": None if seconds is None else f"{seconds:.0f} s",
        "computed in": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "hardware": hardware(args),
        "versions, beside those below": versions,
    }


def hardware(args: Any) -> str:
    """Return the number and the name of the devices."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    return f"{args.world_size} × {device}"


def changed_options(args: Any) -> dict[str, Any]:
    """Return the options of a config that differ from its class's defaults, without secrets."""
    written = args.to_dict()
    defaults = {}
    for option in dataclasses.fields(args):
        if option.default is not dataclasses.MISSING:
            defaults[option.name] = option.default
        elif option.default_factory is not dataclasses.MISSING:
            defaults[option.name] = option.default_factory()
    changed = {name: value for name, value in written.items() if value != defaults.get(name, dataclasses.MISSING)}
    return {name: value for name, value in changed.items() if not name.endswith("_token")}
