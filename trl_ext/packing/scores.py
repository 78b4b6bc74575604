"""
The scores of sequences: those of the model's own forward, computed over packed rows where that is exact.

A classifier reads the score of a sequence at the last token that is not its pad token. Here it is called with these
tokens alone, (N, 1), while its trunk reads the packed rows and returns the states at these tokens. So wrappers,
autocast, adapters and the head are the model's own, and between calls nothing of it is changed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.scoring_head import trunk_of
from . import probe
from .forward import PackedForward
from .segments import PackedRows, pairs_of


class PackedScores:
    """
    Asks a classifier for the scores of sequences.

    Args:
        classifier: the model without adapters and wrappers; its head has one output, its config a pad token.
        shares: whether the common beginning of a group stands once in its row.

    Attributes:
        packing: whether rows are packed, and how the trunk reads them.
    """

    def __init__(self, classifier: PreTrainedModel, shares: bool = True):
        self.classifier: Any = classifier
        self.trunk = trunk_of(classifier)
        self.packing = PackedForward(self.trunk, self._plain, self._packed, shares, gives="scores")

    def __call__(
        self, ask: Callable[..., Any], ids: Tensor, mask: Tensor, groups: Sequence[Sequence[int]]
    ) -> Any | None:
        """
        Return what `ask` answers for sequences in packed rows; `None` where they are to be padded.

        Args:
            ask: the classifier, with adapters and wrappers, or what calls it with `input_ids` and `attention_mask`.
            ids, mask (N, L): sequences and 1 for their tokens. With padding on the left they are not packed.
            groups: the sequences by what they begin with.
        """
        if not self.packing.on:
            return None
        last = self._last_token(ids)
        if not (mask.gather(1, last).all() and (mask[:, :-1] >= mask[:, 1:]).all()):
            return None
        rows = self.packing.lay_out(ids, mask, groups)
        return None if rows is None else self._ask(ask, rows, ids, last)

    def _last_token(self, ids: Tensor) -> Tensor:
        """Return where transformers' classifiers read the score of each sequence, (N, 1)."""
        places = torch.arange(ids.size(1), device=ids.device)
        return (places * (ids != self._pad_token)).argmax(1, keepdim=True)

    @property
    def _pad_token(self) -> int:
        return self.classifier.config.get_text_config().pad_token_id

    def _ask(self, ask: Callable[..., Any], rows: PackedRows, ids: Tensor, last: Tensor) -> Any:
        places = rows.packed_index.gather(1, last)

        def select(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[places]
            return output

        with self.packing.reading(self.trunk, rows) as of_rows:
            of_rows["use_cache"] = False
            handles = [
                self.trunk.register_forward_pre_hook(lambda _, args, own: ((), own | of_rows), with_kwargs=True),
                self.trunk.register_forward_hook(select),
            ]
            try:
                return ask(input_ids=ids.gather(1, last), attention_mask=torch.ones_like(last))
            finally:
                for handle in handles:
                    handle.remove()

    # ---- Both ways, to be compared: what a random direction sees of the states, and the score ----

    @torch.no_grad()
    def _plain(self, batch: probe.Pairs) -> ModelOutput:
        mask = batch.attention_mask
        inputs = {"input_ids": self._padded(batch), "attention_mask": mask, "use_cache": False}
        return probe.seen(self.trunk(**inputs).last_hidden_state[:, :-1], self.classifier(**inputs).logits)

    @torch.no_grad()
    def _packed(self, batch: probe.Pairs) -> ModelOutput:
        ids = self._padded(batch)
        rows = self.packing.lay_out(ids, batch.attention_mask, pairs_of(len(ids)))
        if rows is None:
            raise ValueError("the pairs that are tried out are longer than the limits found so far")
        with self.packing.reading(self.trunk, rows) as of_rows:
            states = self.trunk(**of_rows, use_cache=False).last_hidden_state
        scores = self._ask(self.classifier, rows, ids, self._last_token(ids)).logits
        return probe.seen(states.flatten(0, 1)[rows.packed_index[:, :-1]], scores)

    def _padded(self, batch: probe.Pairs) -> Tensor:
        return batch.input_ids.masked_fill(batch.attention_mask == 0, self._pad_token)
