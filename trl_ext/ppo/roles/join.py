"""Joining the roles of a run: critic and reward adapter become part of the actor, the frozen models stay beside it."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import _trl
from ...models.loading import base_of, is_quantized
from ...models.noise import disable_noise
from ...models.precision import drop_checkpointing, keep_4_bit_differentiable
from ...models.rounding import warn_of_rounding
from ...models.sharding import declare_head, is_fsdp, is_partitioned, is_stage3
from ...models.trainable import RequireGradients, check_optimizer, check_trainable
from ..config import PPOConfigX
from .adapters import REWARD, stand_on
from .forward import ActorCriticForward
from .load import Roles
from .reward_models import token_scorer


def join_to_actor(
    model: Any, roles: Roles, args: PPOConfigX, packs: bool
) -> tuple[list[nn.Module], ActorCriticForward]:
    """
    Make critic and reward adapter submodules of the actor, whose forward then answers for all three. A new adapter of
    the actor must be there before, since PEFT would add it to their modules too.

    Args:
        model: the actor, perhaps a `PeftModel`.
        packs: whether rows are to be packed.

    Returns:
        The modules that were joined, the critic first, and the forward that answers.
    """
    actor = base_of(model)
    drop_checkpointing(actor, args)
    roles.critic.attach(model, (args.gradient_checkpointing_kwargs or {}) if args.gradient_checkpointing else None)
    attached: list[nn.Module] = [roles.critic]
    if roles.reward_adapter is not None:
        stand_on(model, roles.reward_adapter, REWARD)
        attached.append(roles.reward_adapter)
    keep_4_bit_differentiable(model)
    disable_noise(model)
    forward = ActorCriticForward(
        actor, roles.critic, roles.reward_adapter, role="model", packs=packs, shares=args.shares_prompts
    )
    if is_stage3(args.deepspeed_plugin):
        declare_head(actor)
    return attached, forward


def can_be_asked(model: nn.Module, args: PPOConfigX) -> bool:
    """Return whether a model can run now: it is on its device, and ZeRO-3 or FSDP do not partition it."""
    if is_partitioned(model) or is_fsdp(args.fsdp):
        return False
    return next(model.parameters()).device.type == args.device.type


def check_learning(
    model: nn.Module,
    critic: nn.Module,
    args: PPOConfigX,
    optimizer: torch.optim.Optimizer | None,
    has_master_weights: bool,
    warms_up: Callable[[], bool],
) -> RequireGradients:
    """
    Check that actor and critic can learn; warn if rounding of their weights would swallow most steps.

    Args:
        model: the actor, which holds `critic`.
        optimizer: the user's own, which must hold every trained parameter.
        has_master_weights: whether the optimizer keeps a float32 copy of 16-bit weights.
        warms_up: whether only the critic learns in the present step.

    Returns:
        The callback that checks the actor's gradients.

    Raises:
        ValueError: when actor or critic would not be trained.
    """
    of_critic = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    of_actor = check_trainable(model, "actor", but_not=of_critic)
    check_optimizer(
        optimizer,
        {"actor": of_actor, "critic": of_critic},
        "Give it those of `model` and of a `value_model` of your own, or leave the optimizer to the trainer "
        "(`learning_rate`, `critic_learning_rate`).",
    )
    warn_of_rounding(of_actor, args.learning_rate, has_master_weights, "actor")
    if args.critic_learning_rate is None:
        warn_of_rounding(of_critic, args.learning_rate, has_master_weights, "critic")
    else:
        warn_of_rounding(of_critic, args.critic_learning_rate, has_master_weights, "critic", "critic_learning_rate")
    return RequireGradients("actor", of_actor, of_critic, warms_up)


def place_reference(
    reference: Any, args: PPOConfigX, accelerator: Accelerator
) -> tuple[nn.Module, ActorCriticForward]:
    """Freeze and place the reference; return it, and its forward, which is the actor's without a critic."""
    _trl.add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    forward = ActorCriticForward(reference, packs=args.packing, shares=args.shares_prompts)
    if can_be_asked(reference, args):
        forward.settle(accelerator.autocast)
    return _trl.prepare_frozen(reference, accelerator, is_quantized(reference)), forward


def place_reward_models(
    reward_funcs: list[Any],
    reward_adapter: nn.Module | None,
    ask_adapter: Callable[..., Tensor],
    accelerator: Accelerator,
) -> None:
    """Freeze and place the reward models that read token ids; an adapter is called through the actor."""
    for scorer in map(token_scorer, reward_funcs):
        if scorer is not None and scorer.model is reward_adapter:
            scorer.ask = ask_adapter
        elif scorer is not None:
            is_of_ones_own = not isinstance(scorer.model, PreTrainedModel | PeftModel)
            scorer.model = _trl.prepare_frozen(scorer.model, accelerator, is_quantized(scorer.model))
            if is_of_ones_own:
                scorer.try_out()
