"""
The scores of a batch of pairs: those of the model's own forward, computed over packed rows where that is exact.

TRL calls `model(input_ids, attention_mask)` with B chosen and B rejected sequences, and the model reads each score at
the last token that is not its pad token. Here the model is called with these tokens alone, (2B, 1), while its trunk
reads the packed rows and returns the states at these tokens. So wrappers, autocast, adapters and the head are the
model's own, and between calls nothing of it is changed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.scoring_head import trunk_of
from ..packing import probe
from ..packing.forward import PackedForward
from ..packing.segments import PackedRows, pairs_of


INPUTS = {"input_ids", "attention_mask", "use_cache", "margin"}


class PairScores:
    """
    Calls a model with TRL's batch of pairs.

    Args:
        classifier: the model without adapters and wrappers, whose head has one output.

    Attributes:
        packing: whether rows are packed, and how the trunk reads them.
    """

    def __init__(self, classifier: PreTrainedModel):
        self.classifier: Any = classifier
        self.trunk = trunk_of(classifier)
        self.packing = PackedForward(self.trunk, self._plain, self._packed)

    def __call__(self, model: nn.Module, **inputs: Any) -> ModelOutput:
        """
        Return the model's output for TRL's batch, with `logits` (2B, 1).

        Args:
            model: the classifier, with adapters and wrappers.
            inputs: `input_ids` and `attention_mask` (2B, L), B chosen sequences before B rejected ones; other inputs
                than TRL's own, and padding on the left, go TRL's way.
        """
        if self.packing.on and inputs.keys() <= INPUTS:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            last = self._last_token(ids)
            if mask.gather(1, last).all() and (mask[:, :-1] >= mask[:, 1:]).all():
                rows = self._lay_out(ids, mask)
                if rows is not None:
                    return self._score(model, rows, ids, last)
        return model(**inputs)

    def _last_token(self, ids: Tensor) -> Tensor:
        """Return where transformers' classifiers read the score of each sequence, (2B, 1)."""
        places = torch.arange(ids.size(1), device=ids.device)
        return (places * (ids != self._pad_token)).argmax(1, keepdim=True)

    @property
    def _pad_token(self) -> int:
        return self.classifier.config.get_text_config().pad_token_id  # the tokenizer's: TRL has set it

    def _lay_out(self, ids: Tensor, mask: Tensor) -> PackedRows | None:
        return self.packing.lay_out(ids, mask, pairs_of(len(ids)))

    def _score(self, model: nn.Module, rows: PackedRows, ids: Tensor, last: Tensor) -> ModelOutput:
        places = rows.packed_index.gather(1, last)

        def select(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[places]
            return output

        with self.packing.reading(self.trunk, rows) as of_rows:
            handles = [
                self.trunk.register_forward_pre_hook(lambda _, args, own: ((), own | of_rows), with_kwargs=True),
                self.trunk.register_forward_hook(select),
            ]
            try:
                return model(input_ids=ids.gather(1, last), attention_mask=torch.ones_like(last), use_cache=False)
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
        rows = self._lay_out(ids, batch.attention_mask)
        if rows is None:
            raise ValueError("the pairs that are tried out are longer than the limits found so far")
        with self.packing.reading(self.trunk, rows) as of_rows:
            states = self.trunk(**of_rows, use_cache=False).last_hidden_state
        scores = self._score(self.classifier, rows, ids, self._last_token(ids)).logits
        return probe.seen(states.flatten(0, 1)[rows.packed_index[:, :-1]], scores)

    def _padded(self, batch: probe.Pairs) -> Tensor:
        return batch.input_ids.masked_fill(batch.attention_mask == 0, self._pad_token)
