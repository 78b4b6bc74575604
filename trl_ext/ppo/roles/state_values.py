"""State values from a classifier: its score of a sequence up to each position."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...models.noise import require_numbers, silence
from ...models.probe import in_mode, probe_rows, tolerance
from ...models.scoring_head import trunk_gives
from ...packing.forward import PackedForward, warn_of_padding
from ...packing.probe import Pairs, seen
from ...packing.segments import pairs_of
from .padding import LeftPadding
from .rows import reading


class StateValues:
    """
    V at every position: the classifier's head on the trunk's state there. A head called `score` is applied to all
    states; any other is called through the classifier's own forward, with a sequence of one token for each state.

    Args:
        classifier: a model with one label whose forward takes `input_ids` and `attention_mask` and returns `logits`
            (b, 1), read at the last token.
        name: the classifier's in messages.

    Raises:
        ValueError: when its trunk cannot be found.
    """

    def __init__(self, classifier: nn.Module, name: str):
        self.classifier: Any = classifier
        self.name = f"{type(classifier).__name__} ({name})"
        self.trunk = _trunk_of(classifier, self.name)
        self.packing = PackedForward(self.trunk, self._plain, self._packed, gives="values")
        self._padding = LeftPadding(self.trunk, self.name)
        self._is_settled = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return state values (B, L), float32, from the inputs of the trunk."""
        if not self._is_settled:
            self.settle()
        states = self.trunk(*args, use_cache=False, **self._padding.inputs(kwargs)).last_hidden_state
        return self.of_states(states)

    def at(self, positions: Tensor, groups: Sequence[Sequence[int]], **inputs: Tensor) -> Tensor:
        """
        Return the values (N,) at the N `positions` of (B, L - 1), float32.

        Args:
            groups: the sequences by their prompts; those of a group stand in one row.
            inputs: what the trunk takes, `input_ids` and `attention_mask` (B, L) among it.
        """
        if not self._is_settled:
            self.settle()
        with reading(self.trunk, self.packing, self._padding, groups, positions, inputs) as (of_trunk, select):
            states = select(self.trunk(use_cache=False, **of_trunk).last_hidden_state)
        return self.of_states(states[None])[0]

    # ---- Both ways of reading rows, to be compared: by what a random direction sees of the states ----

    @torch.no_grad()
    def _plain(self, batch: Pairs) -> ModelOutput:
        states = self.trunk(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return seen(states.last_hidden_state[:, :-1])

    @torch.no_grad()
    def _packed(self, batch: Pairs) -> ModelOutput:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        positions = batch.attention_mask[:, :-1].bool()
        groups = pairs_of(len(positions))
        with reading(self.trunk, self.packing, self._padding, groups, positions, inputs, trial=True) as (
            of_trunk,
            select,
        ):
            found = select(self.trunk(use_cache=False, **of_trunk).last_hidden_state)
        states = found.new_zeros(*positions.shape, found.size(-1))
        states[positions] = found
        return seen(states)

    @torch.no_grad()
    def settle(
        self,
        packs: bool = False,
        shares: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """
        Switch the trunk's noise off, try the head, and whether rows can be packed.

        Args:
            packs, shares: as in `ActorCriticForward`.
            autocast: the context in which the run computes.

        Raises:
            ValueError: for NaN, for noise that does not stop, and for a head that gives no value for a state.
        """
        self._is_settled = True
        rows = probe_rows(self.trunk)

        def states() -> Tensor:
            return torch.cat([self.trunk(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]).float()

        with in_mode(self.trunk, training=False):
            first = states()
            require_numbers(first, self.name)
            allowed = tolerance(self.trunk, states, first.abs().mean().item())
            self._require_causal(rows[0], allowed)
            self._try_head(first)
            self._require_last_token(rows[0], allowed)
        silence(self.trunk, self.name, states, allowed)
        self.packing.shares = shares
        if packs:
            with autocast():
                warn_of_padding(self.packing.switch_on(by_mask=False), self.name, self.packing)

    def _require_causal(self, row: Tensor, allowed: float) -> None:
        half = (row.size(1) + 1) // 2
        whole, alone = (self.trunk(input_ids=ids, use_cache=False).last_hidden_state for ids in (row, row[:, :half]))
        if not (whole[:, :half] - alone).float().abs().mean().item() <= allowed:
            raise ValueError(
                f"{self.name} reads the tokens that follow: its value of a state would know the rest of the answer. "
                "Pass a causal `value_model`, or choose `critic='head'` for a value head on the actor's trunk."
            )

    def _try_head(self, states: Tensor) -> None:
        dtype = next(parameter.dtype for parameter in self.classifier.parameters() if parameter.is_floating_point())
        try:
            shape = self.of_states(states[None].to(dtype)).shape
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(self._no_value(f"{type(error).__name__}: {error}")) from error
        if shape != states[None].shape[:2]:
            raise ValueError(self._no_value(f"values of shape {tuple(shape)} for {len(states)} states"))

    def _require_last_token(self, row: Tensor, allowed: float) -> None:
        """Require that the head scores the last state as it scores the sequence; RoBERTa's reads the first token."""
        if isinstance(getattr(self.classifier, "score", None), nn.Module):
            return
        last = self.of_states(self.trunk(input_ids=row, use_cache=False).last_hidden_state)[0, -1]
        output = self.classifier.forward(input_ids=row, attention_mask=torch.ones_like(row))
        score = getattr(output, "logits", output).float()
        if score.numel() != 1:  # of every token
            return
        off = (score.flatten()[0] - last).abs().item()
        if not off <= max(allowed, 1e-3 * last.abs().item()):
            raise ValueError(self._no_value(f"it reads other tokens than the last: its score is {off:.2g} from that"))

    def _no_value(self, why: str) -> str:
        return (
            f"{self.name} cannot be the critic: its head gives no value for the trunk's state at a token ({why}). "
            "Pass a `value_model` with a `score` layer or a head that reads the last token, or choose `critic='head'` "
            "for a value head on the actor's trunk."
        )

    def of_states(self, states: Tensor) -> Tensor:
        """Return state values (B, L), float32, from trunk states (B, L, H)."""
        score = getattr(self.classifier, "score", None)
        if isinstance(score, nn.Module):
            return score(states).float().squeeze(-1)
        alone = states.flatten(0, 1).unsqueeze(1)
        # Any id but the pad token, at which a classifier would not look
        pads = {getattr(config, "pad_token_id", None) for config in (self.classifier.config, self.trunk.config)}
        token = next(token for token in range(3) if token not in pads)
        ids = torch.full(alone.shape[:2], token, device=states.device)
        with trunk_gives(self.trunk, alone):
            output = self.classifier.forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        return getattr(output, "logits", output).float().view(states.shape[:2])


def _trunk_of(classifier: nn.Module, name: str) -> Any:
    """Return the part of a classifier that ends in the last hidden states, by `base_model_prefix` or by its kind."""
    if getattr(getattr(classifier, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, whose encoder reads the whole answer: it has no value of a state within "
            "it. Pass a causal `value_model`, or choose `critic='head'` for a value head on the actor's trunk."
        )
    named = getattr(classifier, getattr(classifier, "base_model_prefix", None) or "base_model", None)
    if isinstance(named, PreTrainedModel) and named is not classifier:
        return named
    trunks = [child for child in classifier.children() if isinstance(child, PreTrainedModel)]
    if len(trunks) == 1:
        return trunks[0].base_model  # a user's own class may hold a whole classifier
    raise ValueError(
        f"The trunk of {name} cannot be found, so it cannot be the critic: name the attribute that holds it in "
        "`base_model_prefix`, pass another `value_model`, or choose `critic='head'` for a value head on the actor's "
        "trunk."
    )


def last_linear(classifier: nn.Module, trunk: nn.Module) -> nn.Linear:
    """Return the layer that makes the score of one label; raise `ValueError` if there is none."""
    of_trunk = set(trunk.modules())
    found = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.out_features == 1 and m not in of_trunk]
    if not found:
        raise ValueError(f"{type(classifier).__name__} has no layer with one output, which would be the score.")
    return found[-1]
