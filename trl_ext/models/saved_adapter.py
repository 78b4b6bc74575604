"""Load a saved adapter onto its base: to go on training it, to ask it, to merge it."""

import copy
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from .._trl import create_model_from_path
from ..runs.folder import is_local
from .fingerprint import base_fingerprint, weights_fingerprint
from .loading import (
    TEMPLATE,
    adapter_config,
    base_line,
    has_tokenizer,
    init_kwargs,
    is_quantized,
    load_tokenizer,
    merge_line,
    merged_beside,
    near_folder,
    read_config,
    refuse_scoring,
    require_model,
    require_weights,
    shown,
    source_options,
)


def adapter_folder(path: str, revision: str | None = None) -> str | None:
    """
    Return the folder of the adapter that a path or hub name holds, which is downloaded if need be; `None` for a model.
    """
    if Path(path).exists() or is_local(path):
        return None if adapter_config(path) is None else path
    try:
        is_known = isinstance(try_to_load_from_cache(path, CONFIG_NAME, revision=revision), str)
        if is_known or near_folder(path, revision) or find_adapter_config_file(path, revision=revision) is None:
            return None
    except (OSError, ValueError):  # no name of a repository; of this and of a misspelt folder `require_model` speaks
        return None
    return snapshot_download(path, revision=revision, ignore_patterns=["*/*"])  # no checkpoints, no critic


def require_writer(path: str, name: str, revision: str | None = None) -> str:
    """
    Return the folder or hub name of a language model, given as `name`, or the folder of an adapter of one; raise
    `ValueError` for anything else.
    """
    folder = adapter_folder(path, revision)
    require_model(folder or path, name, revision)
    require_weights(folder or path, name)
    adapter = adapter_config(folder)
    if folder is None or adapter is None:
        refuse_scoring(read_config(path, name, revision=revision), f"{path!r} ({shown(name)})", path, name)
        return path
    if adapter.task_type == "SEQ_CLS":
        raise ValueError(
            f"{path!r} ({shown(name)}) holds a reward model's adapter, which scores text and cannot write it: it may "
            f"be `--reward_model_path {shlex.quote(path)}` of `trl-ext ppo`. Give a causal language model here, or "
            "its adapter."
        )
    require_base(folder, adapter)
    require_writer(
        str(adapter.base_model_name_or_path), f"the base of the adapter {path}, {shown(name)}", adapter.revision
    )
    return folder


def load_writer(path: str, **options: Any) -> Any:
    """Load a language model, or the adapter in a folder onto its base, by `options` of `from_pretrained`."""
    adapter = adapter_config(path)
    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    options |= {"revision": adapter.revision}  # the one that was given is the adapter's
    base = AutoModelForCausalLM.from_pretrained(adapter.base_model_name_or_path, **options)
    return put_on(base, path, is_trainable=False)


@dataclass(frozen=True)
class SavedAdapter:
    """A folder with an adapter that writes text, and its config, which names its base."""

    folder: str
    config: PeftConfig

    @property
    def base(self) -> str:
        return str(self.config.base_model_name_or_path)

    def args_of_base(self, args: Any) -> Any:
        """Return a copy of training arguments whose `revision` is that of the base, where they name the adapter's."""
        args = copy.copy(args)
        kwargs = {name: value for name, value in (args.model_init_kwargs or {}).items() if name != "revision"}
        args.model_init_kwargs = kwargs | ({"revision": self.config.revision} if self.config.revision else {})
        return args

    def processing_class(self, **options: Any) -> Any:
        """Return the processor or tokenizer beside the adapter; `None` if there is none."""
        folder = Path(self.folder)
        if any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor")):
            return AutoProcessor.from_pretrained(folder, **options)
        has_own = has_tokenizer(self.folder) or (folder / TEMPLATE).is_file()
        return load_tokenizer(self.folder, **options) if has_own else None

    def load(self, args: Any, quantization_config: Any = None) -> PeftModel:
        """Load the base as the options of `args_of_base` say, and the adapter onto it, to be trained."""
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        return put_on(create_model_from_path(self.base, **init_kwargs(args), **quantized), self.folder)


def saved_adapter(model: Any, args: Any, peft_config: PeftConfig | None = None) -> SavedAdapter | None:
    """
    Return the adapter in the folder, or of the hub name, `model`; `None` if that is a model.

    Raises:
        ValueError: for a `peft_config` beside it, an adapter of a scoring model, and a base that is not there or has
            other weights than those that the adapter was trained on.
    """
    folder = adapter_folder(model, source_options(args).get("revision")) if isinstance(model, str) else None
    config = adapter_config(folder)
    if folder is None or config is None:
        return None
    if peft_config is not None:
        raise ValueError(
            f"{model!r} (`model`) is an adapter, which goes on being trained, and `peft_config` asks for a new one. "
            f"Leave `peft_config` out; or, for a new adapter on top, merge this one first: `{merge_line(model)}`."
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"{model!r} (`model`) learns virtual tokens ({config.peft_type.value}), which PEFT does not go on "
            "training once they are saved. Give a model, or an adapter that changes weights, such as LoRA."
        )
    if config.task_type == "SEQ_CLS":
        raise ValueError(
            f"{model!r} (`model`) holds an adapter of task type SEQ_CLS, which scores text and cannot write it. Give "
            "it as `reward_model` or `value_model`, and a causal language model, or its adapter, here."
        )
    require_weights(folder, "model")
    require_base(folder, config)
    return SavedAdapter(folder, config)


def require_base(folder: str, config: PeftConfig) -> None:
    """Raise `ValueError` unless an adapter's base is a model, with the weights that the adapter was trained on."""
    base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise ValueError(
            f"The adapter in {folder!r} does not say what it was trained on. Write BASE, that model's folder or hub "
            f"name, into its adapter_config.json: `{base_line(folder)}`."
        )
    if adapter_folder(base, revision) is not None:
        raise ValueError(
            f"The base of the adapter {folder} is {base}, an adapter itself. Merge that one first: "
            f"`{merge_line(base)}`, and write {merged_beside(base)} into {folder}/adapter_config.json, as "
            "`base_model_name_or_path`."
        )
    try:
        require_model(base, f"the base of the adapter {folder}, named in its adapter_config.json", revision)
    except ValueError as error:
        raise ValueError(
            f"{error} A relative path is looked for from the folder that the command runs in: run it where the "
            f"adapter was trained, or write where the base is into {folder}/adapter_config.json, as "
            "`base_model_name_or_path`."
        ) from error
    trained_on = base_fingerprint(folder, None)
    weights = None if trained_on is None else weights_fingerprint(base, revision)
    if weights is not None and trained_on != weights:
        raise ValueError(
            f"The adapter in {folder} was trained on other weights than those in {base}, the base that it names: "
            f"{str(trained_on)[:12]}… against {weights[:12]}… Write the folder of that base into its "
            "adapter_config.json, as `base_model_name_or_path`."
        )


def put_on(base: PreTrainedModel, folder: str, is_trainable: bool = True) -> PeftModel:
    """
    Load the adapter in `folder` onto its base; no random number is drawn. `ValueError` if it does not fit the base.
    """
    device = next(base.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _widen_embedding(base, folder)
        try:
            return PeftModel.from_pretrained(
                base, folder, is_trainable=is_trainable, autocast_adapter_dtype=in_float32(base)
            )
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The adapter in {folder} does not fit {base.config.name_or_path}: {reason:.300} Give the adapter as "
                "it was saved, and as `base_model_name_or_path` in its adapter_config.json the base that it was "
                "trained on."
            ) from error


def _widen_embedding(base: PreTrainedModel, folder: str) -> None:
    """Give the embedding the rows that it had when the adapter was trained, if the adapter was saved with them."""
    embedding = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding)
    # Where PEFT adapts the embedding too, its weight lies below a wrapper of the same name.
    saved = re.compile(rf"\b{re.escape(name)}(\.token_adapter)?(\.base_layer)?\.weight$")
    weights = load_peft_weights(folder, device="cpu")
    rows = max((len(weight) for key, weight in weights.items() if saved.search(key)), default=0)
    if rows > embedding.num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)  # their rows are read from the adapter


def restore_adapters(model: PeftModel, folder: str) -> None:
    """
    Load the adapters that `save_pretrained` of this model wrote to `folder` into those that it has. PEFT's own
    `load_adapter` would cast them to float32, also on a quantised base, where TRL trains them in bfloat16.
    """
    for name in model.peft_config:
        place = Path(folder) if name == "default" else Path(folder) / name
        set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), name)


def in_float32(base: Any) -> bool:
    """Return whether adapters of a 16-bit model are kept in float32: not under ZeRO-3 unless it is quantised."""
    return not is_deepspeed_zero3_enabled() or is_quantized(base)
