"""
The forward of the actor. One call gives everything that PPO reads at the response positions: log-probabilities,
entropy, state values, the exact KL to the reference, the trunk's states.

The call goes through the wrapped model (DDP, DeepSpeed, PEFT), so gradients are synchronised and parameters gathered
as in any forward. Only positions with a label are projected to the vocabulary.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...models.lm_head import score_only
from ...models.scoring_head import ScoringHead
from ..kl import full_kl
from .critic import Critic
from .padding import LeftPadding


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
        scores: (B,) of the reward adapter, requested alone.
        aux_loss: load-balancing loss of a mixture of experts, a scalar.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None
    ref_kl: Tensor | None = None
    trunk_states: Tensor | None = None
    scores: Tensor | None = None
    aux_loss: Tensor | None = None

    def at_last(self, length: int) -> "ActorCriticOutput":
        """Cut the per-token fields to their last `length` positions, and return this output."""
        for name in PER_TOKEN:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:, -length:])
        return self


def add_actor_critic_forward(
    model: PreTrainedModel,
    critic: Critic | None = None,
    reward_model: nn.Module | None = None,
    role: str = "ref_model",
) -> ScoringHead:
    """
    Extend `model.forward` with `ppo_outputs`, a tuple of names of the requested fields of [`ActorCriticOutput`].
    Without it the forward is the original one, so generation does not change. With it the forward also takes `labels`
    (−100 where nothing is read), `train_actor` (off: no gradient reaches the actor) and, for `ref_kl`, `ref_states`
    (B, T, H) of the last T positions with the `ref_head` that maps them to logits.

    Args:
        model: causal language model that TRL's `add_fused_lm_head` has patched, with entropy among its outputs if
            that will be requested.
        critic: gives the state values.
        reward_model: an adapter with a score head on the model's base, which gives the scores.
        role: "model" for the actor, which must have no noise, or "ref_model".

    Returns:
        The head that scores. Its `logits` maps trunk states to temperature-scaled logits; its `settle` is called by
        the first forward at the latest.
    """
    head = ScoringHead(model, role, silent=role == "model")
    padding = LeftPadding(head.trunk, head.name)
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, ppo_outputs=None, labels=None, ref_states=None, ref_head=None, train_actor=True, **kwargs
    ):
        if ppo_outputs is None:
            if labels is not None:
                kwargs["labels"] = labels
            return fused_forward(*args, **kwargs)

        wanted = set(ppo_outputs)
        if wanted == {"scores"}:
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
            return ActorCriticOutput(scores=reward_model(**inputs).logits[:, 0].float())
        head.settle()
        of_critic = dict(kwargs)
        kwargs = padding.inputs(kwargs)
        reads_states = "state_values" in wanted and critic is not None and critic.needs_states
        positions = labels[:, 1:] != -100  # (B, L - 1), True where the next token has a label
        if not positions.any():
            positions[0, -1] = True  # keeps the graph
        output = ActorCriticOutput()
        states = None
        with torch.set_grad_enabled(train_actor and torch.is_grad_enabled()):
            if wanted & {"log_probs", "entropy"}:
                with score_only(head.trunk, lambda states: states[:, :-1][positions]) as compact:
                    scored = fused_forward(
                        *args, shift_labels=labels[:, 1:][positions][None], fused_lm_head=True, **kwargs
                    )
                (states,) = compact
                output.log_probs = _scatter(scored.log_probs[0], positions)
                output.entropy = None if scored.entropy is None else _scatter(scored.entropy[0], positions)
                output.aux_loss = scored.aux_loss
            elif wanted & {"trunk_states", "ref_kl"} or reads_states:
                trunk = head.trunk(*args, use_cache=False, **kwargs)
                states = trunk.last_hidden_state[:, :-1][positions]
            if "ref_kl" in wanted:
                chunk_size = max(1, CHUNK // self.config.get_text_config().vocab_size)
                of_reference = ref_states[positions[:, -ref_states.size(1) :]]
                exact = full_kl(states, head.logits, of_reference, ref_head, chunk_size)
                output.ref_kl = _scatter(exact, positions)
        if "trunk_states" in wanted:
            output.trunk_states = states.new_zeros(*positions.shape, states.size(-1))
            output.trunk_states[positions] = states
        if "state_values" in wanted:
            of_critic.pop("output_router_logits", None)
            output.state_values = critic.values_at(positions, states, *args, **of_critic)
        return output

    model.forward = types.MethodType(forward, model)
    return head


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
