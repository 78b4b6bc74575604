"""Read the options of the model to start from, and check the models that options name."""

import difflib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data import demo
from ..models.loading import adapter_config, merge_line, merged_beside, require_model, require_weights
from ..models.precision import computes_in_bf16
from ..models.saved_adapter import adapter_folder
from .errors import package_of
from .output import beside


FROM_ADAPTERS = ("ppo", "critic", "dpo")  # the commands that start from an adapter


@dataclass
class ModelArguments(ModelConfig):
    TOPIC: ClassVar[str] = "TRL's model options, with `--model` for short and a dtype that follows the device"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Model to start from: a path or a hub name. Unset: SmolLM2-135M. An adapter comes with its base, "
            "and goes on being trained (ppo, dpo) or answers (critic).",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the weights. Unset: float32, with bfloat16 computation on a GPU (see --bf16); with "
            "--use_peft, or an adapter as --model, on a GPU bfloat16, because most weights are frozen.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def init_kwargs(self, use_cpu: bool = False, is_adapter: bool = False) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`, of a model or of the base of a saved adapter."""
        # Small updates of bfloat16 weights round to nothing, so weights that are trained in full are kept in float32.
        is_frozen = self.use_peft or is_adapter
        dtype = "bfloat16" if is_frozen and computes_in_bf16(use_cpu) else "float32"
        kwargs = {"dtype": self.dtype or dtype, "revision": self.model_revision}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs

    def adapter(
        self, task: str = "CAUSAL_LM", modules_to_save: list[str] | None = None, *, is_adapter: bool = False
    ) -> PeftConfig | None:
        """
        Return the config of the adapter to train, of PEFT's type `task`, with `modules_to_save` where none are given;
        `None` without --use_peft. `ValueError` for another type, an invalid pattern, or quantised weights without an
        adapter, where the model `is_adapter` neither.
        """
        if self.lora_task_type not in ("CAUSAL_LM", task):
            raise ValueError(f"`lora_task_type` is {self.lora_task_type}; this command trains {task}: leave it out.")
        bits = "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None
        if bits and not (self.use_peft or is_adapter):
            raise ValueError(f"`--load_in_{bits}` without an adapter: such weights are not trained. Add `--use_peft`.")
        config = get_peft_config(self)
        if config is None:
            return None
        config.task_type = task
        config.modules_to_save = config.modules_to_save or modules_to_save
        if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
            try:
                re.compile(config.target_modules)
            except re.error as error:
                raise ValueError(
                    f"`lora_target_modules` is {config.target_modules!r}, which is no regular expression ({error}). "
                    "Give names of modules, or all-linear."
                ) from error
            # PEFT takes a lone word for a pattern of the whole name, `model.layers.0.self_attn.q_proj`.
            if re.fullmatch(r"[\w.]+", config.target_modules):
                config.target_modules = {config.target_modules}
        return config

    def bits(self) -> list[str]:
        """Return the flags by which another command loads the base in as many bits."""
        names = ("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant")
        flags = [f"--{name}" for name in names if getattr(self, name)]
        is_other = self.load_in_4bit and self.bnb_4bit_quant_type != "nf4"
        return flags + (["--bnb_4bit_quant_type", self.bnb_4bit_quant_type] if is_other else [])

    def quantization(self) -> Any:
        """Return how weights are quantised on loading, if they are; `ValueError` if bitsandbytes refuses."""
        try:
            return get_quantization_config(self)
        except ValueError as error:
            raise ValueError(" ".join(str(error).split())) from error


@contextmanager
def model_errors(model: ModelArguments, path: str) -> Iterator[None]:
    """Within the context, an error of transformers, PEFT or TRL about the model becomes one sentence and a way out."""
    try:
        yield
    except (ValueError, ImportError, TypeError, OSError) as error:
        said, package = " ".join(str(error).split()), package_of(error)
        attention = model.attn_implementation
        if isinstance(error, TypeError) and not (package == "transformers" and "unexpected keyword argument" in said):
            raise
        if isinstance(error, TypeError):
            cure = "Correct `--model_init_kwargs`, or leave it out."
        elif package == "peft" and re.search("not found in the base model|No modules were targeted", said):
            asked = model.lora_target_modules or []
            asked = [asked] if isinstance(asked, str) else asked
            names = _linear_layers(path)
            near = [near for each in asked for near in difflib.get_close_matches(each, names, n=1)]
            meant = f"Did you mean `lora_target_modules={near}`? " if near else ""
            linear = f"Its linear layers are {', '.join(names)}. " if names else ""
            raise ValueError(
                f"The model has no modules that `lora_target_modules` names ({' '.join(asked)}). {meant}{linear}"
                "`lora_target_modules=all-linear` adapts them all."
            ) from error
        elif package == "peft" and model.use_peft:
            cure = "Write `--lora_target_modules all-linear`, which adapts every linear layer."
        elif package == "transformers" and attention and re.search("attn|attention|kernel", said, re.IGNORECASE):
            said = said.split(". The only possible")[0]  # a line of seven, in four spellings
            cure = f"In place of {attention} write `--attn_implementation sdpa`, eager or flash_attention_2."
        elif package == "trl" or (isinstance(error, OSError) and package in ("transformers", "huggingface_hub")):
            cure = ""
        else:
            raise
        raise ValueError(f"{said.rstrip('.')}. {cure}".strip()) from error


def _linear_layers(path: str) -> list[str]:
    """Return the names of a model's linear layers, from its config; none if it cannot be built so."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(path))
    except Exception:  # of any family's own code: the sentence before it says enough
        return []
    return sorted({name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)})


def require_adapted(model: nn.Module, given: ModelArguments) -> None:
    """Raise `ValueError` for an adapter's module that the model does not have: PEFT skips it if it finds another."""
    if not given.use_peft:
        return
    names = [name for name, _ in model.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        listed = getattr(given, f"lora_{option}") or ()
        for wanted in () if isinstance(listed, str) else listed:  # PEFT itself refuses a pattern that finds none
            if not any(f".{name}.".endswith(f".{wanted}.") for name in names):
                last = sorted({name.rpartition(".")[2] for name in names})
                near = difflib.get_close_matches(wanted, last, n=1)
                raise ValueError(
                    f"`--lora_{option}` has {wanted}, and no module of the model is called that. "
                    f"{f'Did you mean `--lora_{option} {near[0]}`?' if near else 'Correct the name, or leave it out.'}"
                )


def path_of(model: ModelArguments, args: Any, command: str) -> tuple[str, bool]:
    """
    Return the model to start from, checked, and whether it is an adapter, of which it is the folder. If none is given,
    it is SmolLM2, converted at first use.
    """
    named = model.model_name_or_path or getattr(args, "sft_model_path", None)
    if named is None:
        return str(demo.smollm2()), False
    option = "--model" if model.model_name_or_path else "--sft_model_path"
    folder = adapter_folder(named, model.model_revision)
    require_model(folder or named, option, model.model_revision)
    require_weights(folder or named, option)
    if Path(args.output_dir).resolve() == Path(folder or named).resolve():
        raise ValueError(
            f"`--output_dir {args.output_dir}` is the folder of the model to start from (`{option}`), whose files "
            "would be written over. Give another folder, such as "
            f"`--output_dir {shlex.quote(beside(args.output_dir, command))}`."
        )
    if folder is None:
        return named, False
    merge, base = f"`{merge_line(named)}`, and give `{option} {merged_beside(named)}`", ""
    config = adapter_config(folder)
    if config is not None and not config.base_model_name_or_path:
        base = " BASE is the model that it was trained on, which its adapter_config.json does not name."
    if command not in FROM_ADAPTERS:
        raise ValueError(
            f"{named!r} (`{option}`) is an adapter, and `trl-ext {command}` starts from a whole model. Merge it: "
            f"{merge}.{base}"
        )
    if model.use_peft:
        raise ValueError(
            f"{named!r} (`{option}`) is an adapter, which goes on being trained, and `use_peft` asks for a new one. "
            f"Leave `use_peft` out, or set `use_peft=False`; or, for a new adapter on top, merge this one first: "
            f"{merge}.{base}"
        )
    return folder, True


def require_judges(args: Any, data: Any) -> None:
    """
    Raise `ValueError` for a PPO run or a critic's without a reward, and for a reward or value model that is no model,
    as `require_model` does; of the other commands nothing is asked.
    """
    if not hasattr(data, "reward_funcs"):
        return
    if args.reward_model_path is None and not data.reward_funcs:
        raise ValueError(
            "There is no reward at all: give `--reward_model_path FOLDER`, the output folder of `trl-ext reward` or a "
            "hub name, or `--reward_funcs my_rewards.py:right`, the function `right` of a file, or both."
        )
    require_judge("--reward_model_path", args.reward_model_path)
    require_judge("--value_model", data.value_model)


def require_judge(option: str, path: str | None) -> None:
    if path is not None:
        require_model(path, option)
        require_weights(path, option)
