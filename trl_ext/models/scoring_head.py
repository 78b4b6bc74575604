"""
The head that scores as the model's own forward does: TRL's fused head if it computes the same, else the model's own
head; if neither does, an error.

TRL's head projects the trunk's last state with the weight of the output embedding. Some families compute more between
the two: ModernBERT-decoder has a dense layer, RecurrentGemma a cap of another name, Inkling a divisor.
"""

import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .._trl import FusedCausalLMOutput, FusedHead
from .lm_head import score_only
from .noise import require_numbers, silence
from .probe import in_mode, probe_rows, require_causal, tolerance


logger = logging.getLogger(__name__)

READ = {"weight", "bias"}  # the parameters of a head that TRL's fused head reads
AUX_ROUNDING = 0.02  # relative error of a load-balancing loss that bfloat16 explains; another formula is further off


class ScoringHead:
    """
    Answers `model(..., labels=…, fused_lm_head=True)` in place of the forward that TRL's `add_fused_lm_head` has
    patched in, by TRL's head or the model's own. `role` is for errors; a `silent` model must have no noise in training
    mode.

    Attributes:
        uses_own: whether the model's own head scores; `None` before `settle`.
    """

    def __init__(self, model: PreTrainedModel, role: str, silent: bool = False):
        self.model = model
        self.name = f"{type(model).__name__} (`{role}`)"
        self.trains = role == "model"
        self.silent = silent
        self.trunk = trunk_of(model)
        self.uses_own: bool | None = None
        self._trl = FusedHead(model)
        self._plain = patched = model.forward  # autocast and all; without `fused_lm_head` the model's own

        @functools.wraps(type(model).forward)
        def forward(_: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return patched(*args, **kwargs)
            if self.uses_own:
                return self._score(*args, **kwargs)
            with self._trl.kernel():
                return patched(*args, fused_lm_head=True, **kwargs)

        model.forward = self._forward = types.MethodType(forward, model)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (n, V) of trunk states (n, H), float32 and divided by the temperature."""
        if not self.uses_own:
            return self._trl.logits(states)
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        with trunk_gives(self.trunk, states[None]):
            return self._plain(input_ids=ids, use_cache=False).logits[0].float() / self._trl.temperature

    @torch.no_grad()
    def settle(self) -> None:
        """
        Choose the head, once, by comparing each with the model's own forward on random sequences, one at a time
        without padding, and switch noise off. `ValueError` for a trained model that gives NaN or reads what follows a
        token, where neither head computes the same, and for noise that does not stop.
        """
        if self.uses_own is not None:
            return
        self.uses_own = False
        rows = probe_rows(self.model)

        def answer() -> Tensor:
            return self._logps(rows)

        with in_mode(self.model, training=False):
            try:
                allowed = tolerance(self.model, answer, 1 / self._trl.temperature)
            except Exception as error:  # a model that cannot read a few tokens will say so itself
                logger.warning("It is unknown whether %s is scored correctly: %s.", self.name, error)
                return
            if self.trains:
                require_numbers(answer(), self.name)
            if not torch.isfinite(answer()).all():  # the first loss stops such a run
                return
            require_causal(self.name, self._logps_of_all, rows[0], allowed, "be trained on")
            self._choose(rows, allowed)
        if self.silent:
            silence(self.model, self.name, answer, allowed)

    @torch.no_grad()
    def settle_aux_loss(self, asked_coef: float | None = None) -> bool:
        """
        Choose the model's own head if TRL's does not give the load-balancing loss of a mixture of experts: for every
        family, TRL uses Mixtral's formula and Mixtral's names in the config. Return whether the model has that loss:
        its config may name experts that it was built without.

        Raises:
            ValueError: when the model's own forward fails at it, or has none and `asked_coef`, the run's, asks for it.
        """
        ids, mask = _padded(probe_rows(self.model))
        asked: dict[str, Any] = {"attention_mask": mask, "output_router_logits": True, "use_cache": False}
        with in_mode(self.model, training=False):
            try:
                expected = getattr(self._plain(input_ids=ids, **asked), "aux_loss", None)
            except Exception as error:  # of the family's own code: whatever it is, training would end in it
                try:
                    self._plain(input_ids=ids, attention_mask=mask, use_cache=False)
                except Exception as own:  # it fails at plain text, too
                    raise ValueError(
                        f"The forward of {self.name} fails at a few random tokens: {type(own).__name__}: {own}."
                    ) from own
                raise ValueError(
                    f"The load-balancing loss of {self.name} cannot be computed ({type(error).__name__}: {error}), "
                    "and `router_aux_loss_coef`, or where it is not set the config, asks for it. Set "
                    "`router_aux_loss_coef=0.0`."
                ) from error
            if expected is None and asked_coef:
                raise ValueError(
                    f"`router_aux_loss_coef={asked_coef}` weighs the load-balancing loss of {self.name}, whose "
                    "forward gives none. Leave it out."
                )
            if expected is None or self.uses_own:
                return expected is not None
            try:
                got = self._forward(input_ids=ids, labels=ids, fused_lm_head=True, **asked).aux_loss
                self.uses_own = not bool((got - expected).abs() <= AUX_ROUNDING * expected.abs())
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # other config names
                self.uses_own = True
        if self.uses_own:
            logger.warning(
                f"TRL's fused head computes another load-balancing loss than {self.name}: the model's own head is "
                "used, which keeps all logits, (tokens, vocabulary), in memory. `router_aux_loss_coef=0.0` leaves that"
                " loss out."
            )
        return True

    def _choose(self, rows: list[Tensor], allowed: float) -> None:
        difference = self._distance(rows)
        # Parameters that TRL's head does not read may be 0 at the start, as an adapter's are: no probe would see them.
        reads_all = {name for name, _ in self.model.get_output_embeddings().named_parameters()} <= READ
        if difference <= allowed and reads_all:
            return
        self.uses_own = True
        of_own = self._distance(rows)
        if not of_own <= allowed:
            least = min(difference, of_own)
            apart = "cannot be computed" if least == float("inf") else f"are {least:.3g} nats apart on average"
            raise ValueError(
                f"{self.name} cannot be scored: the log-probabilities of its head on the trunk's last states and "
                f"those of its own forward {apart}, and rounding explains {allowed:.2g}. What else makes its logits "
                "would be neither seen nor trained. Use a model of another family."
            )
        logger.warning(
            f"TRL's fused head does not compute all that makes the logits of {self.name} "
            f"({self._how_far(difference, allowed)}): the model's own head is used, which keeps all logits, "
            "(tokens, vocabulary), in memory."
        )

    def _how_far(self, difference: float, allowed: float) -> str:
        if difference <= allowed:
            own = (name for name, _ in self.model.get_output_embeddings().named_parameters())
            names = [name for name in own if name not in READ]
            return f"its head has {', '.join(names[:3])} beside a weight and a bias"
        if difference == float("inf"):
            return "which does not fit the states of its trunk"
        return f"{difference:.2g} nats apart, where rounding explains {allowed:.2g}"

    def _logps(self, rows: list[Tensor]) -> Tensor:
        """Return log-probabilities of rows (1, L) of ids, by the model's own forward, one row after the other."""
        return torch.cat([self._logps_of_all(row)[:-1].gather(-1, row[0, 1:, None]).squeeze(-1) for row in rows])

    def _logps_of_all(self, row: Tensor) -> Tensor:
        """Return log-probabilities (L, V) after each token of a row (1, L), by the model's own forward."""
        logits = self._plain(input_ids=row, use_cache=False).logits[0].float()
        return (logits / self._trl.temperature).log_softmax(-1)

    def _distance(self, rows: list[Tensor]) -> float:
        """Return the mean difference in nats between the scores of a padded batch and the model's own forward."""
        ids, mask = _padded(rows)
        scored = mask[:, 1:].bool()
        try:
            with score_only(self.trunk, lambda states: states[:, :-1][scored]):
                output = self._forward(
                    input_ids=ids, attention_mask=mask, shift_labels=ids[:, 1:][scored][None], fused_lm_head=True
                )
            return (output.log_probs[0] - self._logps(rows)).abs().mean().item()
        except (AttributeError, IndexError, RuntimeError, TypeError):  # states that do not fit the head
            return float("inf")

    def _score(
        self, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> FusedCausalLMOutput:
        """Return the output of TRL's fused forward, computed from the logits of the model's own."""
        output = self._plain(*args, **(kwargs | {"use_cache": False}))
        logits: Any = output.logits
        if shift_labels is None and labels is not None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        targets: Any = shift_labels
        scored = targets != -100
        statistics = _statistics(logits.float() / self._trl.temperature, targets.clamp(min=0), self._trl.outputs)
        statistics = {name: values.masked_fill(~scored, 0) for name, values in statistics.items()}
        loss = -statistics["log_probs"].sum() / scored.sum().clamp(min=1)
        return FusedCausalLMOutput(
            loss=loss, **statistics, label_mask=scored, aux_loss=getattr(output, "aux_loss", None)
        )


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows (1, L) of ids as one batch, and its mask, (rows, longest) each."""
    ids = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    return ids, nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in rows], batch_first=True)


def _statistics(logits: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the requested outputs of TRL's head, each (...), from logits (..., V)."""
    logps = logits.log_softmax(-1)
    found = {"log_probs": logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)}
    if "entropy" in outputs:
        found["entropy"] = -(logps.exp() * logps).sum(-1)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = (2 * logps.detach()).logsumexp(-1)
    if "mean_logits" in outputs:
        found["mean_logits"] = logits.detach().mean(-1)
    if "is_top1" in outputs:
        found["is_top1"] = logits.argmax(-1) == targets
    return found


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM that ends in the last hidden states."""
    if model.base_model is not model:
        return model.base_model
    # A prefix that names no attribute, such as Llama 4's, makes `base_model` the model itself.
    trunks = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return trunks[0] if len(trunks) == 1 else model


class _States(BaseModelOutputWithPastAndCrossAttentions):
    """A trunk's output with nothing but states: every other attribute is `None`."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def trunk_gives(trunk: nn.Module, states: Tensor) -> Iterator[None]:
    """Within the context, the trunk reads nothing and returns `states`."""
    kept = vars(trunk).get("forward")
    trunk.forward = lambda *args, **kwargs: _States(last_hidden_state=states)
    try:
        yield
    finally:
        del trunk.forward
        if kept is not None:
            trunk.forward = kept
