"""
Checks that refuse a run which would train nothing, before it starts or before its first optimizer step; and removal of
modules that an earlier run has left in a model, which would be trained and saved with it.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .sharding import is_fsdp


logger = logging.getLogger(__name__)

WAYS_OUT = (
    "`merge_and_unload()` leaves every weight frozen: call `model.requires_grad_(True)` after it. Load an adapter to "
    "train on with `PeftModel.from_pretrained(..., is_trainable=True)`, or pass a `peft_config` for a new one."
)


def lend(owner: Any, name: str, module: nn.Module) -> None:
    """Make `module` a submodule of `owner` for a run; `save_pretrained` of the owner leaves it out."""
    owner.add_module(name, module)
    vars(owner).setdefault("_lent", set()).add(name)
    keys = {f"{name}.{key}" for key in module.state_dict()}
    owner._keys_to_ignore_on_save = {*(getattr(owner, "_keys_to_ignore_on_save", None) or ()), *keys}


def take_back(model: Any) -> None:
    """Remove from a model in memory what an earlier run has lent it, such as PPO's critic, with a warning."""
    owners = [module for module in model.modules() if "_lent" in vars(module)] if isinstance(model, nn.Module) else []
    for owner in owners:
        names = vars(owner).pop("_lent")
        for name in names & owner._modules.keys():
            delattr(owner, name)
        logger.warning(
            "%s still held the %s of an earlier run. It is removed now, so that run cannot be resumed with it.",
            type(owner).__name__,
            " and ".join(sorted(names)),
        )


def check_trainable(model: nn.Module, role: str, but_not: Iterable[nn.Parameter] = ()) -> list[nn.Parameter]:
    """Return the parameters that will be trained, without another role's in `but_not`; raise `ValueError` if none."""
    others = {id(parameter) for parameter in but_not}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    if not trained:
        raise ValueError(f"No parameter of the {role} requires a gradient, so it would never learn. {WAYS_OUT}")
    return trained


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, roles: dict[str, list[nn.Parameter]], needed: str
) -> None:
    """Raise `ValueError` if the user's own optimizer does not hold every trained parameter of every role."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for role, parameters in roles.items():
        missing = sum(id(parameter) not in held for parameter in parameters)
        if missing:
            raise ValueError(
                f"The optimizer in `optimizers` does not hold {missing} of the {role}'s {len(parameters)} trained "
                f"parameters, which would stay as they are. {needed}"
            )


class RequireGradients(TrainerCallback):
    """
    Stops a run before its first optimizer step when a role gets no gradient: with gradient checkpointing, or beside
    another role, a backward pass that reaches none of its parameters raises no error.

    Args:
        others: trained parameters of other roles. A step in which they have no gradient either is skipped.
        rests: whether the role does not learn in the present step.

    Attributes:
        has_begun: whether the role has had a gradient.
    """

    def __init__(
        self,
        role: str,
        parameters: list[nn.Parameter],
        others: Iterable[nn.Parameter] = (),
        rests: Callable[[], bool] = lambda: False,
    ):
        self.role, self.parameters, self.others, self.rests = role, parameters, list(others), rests
        self.has_begun = False
        self._number = len(parameters)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_fsdp(args.fsdp):  # which has shards in their place: held here they would stay whole in host memory
            self.parameters, self.others = [], []

    def check_graph(self, loss: torch.Tensor) -> None:
        """Raise `ValueError` for a training loss that depends on no trained parameter."""
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(self._unreached())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.has_begun or self.rests():
            return
        is_partitioned = args.deepspeed_plugin is not None or is_fsdp(args.fsdp)  # these keep gradients elsewhere
        reached = is_partitioned or any(parameter.grad is not None for parameter in self.parameters)
        if not reached and (not self.others or any(parameter.grad is not None for parameter in self.others)):
            raise ValueError(self._unreached())
        self.has_begun = reached

    def _unreached(self) -> str:
        return (
            f"The loss depends on none of the {self.role}'s {self._number} trained parameters, so it would "
            "never learn. Unfreeze what its forward pass reads (`requires_grad_(True)`), or activate the adapter that "
            "is to be trained (`set_adapter`)."
        )
