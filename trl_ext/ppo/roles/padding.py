"""
Left-padded rows, read as the same rows without padding: a trial finds the inputs that each model needs for that.

Families with absolute positions take `position_ids`; others count real tokens themselves, have no positions or, like
RoBERTa, count from another number. Some read the padding in any case.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...models.probe import in_mode, probe_rows, tolerance


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
        self._takes_positions: bool | None = None  # before `settle`
        self._difference = 0.0

    def inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Return the arguments of the trunk: `position_ids` only if it reads them, and its own pad token at masked
        positions, since some families count real tokens by that instead of by the mask.

        Raises:
            ValueError: for a padded batch, when the model cannot read one.
        """
        self.settle()
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
    def settle(self) -> None:
        """Try, once, random rows, padded and alone, with positions as the signature has them, else the other way."""
        if self._takes_positions is not None:
            return
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
