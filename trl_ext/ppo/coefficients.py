"""The current weights of the loss terms: fixed ones, and those of both KLs, which controllers move."""

from typing import Any

from .config import PPOConfigX
from .controllers import BandController, FixedController, KLController, ProportionalController, SchulmanController
from .terms import WEIGHTED, PPOCoefficients


DEFAULT_KL_HORIZON = 10_000


class Coefficients:
    """
    The weights of the loss terms, with the controllers that move some of them.

    Args:
        args: the loop's config.
        aux: weight of the model's own auxiliary loss, which its config may declare.
    """

    def __init__(self, args: PPOConfigX, aux: float):
        self._args = args
        self._aux = aux
        self._reference: KLController = FixedController(args.kl_coef)
        if args.kl_controller == "proportional" and args.kl_target is not None:
            horizon = args.kl_horizon or DEFAULT_KL_HORIZON
            self._reference = ProportionalController(args.kl_coef, args.kl_target, horizon)
        elif args.kl_controller == "band":
            self._reference = BandController(args.kl_coef, *args.kl_band)
        self._old_policy: KLController = FixedController(args.old_kl_coef)
        if args.old_kl_target is not None:
            self._old_policy = SchulmanController(args.old_kl_coef, args.old_kl_target)
        self._kl: float | None = None
        self._old_kls: list[float] = []

    @property
    def now(self) -> PPOCoefficients:
        """The current weights; those that no controller moves are read from the options each time."""
        known = {"kl": self._reference.coef, "old_kl": self._old_policy.coef, "aux": self._aux}
        of_options = {term.coefficient: term.option for term in WEIGHTED if term.coefficient not in known}
        return PPOCoefficients(**known, **{name: getattr(self._args, option) for name, option in of_options.items()})

    def saw_kl(self, kl: float) -> None:
        """Take note of a rollout's KL(π_old ‖ π_ref), nats per sequence."""
        self._kl = kl

    def saw_old_kl(self, old_kl: float) -> None:
        """Take note of an optimizer step's KL[π_old ‖ π_θ], nats per token."""
        self._old_kls.append(old_kl)

    def close_rollout(self) -> None:
        """Move both coefficients by the KLs seen since the last call; of KL[π_old ‖ π_θ], the last pass counts."""
        if self._kl is not None:
            self._reference.update(self._kl, episodes=self._args.batch_size)
        if self._old_kls:
            of_last_pass = self._old_kls[-self._args.num_mini_batches :]
            self._old_policy.update(sum(of_last_pass) / len(of_last_pass), episodes=self._args.batch_size)
        self._kl, self._old_kls = None, []

    def state_dict(self) -> dict[str, Any]:
        """Return the KLs seen so far and the coefficients, for a checkpoint."""
        coefs = {"reference": self._reference.coef, "old_policy": self._old_policy.coef}
        return {"coefs": coefs, "kl": self._kl, "old_kls": self._old_kls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a fixed coefficient stays as the options have it."""
        self._kl, self._old_kls = state["kl"], list(state["old_kls"])
        for name, controller in (("reference", self._reference), ("old_policy", self._old_policy)):
            if not isinstance(controller, FixedController):
                controller.coef = state["coefs"][name]
