"""
Several roles on one base: the critic and the reward model as adapters on the actor's frozen weights.

Each of these roles has its own modules, which hold the actor's very tensors, and its own adapter. So no adapter is
switched on or off between a forward pass and its backward pass, and gradient checkpointing computes the same again.
And PEFT's `set_adapter`, `merge_adapter` and `disable_adapter` of the actor affect the actor alone. The reference is
the actor's own modules, without its adapter or with a frozen copy of it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...models.adapter_copies import base_left_alone, config_of_copy, copy_weights
from ...models.noise import disable_noise
from ...models.saved_adapter import in_float32
from ...models.trainable import lend


# Names of adapters and, on the actor, of the modules that hold them. The actor's adapter must have another name, so
# that no PEFT function called for it takes one of these.
CRITIC, REWARD, REFERENCE = "critic", "reward_model", "ref"

# Attributes that PEFT and transformers read from a quantised model, and those in which bitsandbytes' layers keep
# tensors that are neither parameters nor buffers.
QUANTISATION = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
QUANTISED_STATE = ("quant_state", "state")


def modules_with_the_same_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that holds the same parameters and buffers, so that weights are kept once."""
    shared = list(chain(model.parameters(), model.buffers()))
    for module in model.modules():
        shared += [value for name in QUANTISED_STATE if (value := vars(module).get(name)) is not None]
    return copy.deepcopy(model, {id(value): value for value in shared})


def classifier_on_base(actor: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    Return a sequence classification model with one label whose trunk shares the weights of the actor's base, without
    adapters; the score head is new and 0.
    """
    base: Any = modules_with_the_same_weights(actor)
    if is_peft_model(base):
        base = base.unload()
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(
            f"transformers has no sequence classification model for {type(base).__name__}, so critic and reward model "
            "cannot be adapters on its trunk. Use `critic='head'`, and a whole model as `reward_model`."
        )
    classifier = _without_trunk(kind, config)
    setattr(classifier, classifier.base_model_prefix, base.base_model)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ValueError(
            f"{kind.__name__} has no `score` layer, which an adapter of critic or reward model trains beside it. Use "
            "`critic='head'`, or `critic='model'` where that family has a classifier, and a whole model as "
            "`reward_model`."
        )
    head = base.get_output_embeddings().weight
    dtype = next(parameter.dtype for parameter in base.parameters() if parameter.is_floating_point())
    width, has_bias = classifier.score.in_features, classifier.score.bias is not None
    classifier.score = nn.Linear(width, 1, bias=has_bias, device=head.device, dtype=dtype)
    for parameter in classifier.score.parameters():
        nn.init.zeros_(parameter)
    for name in QUANTISATION:
        if hasattr(base, name):
            setattr(classifier, name, getattr(base, name))
    disable_noise(classifier)
    return classifier


def _without_trunk(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of this kind whose trunk, which will be replaced, takes next to no memory."""
    if not is_deepspeed_zero3_enabled():
        with torch.device("meta"):
            return kind(config)
    shallow = copy.deepcopy(config)  # under ZeRO-3 transformers makes and partitions weights, meta device or not
    shallow.num_hidden_layers = 0
    classifier = AutoModelForSequenceClassification.from_config(shallow)
    classifier.config = config
    return classifier


def load_reward_adapter(actor: PreTrainedModel | PeftModel, folder: str) -> PeftModel:
    """Load the reward adapter of a folder, with its score head, onto the actor's base, and freeze it."""
    model = _load(actor, folder, REWARD, is_trainable=False)
    model.config.name_or_path = folder  # its name in the log, and where its tokenizer is
    return model.requires_grad_(False).eval()


def critic_adapter(
    actor: PreTrainedModel | PeftModel,
    value_model: str | None,
    reward_model: PeftModel | None,
    peft_config: PeftConfig | None,
    start: str | None,
) -> PeftModel:
    """
    Return a trainable adapter with a score head on the actor's base: the one saved in the folder `value_model`, else a
    copy of the reward adapter, else a copy of the adapter that the actor starts from, with a score head that is 0.

    Args:
        peft_config: of the actor's adapter, if that is new; `actor` is then the base model.
        start: name of the adapter that the actor has already, if it does not get a new one.
    """
    if value_model is not None:
        return _load(actor, value_model, CRITIC, is_trainable=True)
    if reward_model is not None:
        config, weights = reward_model.peft_config[REWARD], _weights(reward_model, REWARD)
    elif start is not None:
        config, weights = actor.peft_config[start], _weights(actor, start)
    else:
        config, weights = peft_config, {}
    config = copy.deepcopy(config)
    config.task_type, config.inference_mode, config.base_model_name_or_path = "SEQ_CLS", False, None
    model = get_peft_model(classifier_on_base(actor), config, CRITIC, autocast_adapter_dtype=in_float32(actor))
    set_peft_model_state_dict(model, _weights(model, CRITIC) | weights, CRITIC)
    return model


def _weights(model: PeftModel, name: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of an adapter and its score head, without the base's, under their names in files."""
    return get_peft_model_state_dict(model, state_dict, name, save_embedding_layers=False)


def _load(actor: PreTrainedModel | PeftModel, folder: str, name: str, is_trainable: bool) -> PeftModel:
    return PeftModel.from_pretrained(
        classifier_on_base(actor),
        folder,
        adapter_name=name,
        is_trainable=is_trainable,
        autocast_adapter_dtype=in_float32(actor),
    )


def stand_on(actor: PeftModel, model: nn.Module, name: str) -> None:
    """
    Make `model`, whose trunk shares the actor's weights, a submodule of the actor's wrapper: in one engine with it,
    but not among the modules that PEFT changes.

    Raises:
        RuntimeError: when the base is no longer shared.
    """
    of_actor = {id(tensor) for tensor in chain(actor.parameters(), actor.buffers())}
    own = [name for name, tensor in model.named_parameters() if id(tensor) not in of_actor and not _of_adapter(name)]
    if own:
        raise RuntimeError(
            f"The {name} does not share {len(own)} weights with the actor, the first being {own[0]}: something has "
            "replaced the base's parameters after they were loaded."
        )
    devices = {parameter.device for parameter in actor.parameters()}
    if len(devices) == 1:  # the adapters of a base on several devices are there already
        model.to(devices.pop())
    lend(actor, name, model)


def _of_adapter(name: str) -> bool:
    return any(f".{role}." in name or name.endswith(f".{role}") for role in (CRITIC, REWARD)) or "score." in name


def cast_adapter(model: nn.Module, actor: PeftModel) -> None:
    """Cast the trainable parameters of an adapter to the dtype of the actor's adapter."""
    dtype = next(parameter.dtype for parameter in actor.parameters() if parameter.requires_grad)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "score." not in name and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(dtype)


def save_adapter(model: PeftModel, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a folder that `AutoPeftModelForSequenceClassification` loads."""
    (name,) = model.peft_config
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = _weights(model, name, state_dict)
    save_file({key: t.contiguous() for key, t in tensors.items()}, Path(folder) / "adapter_model.safetensors")
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def restore_adapter(model: PeftModel, folder: str | Path) -> None:
    """Load the weights saved in `folder` into the active adapter of `model`."""
    (name,) = model.active_adapters
    with without_other_roles(model):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), name)


@contextmanager
def without_other_roles(model: PeftModel) -> Iterator[None]:
    """Within the context, PEFT does not see critic and reward model among the actor's modules."""
    modules = model._modules
    model._modules = {name: each for name, each in modules.items() if name not in (CRITIC, REWARD)}
    try:
        yield
    finally:
        model._modules = modules


@contextmanager
def saving_one_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context, `save_pretrained` of a `PeftModel` saves only the adapter that is trained."""
    if not is_peft_model(model):
        yield
        return
    peft_model: Any = model
    peft_model.save_pretrained = partial(peft_model.save_pretrained, selected_adapters=peft_model.active_adapters)
    try:
        with without_other_roles(peft_model):
            yield
    finally:
        del peft_model.save_pretrained


def copy_adapter(model: Any, name: str, copy_name: str) -> None:
    """Add a frozen copy of the adapter `name` to a `PeftModel`, in the same dtype."""
    with base_left_alone(model):
        model.add_adapter(copy_name, config_of_copy(model.peft_config[name]))
    copy_weights(model, name, copy_name)
    for parameter_name, parameter in model.named_parameters():
        if copy_name in parameter_name.split("."):
            parameter.requires_grad_(False)
