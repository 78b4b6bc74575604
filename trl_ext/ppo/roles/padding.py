"""
Left-padded rows, read as the same rows without padding: a trial finds the inputs that each model needs for that.

Families with absolute positions take `position_ids`; others count real tokens themselves, have no positions or, like
RoBERTa, count from another number. Some read the padding in any case.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...models.probe import in_mode, probe_rows, tolerance
from ...packing.forward import PackedForward
from ...packing.segments import PackedRows


logger = logging.get_logger(__name__)


class LeftPadding:
    """
    The inputs of a model for left-padded batches.

    Args:
        trunk: gives `last_hidden_state` for `input_ids`, `attention_mask` and, perhaps, `position_ids`.
        name: of the model, for errors.
    """

    def __init__(self, trunk: nn.Module, name: str):
        self.trunk = trunk
        self.name = name
        self._takes_positions: bool | None = None  # until the first batch
        self._difference = 0.0

    def inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Return the arguments of the trunk: `position_ids` only if it reads them, and its own pad token at masked
        positions, since some families count real tokens by that instead of by the mask.

        Raises:
            ValueError: for a padded batch, when the model cannot read one.
        """
        if self._takes_positions is None:
            self._find_out()
        mask = kwargs.get("attention_mask")
        if mask is not None:
            self._check_selection(mask)
        if mask is not None and self._difference and not bool(mask[:, 0].all()):
            raise ValueError(
                f"{self.name} reads the padding of shorter prompts: its states differ by {self._difference:.1%} from "
                "those of the same tokens without padding. Give it prompts of one length in tokens, or use a model of "
                "another family."
            )
        if mask is not None and "input_ids" in kwargs:
            kwargs = kwargs | {"input_ids": self._with_own_pads(kwargs["input_ids"], mask)}
        return kwargs if self._takes_positions else {k: v for k, v in kwargs.items() if k != "position_ids"}

    def _with_own_pads(self, ids: Tensor, mask: Tensor) -> Tensor:
        trunk: Any = self.trunk
        config = trunk.config.get_text_config()
        pad: Any = getattr(config, "pad_token_id", None)
        known = pad is not None and 0 <= pad < config.vocab_size
        return ids.masked_fill(~mask.bool(), pad) if known else ids

    def _check_selection(self, mask: Tensor) -> None:
        """Raise `ValueError` for padded rows of a model that selects keys: the row's length breaks ties in Doge."""
        config: Any = self.trunk.config
        selected = getattr(config.get_text_config(), "keep_window_size", None)
        if selected is not None and mask.size(1) > selected and not bool(mask.all()):
            raise ValueError(
                f"{self.name} selects {selected} tokens to attend to (`keep_window_size`), and which ones depends on "
                f"the padding of its rows, here {mask.size(1)} tokens long. Keep prompts and `response_length` "
                f"together within {selected} tokens, or use a model of another family."
            )

    @torch.no_grad()
    def _find_out(self) -> None:
        """Try random rows, padded and alone, with positions as the signature has them, else the other way."""
        takes = "position_ids" in inspect.signature(type(self.trunk).forward).parameters
        self._takes_positions = takes
        rows = probe_rows(self.trunk)
        with in_mode(self.trunk, training=False):
            alone = torch.cat([self._states(row, torch.ones_like(row)) for row in rows])
            allowed = tolerance(self.trunk, lambda: self._states(rows[0], torch.ones_like(rows[0])))
            differences = {way: self._distance(rows, alone, way) for way in (takes, not takes)}
        if alone.isnan().any():  # the padding is not its problem
            return
        fits = [way for way, difference in differences.items() if difference <= allowed]
        if fits:
            self._takes_positions = fits[0]
        else:
            self._difference = min(differences.values()) / alone.abs().mean().item()

    def _distance(self, rows: list[Tensor], alone: Tensor, with_positions: bool) -> float:
        """Return the mean difference between the states of real tokens in a padded batch and in each row alone."""
        ids, mask = (
            nn.utils.rnn.pad_sequence([row[0].flip(0) for row in each], batch_first=True).flip(1)
            for each in (rows, [torch.ones_like(row) for row in rows])
        )
        ids = self._with_own_pads(ids, mask)
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if with_positions else {}
        try:
            return (self._states(ids, mask, **positions) - alone).abs().mean().item()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it does not take these inputs
            return float("inf")

    def _states(self, ids: Tensor, mask: Tensor, **positions: Tensor) -> Tensor:
        """Return the states (N, H) of the tokens that the mask (B, L) marks, float32."""
        states = self.trunk(input_ids=ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
        return states[mask.bool()].float()


def side_by_side(packing: PackedForward, inputs: dict[str, Any]) -> PackedRows | None:
    """Return the sequences in rows, each on its own; `None` if one is too long for the model to be packed."""
    ids = inputs["input_ids"]
    return packing.lay_out(ids, inputs["attention_mask"], torch.arange(len(ids), device=ids.device).unsqueeze(1))


def tried(packing: PackedForward, inputs: dict[str, Any]) -> PackedRows:
    """Return the rows of a trial, which has no padded way to fall back to."""
    rows = side_by_side(packing, inputs)
    if rows is None:
        raise ValueError("the sequences that are tried out are longer than the limits found so far")
    return rows


def warn_of_padding(reason: str | None, name: str, packing: PackedForward) -> None:
    """Say, once, where a model's rows stay padded, and why."""
    names = ", ".join(packing.limited_by)
    if reason is not None:
        logger.warning("Rows are padded for %s, not packed: %s.", name, reason)
    elif packing.limit is not None:
        logger.warning("Rows of %s are packed up to sequences of %d tokens (%s).", name, packing.limit, names)
    elif packing.row_limit is not None:
        logger.warning("Rows of %s are packed up to %d tokens (%s).", name, packing.row_limit, names)


@contextmanager
def reading(
    trunk: nn.Module,
    packing: PackedForward,
    rows: PackedRows | None,
    padding: LeftPadding,
    positions: Tensor,
    inputs: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], Callable[[Tensor], Tensor]]]:
    """
    Within the context `trunk` reads packed `rows`; without any, each sequence in a row of its own, with no more
    padding than the longest needs.

    Args:
        positions (B, L - 1): which states are read.
        inputs: `input_ids` and `attention_mask` (B, L), and what else the model takes.

    Yields:
        What to call the model with, and the function from the trunk's last states to those N that are read, (N, H).
    """
    if rows is not None:
        places = rows.packed_index[:, :-1][positions]
        with packing.reading(trunk, rows) as of_rows:
            yield inputs | of_rows, lambda states: states.flatten(0, 1)[places]
        return
    ids, needed = inputs["input_ids"], inputs["attention_mask"].any(0)
    needed[:-1] |= positions.any(0)
    needed[1:] |= positions.any(0)  # the token that a state predicts
    first, last = int(needed.int().argmax()), len(needed) - int(needed.flip(0).int().argmax())
    trimmed = {
        name: x[:, first:last] if isinstance(x, Tensor) and x.shape[:2] == ids.shape else x
        for name, x in inputs.items()
    }
    read = positions[:, first : last - 1]
    yield padding.inputs(trimmed), lambda states: states[:, :-1][read]
