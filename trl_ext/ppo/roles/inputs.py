"""The constructor's arguments, and the checks whether they can make a run, before any weights are loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..._trl import get_callable_name, get_config_model_id
from ...models.adapter_copies import check_copyable
from ...models.fingerprint import identity_of
from ...models.loading import (
    adapter_config,
    check_no_adapter,
    check_same_tokens,
    read_config,
    refuse_encoder_decoder,
    source_options,
    text_config,
)
from ...models.saved_adapter import SavedAdapter, saved_adapter
from ...models.sharding import check_fsdp, check_unquantized, is_fsdp, is_stage3
from ...models.trainable import check_trainable
from ...runs.requirements import require_kind
from ..config import PPOConfigX
from .adapter_checks import check_adapters
from .critic import check_pretrained, check_value_checkpoint, check_value_model, is_value_head
from .offload import check_placement
from .reward_models import check_reward_checkpoint, check_reward_model


Model: TypeAlias = PreTrainedModel | PeftModel | str


@dataclass(frozen=True)
class Given:
    """
    The models and their companions as they were passed to `PPOTrainerX`, which describes each. Of an actor that was
    given as a saved `adapter`, `model` is the base and `peft_config` the adapter's.
    """

    model: Model | None
    ref_model: Model | None = None
    reward_model: Model | None = None
    value_model: Model | None = None
    reward_funcs: list[Any] = field(default_factory=list)
    reward_processing_classes: Any = None
    quantization_config: Any = None
    peft_config: PeftConfig | None = None
    tools: list[Callable] | None = None
    environment_factory: Any = None
    adapter: SavedAdapter | None = None

    @property
    def has_other_reward(self) -> bool:
        """Return whether something other than `reward_model` gives a reward."""
        return bool(self.reward_funcs) or self.environment_factory is not None

    @property
    def has_adapter(self) -> bool:
        """Return whether the actor trains an adapter."""
        return self.peft_config is not None or isinstance(self.model, PeftModel)

    @property
    def has_new_adapter(self) -> bool:
        """Return whether that adapter is new, so that the actor without it is what training starts from."""
        return self.peft_config is not None and self.adapter is None


def resolve(args: PPOConfigX | None, **passed: Any) -> tuple[PPOConfigX, Given]:
    """
    Return the options and the `passed` arguments. Models that were not passed may be paths in the options; of an actor
    that is a saved adapter, the options are those of its base.
    """
    funcs = passed["reward_funcs"]
    passed["reward_funcs"] = [] if funcs is None else funcs if isinstance(funcs, list) else [funcs]
    given = Given(**passed)
    if args is None:
        model = given.model
        path = model if isinstance(model, str) else "" if model is None else get_config_model_id(model.config)
        args = PPOConfigX(f"{path.rstrip('/').split('/')[-1]}-PPO")
    if not isinstance(args, PPOConfigX):
        raise TypeError(f"`args` is a {type(args).__name__}; PPOTrainerX needs a `PPOConfigX`.")
    if given.model is None:
        given = replace(given, model=args.sft_model_path)
    if given.reward_model is None and not given.has_other_reward:
        given = replace(given, reward_model=args.reward_model_path)
    saved = saved_adapter(given.model, args, given.peft_config)
    if saved is None:
        return args, given
    return saved.args_of_base(args), replace(given, model=saved.base, peft_config=saved.config, adapter=saved)


def policy_of(args: PPOConfigX, given: Given) -> dict[str, str | None]:
    """Return the identity of the actor that a run starts from; options and actor are those that `resolve` returns."""
    model: Any = given.model
    saved, revision = given.adapter, source_options(args).get("revision")
    if saved is not None:
        return identity_of(saved.base, saved.folder, revision, saved.folder)
    if isinstance(model, str):
        return identity_of(model, model, revision)
    name = get_config_model_id(model.config) or type(model).__name__
    return identity_of(model, name, adapter=args.model_adapter_name)


def check_given(args: PPOConfigX, given: Given) -> None:
    """Raise `ValueError` for models that cannot make a run, without loading weights."""
    _check_kinds(given)
    _check_weights(args.reward_weights, given)
    _check_identity(given, args.critic)
    if isinstance(given.model, nn.Module) and given.peft_config is None and args.model_adapter_name is None:
        check_trainable(given.model, "actor")
    check_adapters(args, given.model, given.reward_model, given.value_model, given.peft_config)
    _check_models(args, given)
    # A reference that is an adapter of the actor: a copy of the first one, or the one in `ref_adapter_name`
    adapters = given.model.peft_config if isinstance(given.model, PeftModel) else {}
    active = given.model.active_adapter if isinstance(given.model, PeftModel) else "default"
    if given.adapter is not None:
        adapters = {active: given.adapter.config}
        if args.model_adapter_name not in (None, active):
            raise ValueError(
                f"`model_adapter_name` is {args.model_adapter_name!r}, and an adapter that is loaded from its folder "
                f"is named {active!r}. Leave the option out, or pass a `PeftModel`."
            )
    copies_start = given.ref_model is None and args.ref_adapter_name is None and not given.has_new_adapter
    if adapters and args.needs_reference and copies_start:
        check_copyable(adapters.get(args.model_adapter_name or active))
    if args.ref_adapter_name is not None and args.ref_adapter_name not in adapters:
        raise ValueError(
            f"`ref_adapter_name={args.ref_adapter_name!r}` must be an adapter of the actor, which has "
            f"{list(adapters) or 'none'}; pass a `PeftModel` that holds it."
        )
    check_placement(
        args, given.model, given.ref_model, given.reward_model, given.reward_funcs, has_adapter=given.has_adapter
    )
    trained_in_full = {} if given.has_adapter else {"model": given.model}
    if args.critic == "model":
        trained_in_full["value_model"] = given.value_model
    if is_stage3(args.deepspeed_plugin):
        check_unquantized(args, given.quantization_config, trained_in_full)
    if is_fsdp(args.fsdp):
        frozen = {"ref_model": given.ref_model, "reward_model": given.reward_model}
        frozen |= {
            f"reward_funcs[{i}]": each
            for i, each in enumerate(given.reward_funcs)
            if isinstance(each, str | PreTrainedModel)
        }
        check_fsdp(args, given.quantization_config, {"model": given.model} | trained_in_full | frozen)
    # Ranks would wait for each other in turns of a conversation that some of them do not take
    has_turns = bool(given.tools) or given.environment_factory is not None
    if has_turns and is_stage3(args.deepspeed_plugin) and not args.use_vllm and not args.ds3_gather_for_generation:
        raise ValueError(
            "With tools, the processes generate different numbers of turns, and `ds3_gather_for_generation=False` has "
            "them gather each layer together for every token: they would wait for each other without end. Leave it "
            "on, or generate with vLLM (`use_vllm`)."
        )


def _check_kinds(given: Given) -> None:
    """Check that actor and reward were given, models as paths or modules, reward functions as callables."""
    if given.model is None:
        raise ValueError("There is no model to train: pass `model`, or set `sft_model_path`.")
    if given.reward_model is None and not given.has_other_reward:
        raise ValueError(
            "There is no reward at all: pass `reward_model`, `reward_funcs`, or an `environment_factory` whose "
            "environment has a `get_reward` or a `get_turn_rewards`, or set `reward_model_path`."
        )
    for name, model in {"model": given.model, "ref_model": given.ref_model, "value_model": given.value_model}.items():
        if model is not None:
            require_kind(model, name)
    for source in given.reward_funcs:
        if not (isinstance(source, str) or callable(source)):
            raise ValueError(
                f"`reward_funcs` has a {type(source).__name__} ({source!r:.60}); give a function, a reward model or "
                "its path, or a list of them."
            )


def _check_weights(weights: list[float] | None, given: Given) -> None:
    """Check that there is a weight for each reward source that was given, if there are any."""
    names = ["the reward model"] if given.reward_model is not None else []
    names += [source if isinstance(source, str) else get_callable_name(source) for source in given.reward_funcs]
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers for {len(names)} rewards. Give one for each, such as "
            f"`reward_weights={[1.0] * len(names)}`, in this order: {', '.join(names)}."
        )


def _check_identity(given: Given, critic: str) -> None:
    """Check that no object was given as two models."""
    model, value_model = given.model, given.value_model
    if not isinstance(model, str):
        if given.ref_model is model:
            raise ValueError(
                "`ref_model` is the `model` object itself, so the reference would move with the actor. Pass a copy, "
                "or `None` for a frozen copy."
            )
        if value_model is model:
            raise ValueError("`value_model` is the `model` object itself. Pass a copy, or set `critic='head'`.")
    if value_model is not None and critic == "head" and not is_value_head(value_model):
        raise ValueError(
            "`critic='head'` puts the value head on the actor's trunk; remove `value_model`, or give the folder of "
            "such a head, as `trl-ext critic --critic head` writes it."
        )
    if value_model is not None and value_model is given.reward_model and not isinstance(value_model, str):
        raise ValueError(
            "`value_model` is the `reward_model` object itself, which stays frozen. Pass a copy or `None`."
        )


def _check_models(args: PPOConfigX, given: Given) -> None:
    """Check that whole models are no adapters, and that critic and reward models have one label."""
    whole = {"model": given.model, "ref_model": given.ref_model}
    if args.critic != "adapter":
        whole["value_model"] = given.value_model
    for name, path in whole.items():
        if isinstance(path, nn.Module) and name != "value_model":
            refuse_encoder_decoder(path.config, type(path).__name__)
        if isinstance(path, str):
            check_no_adapter(path, name)
            if name == "model" or (name == "ref_model" and args.needs_reference):
                text_config(path, args, name)  # refuses a model for scoring text
    if isinstance(given.value_model, nn.Module):
        check_value_model(given.value_model)
    elif isinstance(given.value_model, str):
        if args.critic == "model":
            check_value_checkpoint(given.value_model, args.trust_remote_code)
        check_pretrained(given.value_model, args.critic, partial(policy_of, args, given))
    for source in [*([] if adapter_config(given.reward_model) else [given.reward_model]), *given.reward_funcs]:
        if isinstance(source, nn.Module):
            check_reward_model(source)
        elif isinstance(source, str):
            check_no_adapter(source, "reward model")
            check_reward_checkpoint(source, args.trust_remote_code)


def check_ids(args: PPOConfigX, given: Given, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raise `ValueError` for a reference or critic that does not know every id that the actor can sample, or knows it as
    another token, and for the exact KL between different vocabularies.
    """
    vocabulary = text_config(given.model, args).vocab_size
    others = {"ref_model": given.ref_model if args.needs_reference else None}
    if args.critic == "model":
        others["value_model"] = given.value_model
    for name, model in others.items():
        if model is None:
            continue
        config: Any = model.config if not isinstance(model, str) else None
        if config is None:
            config = read_config(model, "reference or critic", trust_remote_code=args.trust_remote_code)
        # None for a user's own class that does not say
        its = getattr(getattr(config, "get_text_config", lambda config=config: config)(), "vocab_size", None)
        exact = name == "ref_model" and args.kl_estimator == "full"
        if its is not None and (its < vocabulary or (exact and its != vocabulary)):
            why = (
                "the actor may sample any of its ids" if its < vocabulary else "the exact KL sums over one vocabulary"
            )
            raise ValueError(
                f"The actor has a vocabulary of {vocabulary} tokens and `{name}` one of {its}; {why}. Give a model "
                f"with the actor's vocabulary, or load it and call `resize_token_embeddings({vocabulary})`."
            )
        check_same_tokens(tokenizer, model, name, args)
    if args.critic != "model" and isinstance(given.value_model, str):
        check_same_tokens(tokenizer, given.value_model, "value_model", args)
