"""Check a run before a model is loaded: numbers in their range, installed packages, writable folders."""

import difflib
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import has_length

from ..ranges import COUNT, FRACTION, POSITIVE, SHARE_OR_UNSET, Range, require
from .folder import is_local
from .tables import counted


FROM_0, FROM_0_BELOW_1 = Range("0 or above", lambda x: x >= 0), Range("0 or above and below 1", lambda x: 0 <= x < 1)
FINITE = Range("0 or above, and finite", lambda x: 0 <= x < math.inf)
# Options of TRL, transformers, PEFT and the command line by the range that they must be in, where they are set. What
# transformers does beyond it: it takes `max_steps` of -5 for unset and of 0 for 1, trains nothing in 0 epochs, does
# not clip below 0, and keeps every checkpoint with `save_total_limit` of 0.
NUMBERS = {
    COUNT: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r lora_alpha "
    "max_length precompute_ref_batch_size ref_model_sync_steps dataset_num_proc vllm_tensor_parallel_size "
    "vllm_max_model_length eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor "
    "ddp_bucket_cap_mb ddp_timeout train_size test_size prompt_words",
    Range("an integer of at least 1, such as 2, or unset, which keeps all", COUNT.holds): "save_total_limit",
    Range(
        "an integer of at least 1, or -1, for as long as the epochs last", lambda x: x == -1 or COUNT.holds(x)
    ): "max_steps",
    Range("above 0, and finite", lambda x: 0 < x < math.inf): "num_train_epochs",
    FINITE: "learning_rate warmup_steps weight_decay adam_epsilon eval_delay neftune_noise_alpha "
    "center_rewards_coefficient router_aux_loss_coef",
    Range("0 or above; 0 does not clip", lambda x: x >= 0): "max_grad_norm",
    FROM_0: "dataloader_num_workers samples num_completions_to_print",
    Range("0 or above and below 2³²", lambda x: 0 <= x < 2**32): "seed data_seed",
    POSITIVE: "discopop_tau vllm_server_timeout",
    FRACTION: "ld_alpha ref_model_mixup_alpha",
    SHARE_OR_UNSET: "vllm_gpu_memory_utilization",
    FROM_0_BELOW_1: "adam_beta1 adam_beta2 lora_dropout",
    Range(
        "a share of the rows, above 0 and below 1, such as `test_split_size=0.1`; a number of rows is `test_size`",
        lambda x: 0 < x < 1,
    ): "test_split_size",
    Range("from 0 to 8", lambda x: 0 <= x <= 8): "min_gap",
    Range("a port, from 1 to 65535", lambda x: 1 <= x < 2**16): "vllm_server_port vllm_group_port main_process_port",
}
# Logger of `report_to` -> packages of which one is enough.
_NAMED = "clearml codecarbon comet_ml dagshub dvclive kubeflow mlflow neptune swanlab trackio wandb"
LOGGERS: dict[str, tuple[str, ...]] = {name: (name,) for name in _NAMED.split()}
LOGGERS |= {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}
# Schedule -> arguments that it may have, of which it lacks one or has another.
NEEDED_BY: dict[Any, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 100},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
}
USUAL = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}  # what needs nothing else
# Parts of the names of bitsandbytes' optimizers; PyTorch's own of 4 and 8 bits come from torchao.
OF_BITSANDBYTES = ("8bit", "bnb", "paged", "lion", "ademamix")
OF_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


def check_startable(options: Any) -> None:
    """
    Check the options of a run, given as attributes, perhaps not all; `ValueError` for a number outside its range, or a
    package that an option needs and that is not installed.
    """
    _check_numbers(options)
    smoothing = getattr(options, "label_smoothing_factor", 0.0)
    if smoothing:
        raise ValueError(
            f"`label_smoothing_factor` is {smoothing}; it belongs to a cross-entropy, which is not trained here. "
            "Leave it out; DPO has `label_smoothing`."
        )
    template = getattr(options, "chat_template_path", None)
    if template is not None and is_local(template) and not Path(template).exists():
        raise ValueError(
            f"`chat_template_path` is {template}, and there is no such file or folder. Give a .jinja file, a folder "
            "with a tokenizer, or a hub name."
        )
    for asked, packages, install in _needed(options):
        if not any(is_installed(package) for package in packages):
            raise ValueError(f"{asked} needs {' or '.join(packages)}: `pip install {install}`, or leave it out.")


def check_optimizable(args: Any) -> None:
    """
    Try the optimizer and the schedule of a run on a single number, not those of DeepSpeed; `ValueError` for what torch
    or transformers refuse, such as a schedule that lacks one of its arguments.
    """
    if args.deepspeed:
        return
    number, steps = nn.Parameter(torch.zeros(1)), max(args.max_steps, 1000)
    with _refusal("optim", args.optim, "optim_args", args.optim_args):
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        except ValueError as error:
            if "pass a `model`" in str(error):  # of GaLore, APOLLO and LOMO, which look for layers by name
                kind, options = torch.optim.SGD, {"lr": args.learning_rate}
            else:
                raise
        optimizer = kind([number], **options)
    with _refusal("lr_scheduler_type", args.lr_scheduler_type, "lr_scheduler_kwargs", args.lr_scheduler_kwargs):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    require_device(args)


def require_device(args: Any) -> None:
    """
    Raise `ValueError` for what the run's device cannot do: float16 on a CPU, where accelerate leaves it off without a
    word, and an optimizer of bitsandbytes that cannot step there, as older ones on a CPU.
    """
    if args.fp16 and args.device.type == "cpu" and not args.deepspeed:
        raise ValueError(
            "`fp16` needs a GPU: on a CPU accelerate leaves it off, and the run would compute in float32. Leave it "
            "out."
        )
    name = args.optim.value
    is_other = name in OF_TORCHAO or "galore" in name  # GaLore's is built around a model
    if args.deepspeed or is_other or not any(part in name for part in OF_BITSANDBYTES):
        return
    numbers = nn.Parameter(torch.zeros(4096, device=args.device))  # fewer have no states in 8 bits
    numbers.grad = torch.zeros_like(numbers)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([numbers], **options).step()
    except Exception as error:  # without a kernel: NameError, AttributeError or RuntimeError, by version
        reason, installed = " ".join(str(error).split()), version("bitsandbytes")
        raise ValueError(
            f"`optim={name}` cannot run on {args.device.type} with bitsandbytes {installed} ({reason:.100}). "
            "Update bitsandbytes, or choose `adafactor`, which saves memory on every device."
        ) from error


@contextmanager
def _refusal(name: str, value: Any, name_of_more: str, more: Any) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        given = f"`{name}={getattr(value, 'value', value)}`" + (f" with `{name_of_more}={more}`" if more else "")
        needed = NEEDED_BY.get(getattr(value, "value", value))
        asked = set(more) if isinstance(more, dict) else {None}
        usual = next((kind for kind, known in NEEDED_BY.items() if asked <= known.keys()), USUAL[name])
        cure = f"Give `{name_of_more}={needed}`" if needed else f"Leave `{name_of_more}` out" if more else "Do that"
        cure += " and give `optim_target_modules=all-linear`" if cure == "Do that" and "galore" in str(given) else ""
        raise ValueError(f"{given} is refused: {reason.rstrip('.')}. {cure}, or choose `{name}={usual}`.") from error


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; it is not imported."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _check_numbers(options: Any) -> None:
    for allowed, names in NUMBERS.items():
        for name in names.split():
            value = getattr(options, name, None)
            if value is not None:
                require(options, name, allowed.holds(value), allowed.needed)
    for what in ("logging", "save", "eval"):
        strategy, value = (getattr(options, f"{what}_{part}", None) for part in ("strategy", "steps"))
        if getattr(strategy, "value", strategy) == "steps" and isinstance(value, int | float) and value <= 0:
            raise ValueError(
                f"`{what}_steps` is {value}; it must be above 0. For none at all write `--{what}_strategy no`, "
                f"in Python `{what}_strategy='no'`."
            )


def _needed(options: Any) -> list[tuple[str, tuple[str, ...], str]]:
    """Return each option that needs a package, the packages of which it needs one, and what installs that."""
    needed = []
    report_to = getattr(options, "report_to", None)
    loggers = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for logger in loggers if loggers not in (["all"], ["none"]) else ():
        if logger not in LOGGERS:
            near = difflib.get_close_matches(logger, LOGGERS, n=1)
            meant = f" Did you mean `report_to={near[0]}`?" if near else ""
            raise ValueError(
                f"`report_to` has {logger!r}; it may have {', '.join(LOGGERS)}, or be none or all.{meant}"
            )
        needed.append((f"`report_to={logger}`", LOGGERS[logger], LOGGERS[logger][0]))
    optimizer = str(getattr(getattr(options, "optim", ""), "value", getattr(options, "optim", "")))
    if optimizer in OF_TORCHAO:
        needed.append((f"`optim={optimizer}`", ("torchao",), "torchao"))
    elif any(part in optimizer for part in OF_BITSANDBYTES):
        needed.append((f"`optim={optimizer}`", ("bitsandbytes",), "'trl-ext[qlora]'"))
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name, False):
            needed.append((f"`{name}`", ("bitsandbytes",), "'trl-ext[qlora]'"))
    if getattr(options, "deepspeed", None):
        needed.append(("`deepspeed`", ("deepspeed",), "'trl-ext[deepspeed]'"))
    if getattr(options, "attn_implementation", None) == "flash_attention_2":
        needed.append(("`attn_implementation=flash_attention_2`", ("flash_attn", "kernels"), "kernels"))
    if getattr(options, "use_liger_kernel", False):
        needed.append(("`use_liger_kernel`", ("liger_kernel",), "liger-kernel"))
    return needed


def require_full_batch(rows: int, name: str, args: Any, option: str = "per_device_eval_batch_size") -> None:
    """Raise `ValueError` for rows, of the dataset `name`, that make no batch of the size that `option` sets."""
    size, processes, drops = getattr(args, option), args.world_size, args.dataloader_drop_last
    needed = size * processes if drops else 1
    if rows < needed:
        raise ValueError(
            f"{name} has {rows} rows, and with `{option}={size}` on {counted(processes, 'process')} and "
            f"`dataloader_drop_last={drops}` a batch needs {needed}. Add rows, lower `{option}`, or keep a last batch "
            "that is not full with `dataloader_drop_last=False`."
        )


def require_full_batches(args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise `ValueError` if `dataloader_drop_last` leaves no batch of a dataset whose length is known."""
    if not args.dataloader_drop_last:
        return
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if has_length(train_dataset):
        require_full_batch(len(train_dataset), "`train_dataset`", args, "per_device_train_batch_size")
    for key, dataset in held_out.items():
        if has_length(dataset):
            require_full_batch(len(dataset), f"`eval_dataset{f'[{key!r}]' if key else ''}`", args)


def require_writable(path: str | Path, what: str = "output_dir") -> None:
    """Raise `ValueError` if no files can be written into a folder, which the option `what` names."""
    folder = Path(path)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        named = "that" if there == folder.absolute() else repr(str(there))
        file = next(each for each in (folder, *folder.parents) if each.exists())
        free = f"{file.with_suffix('')}-out"
        raise ValueError(
            f"`{what}` is {str(folder)!r}, and {named} is a file. Give a folder, or one that is yet to be made, such "
            f"as `{what}={free!r}`."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{what}` is {str(folder)!r}, and nothing can be written into {str(there)!r}. Give another folder."
        )


def require_kind(model: Any, name: str = "model") -> None:
    """Raise `ValueError` for anything but a model or a path as text, given to a trainer as `name`."""
    if isinstance(model, str | nn.Module):
        return
    what = "None" if model is None else f"a {type(model).__name__} ({model!r:.60})"
    way = "give a model, or its path"
    if isinstance(model, os.PathLike):
        way = f"give the path as text, {os.fspath(model)!r}"
    elif isinstance(model, TrainingArguments):
        what, way = f"a {type(model).__name__}", "give it by name, `args=…`"
    raise ValueError(f"`{name}` is {what}; {way}.")


def require_parts(processing_class: Any, peft_config: Any, *datasets: Any) -> None:
    """Raise `ValueError` for arguments of a trainer that are the name of what is wanted, or the rows of it."""
    if isinstance(processing_class, str):
        raise ValueError(
            f"`processing_class` is {processing_class!r}; give the tokenizer itself, "
            f"`AutoTokenizer.from_pretrained({processing_class!r})`, or leave it out for the model's."
        )
    if isinstance(peft_config, dict):
        raise ValueError("`peft_config` is a dict; give a config of PEFT, `LoraConfig(**peft_config)`.")
    if not (peft_config is None or isinstance(peft_config, PeftConfig)):
        raise ValueError(f"`peft_config` is {peft_config!r:.60}; give a config of PEFT, such as `LoraConfig(r=16)`.")
    train, *held_out = datasets
    if isinstance(train, dict):
        splits = ", ".join(map(repr, train))
        raise ValueError(
            f"`train_dataset` is a {type(train).__name__} of {splits}; give one of its splits, `dataset['train']`."
        )
    for dataset in [
        train,
        *(set_ for sets in held_out for set_ in (sets.values() if isinstance(sets, dict) else [sets])),
    ]:
        if isinstance(dataset, list | str):
            text = f"{dataset!r}" if isinstance(dataset, str) else "a list"
            way = (
                "load_dataset('json', data_files=…, split='train')"
                if isinstance(dataset, str)
                else "Dataset.from_list(…)"
            )
            raise ValueError(f"A dataset is {text}; give a dataset of 🤗 Datasets, such as `{way}`.")


def make_folder(path: str | Path, what: str = "output_dir") -> None:
    """Make a folder, which the option `what` names; raise `ValueError` if no files can be written into it."""
    require_writable(path, what)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"`{what}` is {str(path)!r}, and nothing can be written there ({error.strerror}). Give another folder."
        ) from error
