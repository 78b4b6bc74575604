"""
The forward of the actor. One call gives everything that PPO reads at the response positions: log-probabilities,
entropy, state values, the exact KL to the reference, the trunk's states.

The call goes through the wrapped model (DDP, DeepSpeed, PEFT), so gradients are synchronised and parameters gathered
as in any forward. Only positions with a label are projected to the vocabulary.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...models.lm_head import score_only
from ...models.scoring_head import ScoringHead
from ...packing.forward import PackedForward, warn_of_padding
from ...packing.probe import Pairs
from ...packing.segments import pairs_of
from ..kl import full_kl
from .critic import Critic
from .padding import LeftPadding
from .rows import reading


# Number of logits in one chunk of the exact KL: 64 MB in float32, of which a few are alive at a time.
CHUNK = 2**24

PER_TOKEN = ("log_probs", "entropy", "state_values", "ref_kl", "trunk_states")

LogitsHead = Callable[[Tensor], Tensor]


@dataclass
class ActorCriticOutput(ModelOutput):
    """
    The outputs named in `ppo_outputs`; the rest is `None`. Per-token fields have shape (B, L - 1), where position j
    belongs to the choice of token j + 1, and are 0 where token j + 1 has no label.

    Args:
        log_probs: log-probability of each label under the temperature-scaled policy, nats.
        entropy: −Σ p log p over the vocabulary, nats.
        state_values: V of the state in which token j + 1 is chosen.
        ref_kl: KL(π_θ ‖ π_ref) over the vocabulary, nats.
        trunk_states: (B, L - 1, H) last hidden states.
        scored_states: (N, H) last hidden states at the N positions with a label alone.
        scores: (B,) of the reward adapter, requested alone.
        aux_loss: load-balancing loss of a mixture of experts, a scalar.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None
    ref_kl: Tensor | None = None
    trunk_states: Tensor | None = None
    scored_states: Tensor | None = None
    scores: Tensor | None = None
    aux_loss: Tensor | None = None

    def at_last(self, length: int) -> "ActorCriticOutput":
        """Cut the per-token fields to their last `length` positions, and return this output."""
        for name in PER_TOKEN:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:, -length:])
        return self


class ActorCriticForward:
    """
    Extend `model.forward` with `ppo_outputs`, a tuple of names of the requested fields of [`ActorCriticOutput`].
    Without it the forward is the original one, so generation does not change. With it the forward also takes `labels`
    (−100 where nothing is read), `groups` (the sequences by their prompts), `train_actor` (off: no gradient reaches
    the actor), `scored_states` (read before, so that a head needs no trunk) and, for `ref_kl`, `ref_states` (B, T, H)
    of the last T positions with the `ref_head` that maps them to logits.

    Args:
        model: causal language model that TRL's `add_fused_lm_head` has patched, with entropy among its outputs if
            that will be requested.
        critic: gives the state values.
        reward_model: an adapter with a score head on the model's base, which gives the scores.
        role: "model" for the actor, which has to be without noise, or "ref_model".
        packs: whether sequences are to stand side by side in rows without padding, where that is exact.
        shares: whether the responses to a prompt are to stand behind it in one row.

    Attributes:
        head: makes log-probabilities; its `logits` is the map from trunk states to temperature-scaled logits.
        packing: whether rows are packed, and how the model reads them.
        asked: what else the model is called with in the trial of packed rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        critic: Critic | None = None,
        reward_model: nn.Module | None = None,
        role: str = "ref_model",
        packs: bool = False,
        shares: bool = False,
    ):
        self.critic, self.reward_model, self._packs = critic, reward_model, packs
        self.head = ScoringHead(model, role, silent=role == "model")
        self.packing = PackedForward(model, self._plain, self._packed, shares)
        self.asked: dict[str, Any] = {}
        self._is_settled = False
        self._padding = LeftPadding(self.head.trunk, self.head.name)
        self._fused_forward = fused_forward = model.forward

        @functools.wraps(type(model).forward)
        def forward(_: Any, *args: Any, ppo_outputs: tuple[str, ...] | None = None, **kwargs: Any) -> Any:
            if ppo_outputs is None:
                return fused_forward(*args, **kwargs)
            return self._answer(set(ppo_outputs), **kwargs)

        model.forward = types.MethodType(forward, model)

    def settle(self, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """
        Try out, once, how the model makes log-probabilities, how the critic is read, and whether their rows can be
        packed; it happens at the first call at the latest.

        Args:
            autocast: the context in which the run computes.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self.head.settle()
        if self._packs:
            with autocast():
                warn_of_padding(self.packing.switch_on(by_mask=False), self.head.name, self.packing)
        if self.critic is not None:
            self.critic.settle(self._packs, self.packing.shares, autocast)

    def _answer(
        self,
        wanted: set[str],
        labels: Tensor | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        ref_states: Tensor | None = None,
        ref_head: LogitsHead | None = None,
        train_actor: bool = True,
        scored_states: Tensor | None = None,
        **inputs: Any,
    ) -> ActorCriticOutput:
        if wanted == {"scores"}:
            read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return ActorCriticOutput(scores=self.reward_model(**read).logits[:, 0].float())
        self.settle()
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        reads_states = "state_values" in wanted and self.critic is not None and self.critic.needs_states
        positions = labels[:, 1:] != -100  # (B, L - 1), True where the next token has a label
        if not positions.any():
            positions[0, -1] = True  # keeps the graph
        output = ActorCriticOutput()
        states = None
        if scored_states is not None:
            values = self.critic.values_at(positions, scored_states, groups)
            return ActorCriticOutput(state_values=_scatter(values, positions))
        groups = [[row] for row in range(len(positions))] if groups is None else groups
        with (
            torch.set_grad_enabled(train_actor and torch.is_grad_enabled()),
            reading(self.head.trunk, self.packing, self._padding, groups, positions, inputs) as (of_model, select),
        ):
            if wanted & {"log_probs", "entropy"}:
                targets = labels[:, 1:][positions][None]
                with score_only(self.head.trunk, select) as compact:
                    scored = self._fused_forward(shift_labels=targets, fused_lm_head=True, **of_model)
                (states,) = compact
                output.log_probs = _scatter(scored.log_probs[0], positions)
                output.entropy = None if scored.entropy is None else _scatter(scored.entropy[0], positions)
                output.aux_loss = scored.aux_loss
            elif wanted & {"trunk_states", "scored_states", "ref_kl"} or reads_states:
                states = select(self.head.trunk(use_cache=False, **of_model).last_hidden_state)
            if "ref_kl" in wanted:
                chunk_size = max(1, CHUNK // self.head.model.config.get_text_config().vocab_size)
                of_reference = ref_states[positions[:, -ref_states.size(1) :]]
                exact = full_kl(states, self.head.logits, of_reference, ref_head, chunk_size)
                output.ref_kl = _scatter(exact, positions)
        if "scored_states" in wanted:
            output.scored_states = states
        if "trunk_states" in wanted:
            output.trunk_states = states.new_zeros(*positions.shape, states.size(-1))
            output.trunk_states[positions] = states
        if "state_values" in wanted:
            inputs.pop("output_router_logits", None)
            output.state_values = _scatter(self.critic.values_at(positions, states, groups, **inputs), positions)
        return output

    # ---- Both ways, to be compared ----

    @torch.no_grad()
    def _plain(self, batch: Pairs) -> ModelOutput:
        return self._fused_forward(**vars(batch), **self.asked, use_cache=False, fused_lm_head=True)

    @torch.no_grad()
    def _packed(self, batch: Pairs) -> ModelOutput:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        positions = batch.labels[:, 1:] != -100
        targets = batch.labels[:, 1:][positions][None]
        groups = pairs_of(len(positions))
        with (
            reading(self.head.trunk, self.packing, self._padding, groups, positions, inputs, trial=True) as (
                of_model,
                select,
            ),
            score_only(self.head.trunk, select),
        ):
            of_model |= self.asked
            scored = self._fused_forward(shift_labels=targets, fused_lm_head=True, use_cache=False, **of_model)
        return ActorCriticOutput(log_probs=_scatter(scored.log_probs[0], positions), aux_loss=scored.aux_loss)


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the context, a mixture of experts returns no router logits: transformers 5 would compute their auxiliary
    loss for each generated token with the attention mask of the whole sequence, and fail.
    """
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def _scatter(compact: Tensor, positions: Tensor) -> Tensor:
    """Return (B, L - 1) with the values (N,) at the True positions, 0 elsewhere."""
    return compact.new_zeros(positions.shape).masked_scatter(positions, compact)
