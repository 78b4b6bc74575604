"""The four models of a run: checked before any is loaded, then loaded: actor, reference, reward, critic."""

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .._trl import create_model_from_path, disable_dropout, get_callable_name, get_config_model_id
from ..pretrained import adapter_config, check_no_adapter, text_config
from ..zero import copy_of
from .adapter_checks import check_adapters
from .adapters import critic_adapter, load_reward_adapter
from .config import PPOConfigX
from .critic import ValueAdapter, build_critic, check_value_checkpoint, check_value_model
from .placement import frozen_kwargs
from .scorers import (
    TokenScorer,
    check_reward_checkpoint,
    check_single_label,
    checked,
    find_tokenizer,
    load_reward_model,
    reads_actor_ids,
)


logger = logging.get_logger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel | str


@dataclass
class Roles:
    """
    The models of a run, as GRPO takes them.

    Args:
        actor: the policy, before `peft_config` wraps it.
        reference: a frozen model, or `None`: an adapter of the actor, or no reference at all.
        reward_funcs, reward_processing_classes: the reward sources, the reward model first.
        critic: the value model, value adapter or value head.
        reward_adapter: the reward model, where it is an adapter on the actor's base.
    """

    actor: PreTrainedModel
    reference: PreTrainedModel | None
    reward_funcs: list[Any]
    reward_processing_classes: list[Any]
    critic: nn.Module
    reward_adapter: PeftModel | None


def resolve_args(args: PPOConfigX | None, model: Model | None) -> PPOConfigX:
    """`args`, or the defaults with an output folder named after the model."""
    if args is None:
        path = model if isinstance(model, str) else "" if model is None else get_config_model_id(model.config)
        return PPOConfigX(f"{path.rstrip('/').split('/')[-1]}-PPO")
    if not isinstance(args, PPOConfigX):
        raise TypeError(f"`args` is a {type(args).__name__}; PPOTrainerX needs a `PPOConfigX`.")
    return args


def check_roles(
    args: PPOConfigX,
    model: Model | None,
    ref_model: Model | None,
    reward_model: Model | None,
    value_model: Model | None,
    reward_funcs: list[Any],
    has_other_reward: bool,
    peft_config: PeftConfig | None,
) -> None:
    """Raises `ValueError` for models that cannot make a run, from what was passed alone."""
    if model is None:
        raise ValueError("There is no model to train: pass `model`, or set `sft_model_path`.")
    if reward_model is None and not has_other_reward:
        raise ValueError(
            "There is no reward at all: pass `reward_model`, `reward_funcs`, or an `environment_factory` whose "
            "environment has a `get_reward`, or set `reward_model_path`."
        )
    if not isinstance(model, str):
        if ref_model is model:
            raise ValueError(
                "`ref_model` is the `model` object itself, so the reference would move with the actor. Pass a copy, "
                "or `None` for a frozen copy."
            )
        if value_model is model:
            raise ValueError("`value_model` is the `model` object itself. Pass a copy, or set `critic='head'`.")
    if value_model is not None and args.critic == "head":
        raise ValueError("`critic='head'` puts the value head on the actor's trunk; remove `value_model`.")
    if value_model is not None and value_model is reward_model and not isinstance(value_model, str):
        raise ValueError(
            "`value_model` is the `reward_model` object itself, which stays frozen. Pass a copy or `None`."
        )
    check_adapters(args, model, reward_model, value_model, peft_config)
    whole = {"model": model, "ref_model": ref_model} | (
        {} if args.critic == "adapter" else {"value_model": value_model}
    )
    for name, path in whole.items():
        if isinstance(path, str):
            check_no_adapter(path, name)
    if isinstance(value_model, PreTrainedModel):
        check_value_model(value_model)
    elif isinstance(value_model, str) and args.critic == "model":
        check_value_checkpoint(value_model, args.trust_remote_code)
    for source in [*([] if adapter_config(reward_model) else [reward_model]), *reward_funcs]:
        if isinstance(source, PreTrainedModel | PeftModel):
            _check_reward_model(source)
        elif isinstance(source, str):
            check_no_adapter(source, "reward model")
            check_reward_checkpoint(source, args.trust_remote_code)
    adapters = model.peft_config if isinstance(model, PeftModel) else {}
    if args.ref_adapter_name is not None and args.ref_adapter_name not in adapters:
        raise ValueError(
            f"`ref_adapter_name={args.ref_adapter_name!r}` must be an adapter of the actor, which has "
            f"{list(adapters) or 'none'}; pass a `PeftModel` that holds it."
        )


def _check_reward_model(model: PreTrainedModel) -> None:
    check_single_label(model.config.num_labels, get_config_model_id(model.config) or type(model).__name__)


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: Model, args: PPOConfigX
) -> PreTrainedTokenizerBase:
    """The actor's tokenizer, padding on the left; raises `ValueError` when it cannot serve PPO."""
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision")
        processing_class = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=args.trust_remote_code, truncation_side="left"
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}; PPO reads text only. Pass its tokenizer."
        )
    if processing_class.eos_token_id is None:
        raise ValueError("The tokenizer has no eos token, so no response could end. Set `processing_class.eos_token`.")
    processing_class.padding_side = "left"
    vocabulary = text_config(model, args).vocab_size
    if processing_class.pad_token_id is not None and processing_class.pad_token_id >= vocabulary:
        # Scripts for TRL 1.12 add a pad token without a row in the embedding. Any id may stand at a masked position.
        processing_class = copy.deepcopy(processing_class)
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def load_roles(
    args: PPOConfigX,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    ref_model: Model | None,
    reward_model: Model | None,
    value_model: Model | None,
    reward_funcs: list[Any],
    reward_processing_classes: list[Any] | None,
    quantization_config: Any,
    peft_config: PeftConfig | None,
) -> Roles:
    """Loads what came as a path, and makes what did not come: reference and critic."""
    init_kwargs = _init_kwargs(args)
    actor_kwargs = init_kwargs | ({"quantization_config": quantization_config} if quantization_config else {})
    actor = create_model_from_path(model, **actor_kwargs) if isinstance(model, str) else model

    has_adapter = peft_config is not None or is_peft_model(actor)
    reference = None
    if args.needs_reference and not (ref_model is None and has_adapter):
        reference = _load_reference(
            ref_model, model, actor, frozen_kwargs(args, actor_kwargs, args.ref_model_quantization)
        )

    on_base = args.critic == "adapter" or adapter_config(reward_model) is not None
    if args.use_vllm and on_base and getattr(actor, "is_quantized", False):
        raise ValueError(
            "For vLLM the actor's adapter is merged into the base and taken out again, and on a quantised base PEFT "
            "makes new weights for that, which critic and reward model would not share. Switch `use_vllm` off, or do "
            "not quantise the base, or give these roles whole models."
        )
    reward_adapter = None
    if isinstance(reward_model, str) and adapter_config(reward_model) is not None:
        reward_adapter = reward_model = load_reward_adapter(actor, reward_model)
    sources = ([] if reward_model is None else [reward_model]) + reward_funcs
    tokenizers = _align(reward_processing_classes, sources)
    functions, shared = [], None
    reward_kwargs = frozen_kwargs(args, init_kwargs, args.reward_model_quantization)
    for i, source in enumerate(sources):
        function, tokenizers[i], reads_ids = _reward_source(
            source, tokenizers[i], tokenizer, actor.config.get_text_config().vocab_size, args, reward_kwargs
        )
        functions.append(function)
        if i == 0 and reward_model is not None and reads_ids:
            shared = function.model
    if reward_adapter is not None and shared is None:
        raise ValueError(
            f"The reward adapter {reward_adapter.config.name_or_path} was trained with another tokenizer than the "
            "actor's. Train it with the actor's, or pass a whole model as `reward_model`."
        )

    if args.critic == "adapter":
        start = None if peft_config is not None else args.model_adapter_name or actor.active_adapter
        critic: nn.Module = ValueAdapter(critic_adapter(actor, value_model, reward_adapter, peft_config, start))
    else:
        if value_model is None and shared is not None and args.reward_model_quantization is not None:
            value_model = reward_model  # the critic is trained: the same checkpoint, in full precision
        critic = build_critic(args.critic, actor, value_model, shared, init_kwargs)
    return Roles(actor, reference, functions, tokenizers, critic, reward_adapter)


def _init_kwargs(args: PPOConfigX) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for every model of the run, as GRPO chooses them."""
    kwargs = dict(args.model_init_kwargs or {})
    # Distributed training needs device_map=None.
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def _load_reference(
    ref_model: Model | None, model: Model, actor: PreTrainedModel, init_kwargs: dict[str, Any]
) -> PreTrainedModel:
    if ref_model is None and isinstance(model, str):
        ref_model = model
    if isinstance(ref_model, str):
        reference = create_model_from_path(ref_model, **init_kwargs)
    else:
        reference = copy_of(actor) if ref_model is None else ref_model
    disable_dropout(reference)
    return reference.requires_grad_(False).eval()


def _align(processing_classes: list[Any] | Any | None, sources: list[Any]) -> list[Any]:
    """One processing class, or `None`, per reward source."""
    if processing_classes is None:
        return [None] * len(sources)
    given = processing_classes if isinstance(processing_classes, list) else [processing_classes]
    if len(given) != len(sources):
        raise ValueError(
            f"There are {len(given)} `reward_processing_classes` for {len(sources)} reward sources (the reward model "
            "first, then `reward_funcs`). Give one for each, `None` for a function."
        )
    return list(given)


def _reward_source(
    source: Any, own_tokenizer: Any, tokenizer: Any, vocabulary: int, args: PPOConfigX, init_kwargs: dict[str, Any]
) -> tuple[Any, Any, bool]:
    """(what GRPO calls, its tokenizer, whether it is a model that reads the actor's ids)."""
    if isinstance(source, str):
        source = load_reward_model(source, init_kwargs)
    if not isinstance(source, nn.Module):
        return checked(source, get_callable_name(source)), None, False
    _check_reward_model(source)
    disable_dropout(source)
    own_tokenizer = own_tokenizer or find_tokenizer(get_config_model_id(source.config), args.trust_remote_code)
    if not reads_actor_ids(source, own_tokenizer, tokenizer, vocabulary):
        return source, own_tokenizer, False
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config: Any = source.config
    config.get_text_config().pad_token_id = pad_token_id
    name = (get_config_model_id(config) or "reward_model").rstrip("/").split("/")[-1]
    scorer = TokenScorer(source, name, pad_token_id, args.local_rollout_forward_batch_size)
    return scorer, None, True
