"""What can be known of a model, or of an adapter, before its weights are loaded."""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel


# What may be meant by an adapter in place of a model.
WAYS_OUT = {
    "model": "Pass `AutoPeftModelForCausalLM.from_pretrained(...)` to train it further",
    "value_model": "Set `critic='adapter'` to put it on the base of an actor that trains an adapter too",
    "reward model": "Give it as `reward_model`, and the actor a `peft_config`, to put it on the actor's base",
}


def text_config(model: Any, args: Any) -> Any:
    """
    The text part of a language model's config.

    Args:
        model: a path or hub name, or a model.
        args: the trainer's config, with `model_init_kwargs` and `trust_remote_code`.

    Raises:
        ValueError: when the path holds a model for scoring text.
    """
    if not isinstance(model, str):
        return model.config.get_text_config()
    kwargs = {name: v for name, v in (args.model_init_kwargs or {}).items() if name == "revision"}
    config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)
    if is_for_scoring(config):
        raise ValueError(
            f"{model} holds a {config.architectures[0]}, which scores text and writes none. It may be the "
            "`reward_model` of PPO; what is trained and its reference are causal language models."
        )
    return config.get_text_config()


def restore_weights(model: PreTrainedModel, folder: str | Path, but_not: str | None = None) -> None:
    """
    Loads into a model what it saved to `folder`. transformers saves some weights, such as a mixture's experts, under
    other names than the model has, and knows how to read them.

    Args:
        but_not: attribute of `model` whose weights are elsewhere.

    Raises:
        RuntimeError: when a weight of the model is not there.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes)  # a model may have several
    saved = type(model).from_pretrained(folder, dtype=widest).state_dict()
    missing = model.load_state_dict(saved, strict=False).missing_keys
    absent = [name for name in missing if but_not is None or not name.startswith(f"{but_not}.")]
    if absent:
        raise RuntimeError(f"{folder} lacks {len(absent)} of the model's weights, the first being {absent[0]}.")


def is_for_scoring(config: PretrainedConfig) -> bool:
    """Whether a model was saved as one that scores text."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def tokenizer_of(model: Any, processing_class: Any, args: Any) -> Any:
    """The tokenizer that a trainer will take; `None` where it is not to be had from the model's path."""
    path = model if isinstance(model, str) else model.config._name_or_path
    if processing_class is not None or not path:
        return processing_class
    kwargs = {name: v for name, v in (args.model_init_kwargs or {}).items() if name == "revision"}
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code, **kwargs)
    except (OSError, ValueError):  # the trainer will say so
        return None


def adapter_config(path: Any) -> PeftConfig | None:
    """The config of the adapter that a folder holds; `None` for a folder without one, and for anything else."""
    if not isinstance(path, str) or not (Path(path) / "adapter_config.json").exists():
        return None
    return PeftConfig.from_pretrained(path)


def adapter_configs(model: Any, peft_config: PeftConfig | None) -> list[PeftConfig]:
    """The configs of the adapters that a model holds, and of the new one that it will get."""
    held = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    return held if peft_config is None else [*held, peft_config]


def check_no_adapter(path: str, name: str) -> None:
    """
    Raises:
        ValueError: when the folder holds an adapter alone: a role is a whole model.
    """
    config = adapter_config(path)
    if config is None:
        return
    if config.task_type == "SEQ_CLS" and name in ("model", "ref_model"):
        raise ValueError(
            f"The folder {path} (`{name}`) holds an adapter of task type SEQ_CLS, which scores text and writes none. "
            "Give it as `reward_model`, and a causal language model, or its adapter, here."
        )
    way_out = WAYS_OUT.get(name, WAYS_OUT["model"])
    raise ValueError(
        f"The folder {path} ({name}) holds an adapter without its base model. {way_out}, "
        "or save the whole model with `merge_and_unload().save_pretrained(...)` and give that folder."
    )
