"""Loading the four models of a run: actor, reference, reward, critic."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..._trl import create_model_from_path, get_callable_name, get_config_model_id
from ...models import loading
from ...models.loading import adapter_config, is_quantized, text_config
from ...models.noise import disable_noise
from ...models.sharding import copy_of
from ..config import PPOConfigX
from .adapters import critic_adapter, load_reward_adapter
from .critic import Critic, ValueAdapter, ValueHead, build_critic, freeze
from .inputs import Given, Model
from .offload import frozen_kwargs
from .reward_calls import patient
from .reward_forms import RewardForm
from .reward_functions import checked
from .reward_models import (
    TokenScorer,
    check_reward_model,
    find_tokenizer,
    is_function,
    load_reward_model,
    reads_actor_ids,
)


@dataclass
class Roles:
    """
    The loaded models of a run.

    Args:
        actor: the policy, before `peft_config` wraps it.
        reference: a frozen model; `None` if it is an adapter of the actor, or not read.
        reward_funcs: the reward sources, the reward model first.
        critic: the value model, value adapter or value head.
        reward_adapter: the reward model, if it is an adapter on the actor's base.
    """

    actor: PreTrainedModel
    reference: PreTrainedModel | None
    reward_funcs: list[Any]
    critic: Critic
    reward_adapter: PeftModel | None


def own_tokenizer(processing_class: Any, given: Given, args: PPOConfigX) -> Any:
    """Return the tokenizer that was passed, else the one beside a saved adapter; `None` without either."""
    if processing_class is not None or given.adapter is None:
        return processing_class
    return given.adapter.processing_class(trust_remote_code=args.trust_remote_code, truncation_side="left")


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: Model, args: PPOConfigX
) -> PreTrainedTokenizerBase:
    """Return the actor's tokenizer, padding on the left; raise `ValueError` for one that PPO cannot use."""
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        processing_class = loading.load_tokenizer(path, truncation_side="left", **loading.source_options(args))
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}; PPO reads text only. Pass its tokenizer."
        )
    if processing_class.eos_token_id is None:
        raise ValueError("The tokenizer has no eos token, so no response could end. Set `processing_class.eos_token`.")
    processing_class.padding_side = "left"
    vocabulary = text_config(model, args).vocab_size
    if processing_class.pad_token_id is not None and processing_class.pad_token_id >= vocabulary:
        # Scripts for TRL 1.12 add a pad token without a row in the embedding. Masked positions may have any id.
        processing_class = copy.deepcopy(processing_class)
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def load_roles(args: PPOConfigX, tokenizer: PreTrainedTokenizerBase, given: Given) -> Roles:
    """Load the models that were given as paths, and make reference and critic if they were not given."""
    # 1. Actor and reference. A revision is the actor's
    init_kwargs = loading.init_kwargs(args)
    of_others = {name: value for name, value in init_kwargs.items() if name != "revision"}
    quantized = {"quantization_config": given.quantization_config} if given.quantization_config else {}
    actor: Any = given.model
    if given.adapter is not None:
        actor = given.adapter.load(args, given.quantization_config)
    elif isinstance(actor, str):
        actor = create_model_from_path(actor, **init_kwargs, **quantized)
    reference = None
    if args.needs_reference and not (given.ref_model is None and given.has_adapter):
        own = init_kwargs if given.ref_model is None else of_others
        kwargs = frozen_kwargs(args, own | quantized, args.ref_model_quantization)
        reference = _load_reference(given, actor, kwargs)
    on_base = args.critic == "adapter" or adapter_config(given.reward_model) is not None
    if args.use_vllm and on_base and is_quantized(actor):
        raise ValueError(
            "For vLLM the actor's adapter is merged into the base and taken out again, and on a quantised base PEFT "
            "makes new weights for that, which critic and reward model would not share. Switch `use_vllm` off, or do "
            "not quantise the base, or give these roles whole models."
        )
    # 2. The reward sources
    reward_adapter = None
    if isinstance(given.reward_model, str) and adapter_config(given.reward_model) is not None:
        reward_adapter = load_reward_adapter(actor, given.reward_model)
    functions, shared = _load_rewards(args, tokenizer, given, actor, reward_adapter, of_others)
    # 3. The critic
    critic: Critic
    if args.critic == "adapter":
        start = None if given.has_new_adapter else args.model_adapter_name or actor.active_adapter
        critic = ValueAdapter(critic_adapter(actor, given.value_model, reward_adapter, given.peft_config, start))
    else:
        value_model = given.value_model
        of_reward_model = args.critic == "model" and value_model is None and shared is not None
        if of_reward_model and args.reward_model_quantization is not None:
            value_model = given.reward_model  # the critic is trained: the same checkpoint, in full precision
        critic = build_critic(args.critic, actor, value_model, shared, of_others)
    if isinstance(critic, ValueHead):
        critic.stops_gradient = args.critic_stop_gradient
    freeze(critic, args.freeze_critic)
    return Roles(actor, reference, functions, critic, reward_adapter)


def _load_rewards(
    args: PPOConfigX,
    tokenizer: PreTrainedTokenizerBase,
    given: Given,
    actor: PreTrainedModel,
    reward_adapter: PeftModel | None,
    init_kwargs: dict[str, Any],
) -> tuple[list[Any], PreTrainedModel | None]:
    """Return the reward sources, and the reward model if it reads the actor's token ids."""
    reward_model = given.reward_model if reward_adapter is None else reward_adapter
    sources = ([] if reward_model is None else [reward_model]) + given.reward_funcs
    tokenizers = _align(given.reward_processing_classes, sources)
    reward_kwargs = frozen_kwargs(args, init_kwargs, args.reward_model_quantization)
    vocabulary = actor.config.get_text_config().vocab_size
    functions = [
        _reward_source(source, own, tokenizer, vocabulary, args, reward_kwargs)
        for source, own in zip(sources, tokenizers, strict=True)
    ]
    first = functions[0] if reward_model is not None else None
    shared = first.model if isinstance(first, TokenScorer) and first.form.shares_ids else None
    if reward_adapter is not None and shared is None:
        raise ValueError(
            f"The reward adapter {reward_adapter.config.name_or_path} was trained with another tokenizer than the "
            "actor's. Train it with the actor's, or pass a whole model as `reward_model`."
        )
    return functions, shared


def _load_reference(given: Given, actor: PreTrainedModel, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    ref_model = given.ref_model
    if ref_model is None and isinstance(given.model, str):
        ref_model = given.model
    if isinstance(ref_model, str):
        reference = create_model_from_path(ref_model, **init_kwargs)
    else:
        reference = copy_of(actor) if ref_model is None else ref_model
    disable_noise(reference)
    return reference.requires_grad_(False).eval()


def _align(processing_classes: list[Any] | Any | None, sources: list[Any]) -> list[Any]:
    """Return one processing class, or `None`, per reward source."""
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
) -> Any:
    """Return a reward function with checks of its answers, or a reward model's scorer."""
    if isinstance(source, str):
        source = load_reward_model(source, init_kwargs)
    if is_function(source):  # GRPO would take a module for a model
        name = type(source).__name__
        return checked(patient(partial(source), name, args), name)
    if not isinstance(source, nn.Module):
        name = get_callable_name(source)
        return checked(patient(source, name, args), name)
    check_reward_model(source)
    disable_noise(source.eval())
    config: Any = source.config
    own_tokenizer = own_tokenizer or find_tokenizer(get_config_model_id(config), args.trust_remote_code)
    if isinstance(source, PeftModel) and own_tokenizer is not None:  # its config is the base's, not that of training
        pad, eos = own_tokenizer.pad_token_id, own_tokenizer.eos_token_id
        config.get_text_config().pad_token_id = eos if pad is None else pad
    shares_ids = reads_actor_ids(source, own_tokenizer, tokenizer, vocabulary)
    form = RewardForm(own_tokenizer or tokenizer, tokenizer, shares_ids, args.chat_template_kwargs)
    name = (get_config_model_id(config) or "reward_model").rstrip("/").split("/")[-1]
    return TokenScorer(source, name, form, args.local_rollout_forward_batch_size, args.score_batch_tokens)
