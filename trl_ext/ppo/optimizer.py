"""
One optimizer for actor and critic, whose parameter groups are of the one or of the other: the critic's options, its
schedule, steps of the critic alone, and the gradient's norm by role.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from ..masked import AllReduce
from .config import PPOConfigX


ACTOR, CRITIC = "actor", "critic"
# The key of a parameter group that says whose it is. DeepSpeed keeps it when it puts its own tensors in a group.
ROLE = "role"


def check_own(optimizers: tuple[Any, Any], args: PPOConfigX) -> None:
    """Raise `ValueError` for options that the user's own optimizer or scheduler would not follow."""
    optimizer, scheduler = optimizers
    read = {} if optimizer is None else args.of_optimizer
    read |= {} if optimizer is None and scheduler is None else args.of_scheduler
    for name, value in read.items():
        if value is not None:
            raise ValueError(
                f"`{name}={value}` is followed by the optimizer and scheduler that the trainer makes, and "
                "`optimizers` brings another. Remove one of them; your optimizer may have a group for the critic."
            )


def has_own_groups(args: PPOConfigX) -> bool:
    """Return whether the critic has parameter groups of its own."""
    read = args.of_optimizer | args.of_scheduler
    return args.deepspeed_plugin is not None or any(value is not None for value in read.values())


def give_own_groups(
    optimizer: torch.optim.Optimizer, critic: nn.Module, args: PPOConfigX, decayed: Iterable[nn.Parameter]
) -> None:
    """
    Move the critic's parameters into groups of their own, with the options that are set for it.

    Args:
        decayed: the parameters that weight decay is for; the others have none.
    """
    of_critic = {id(parameter) for parameter in critic.parameters()}
    decays = {id(parameter) for parameter in decayed}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in of_critic]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_critic]
        group[ROLE] = ACTOR
        if mine:
            options = {name: value for name, value in group.items() if name != "params"} | {ROLE: CRITIC}
            if args.critic_learning_rate is not None:
                options["lr"] = args.critic_learning_rate
            if args.critic_weight_decay is not None and id(mine[0]) in decays:
                options["weight_decay"] = args.critic_weight_decay
            optimizer.add_param_group(options | {"params": mine})


def give_own_schedule(scheduler: LambdaLR, args: PPOConfigX, num_training_steps: int) -> None:
    """Let the critic's groups follow `critic_lr_scheduler_type` in a scheduler that has just been made."""
    optimizer = scheduler.optimizer
    of_critic: Any = get_scheduler(
        args.critic_lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
    )
    for i, group in enumerate(optimizer.param_groups):
        if group[ROLE] == CRITIC:
            scheduler.lr_lambdas[i] = of_critic.lr_lambdas[i]
        group["lr"] = scheduler.base_lrs[i] * scheduler.lr_lambdas[i](0)  # `of_critic` has set all to its own


def norms_by_role(model: nn.Module, critic: nn.Module, loss_scale: float = 1.0) -> dict[str, float]:
    """Return the norm of the gradient of actor and critic; what has no gradient is left out."""
    of_critic = {id(parameter) for parameter in critic.parameters()}
    gradients: dict[str, list[Tensor]] = {ACTOR: [], CRITIC: []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients[CRITIC if id(parameter) in of_critic else ACTOR].append(parameter.grad)
    norms = {role: nn.utils.get_total_norm(of_role) for role, of_role in gradients.items() if of_role}
    # Of shares of FSDP2 it is a share, too.
    whole = {role: norm.full_tensor() if isinstance(norm, DTensor) else norm for role, norm in norms.items()}
    return {role: norm.item() / loss_scale for role, norm in whole.items()}


@contextmanager
def stepping_now(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """
    Within the context gradients are exchanged and the optimizer steps, also where the Trainer still accumulates, and
    schedules stand still.
    """
    wanted: dict[str, Any] = {}
    if isinstance(model, DistributedDataParallel):
        wanted = {"require_backward_grad_sync": True}
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        wanted = {"lr_scheduler": None}  # that of the engine, which its steps would move
    gradients = accelerator.gradient_state
    synchronised, before = gradients.sync_gradients, {name: getattr(model, name) for name in wanted}
    gradients._set_sync_gradients(True)
    vars(model).update(wanted)
    try:
        yield
    finally:
        gradients._set_sync_gradients(synchronised)
        vars(model).update(before)


class StepsByRole(TrainerCallback):
    """
    Tell the steps of DeepSpeed's optimizer apart by role, after `give_own_groups`: pass over the actor's groups, and
    measure the gradient of each role. ZeRO steps its optimizer group by group, each with this rank's shard of the
    gradient, which has been clipped.
    """

    def __init__(self) -> None:
        self._passes_over_actor = False
        self._left: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._squares: dict[str, float] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
            optimizer = optimizer.optimizer
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @contextmanager
    def critic_alone(self) -> Iterator[None]:
        """Within the context, a step leaves the actor's weights and the states of its optimizer as they are."""
        self._passes_over_actor = True
        try:
            yield
        finally:
            self._passes_over_actor = False

    def forget_norms(self) -> None:
        self._squares.clear()

    def pop_norms(self, whole: float, all_reduce: AllReduce, device: torch.device) -> dict[str, float]:
        """Return the norm of the gradient of the last step by role, from that of both, `whole`, before clipping."""
        roles = (ACTOR, CRITIC)
        squares = all_reduce(torch.tensor([self._squares.get(role, 0.0) for role in roles], device=device))
        norms = (squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)).sqrt() * whole
        stepped, self._squares = self._squares, {}
        return {role: norm for role, norm in zip(roles, norms.tolist(), strict=True) if role in stepped}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if self._passes_over_actor and group[ROLE] == ACTOR:
                self._left.append((group, group["params"]))
                group["params"] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    square = parameter.grad.detach().float().square().sum().item()
                    self._squares[group[ROLE]] = self._squares.get(group[ROLE], 0.0) + square

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, parameters in self._left:
            group["params"] = parameters
        self._left.clear()
