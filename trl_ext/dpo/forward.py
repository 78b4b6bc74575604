"""
The forward of a model that scores pairs: TRL's call with TRL's result, computed over packed rows where that is exact.

TRL asks `model(input_ids, attention_mask, labels, fused_lm_head=True)` for a batch of B chosen and B rejected
sequences. The answer keeps TRL's (2B, L - 1) layout, so that every loss and metric downstream is TRL's own. The change
sits inside the base model's forward: DDP, DeepSpeed, PEFT, the adapter-off reference, precomputing and evaluation all
go through it.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.lm_head import score_only
from ..models.scoring_head import ScoringHead
from ..models.sharding import is_partitioned
from ..packing.forward import PackedForward
from ..packing.probe import Pairs
from ..packing.segments import PackedRows, pairs_of


INPUTS = {"input_ids", "attention_mask", "use_cache"}


class PairForward:
    """
    Scores pairs with `model`, whose forward TRL's `add_fused_lm_head` has patched; replaces that forward.

    Attributes:
        head: what makes log-probabilities; it settles when packing is asked for, or at the first batch.
        packing: whether rows are packed, and how the model reads them.
        outputs: while a list, every scored batch's output is added to it.
    """

    def __init__(self, model: PreTrainedModel, role: str = "model", silent: bool = False):
        self.model = model
        self.head = ScoringHead(model, role, silent)
        self.packing = PackedForward(model, self._plain, self._packed)
        self.outputs: list[ModelOutput] | None = None
        self._asked: dict[str, Any] = {}
        self._fused_forward = fused_forward = model.forward

        # Rows have another length and other pairs in every batch: torch.compile would compile anew for each, and does
        # not see that the hooks of `score_only` are others in every call.
        @torch.compiler.disable
        @functools.wraps(type(model).forward)
        def forward(_: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return fused_forward(*args, **kwargs, **({} if labels is None else {"labels": labels}))
            output = self._score(*args, labels=labels, **kwargs)
            if self.outputs is not None:
                self.outputs.append(output)
            return output

        model.forward = types.MethodType(forward, model)

    def pack(self, aux_loss: bool = False) -> str | None:
        """
        Pack rows from here on where random pairs have the same log-probabilities both ways, with `aux_loss` the same
        load-balancing loss of a mixture of experts too. Return why rows are not packed; `None` where they are.
        """
        if not is_partitioned(self.model):
            self.head.settle()
        self._asked = {"output_router_logits": True} if aux_loss else {}
        return self.packing.switch_on()

    def _score(self, *args: Any, labels: Tensor, **kwargs: Any) -> ModelOutput:
        # What PEFT names without passing it is not there; anything else, such as images or embeddings, goes TRL's way.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if not args and kwargs.keys() - {"output_router_logits"} <= INPUTS:
            self.head.settle()
        if args or kwargs.keys() - {"output_router_logits"} != INPUTS:
            return self._fused_forward(*args, labels=labels, fused_lm_head=True, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        is_padded_right = bool((mask[:, :-1] >= mask[:, 1:]).all())
        if self.packing.on and len(ids) % 2 == 0 and is_padded_right:
            rows = self._lay_out(ids, mask)
            if rows is not None:
                return self._score_packed(rows, labels, **kwargs)
        scored = labels[:, 1:] != -100
        with score_only(self.head.trunk, lambda states: states[:, :-1][scored]):
            output = self._fused_forward(shift_labels=labels[:, 1:][scored][None], fused_lm_head=True, **kwargs)
        return _scatter(output, scored)

    def _lay_out(self, ids: Tensor, mask: Tensor) -> PackedRows | None:
        return self.packing.lay_out(ids, mask, pairs_of(len(ids)))

    def _score_packed(self, rows: PackedRows, labels: Tensor, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        scored = labels[:, 1:] != -100
        predicts = rows.packed_index[:, :-1][scored]
        with (
            self.packing.reading(self.head.trunk, rows) as of_rows,
            score_only(self.head.trunk, lambda states: states.flatten(0, 1)[predicts]),
        ):
            output = self._fused_forward(
                # TRL's mask, which its load-balancing loss reads; the trunk is given that of the rows.
                attention_mask=attention_mask,
                shift_labels=labels[:, 1:][scored][None],
                fused_lm_head=True,
                **(kwargs | of_rows),
            )
        return _scatter(output, scored)

    # ---- Both ways, to be compared ----

    @torch.no_grad()
    def _plain(self, batch: Pairs) -> ModelOutput:
        return self._fused_forward(**vars(batch), **self._asked, use_cache=False, fused_lm_head=True)

    @torch.no_grad()
    def _packed(self, batch: Pairs) -> ModelOutput:
        rows = self._lay_out(batch.input_ids, batch.attention_mask)
        if rows is None:
            raise ValueError("the pairs that are tried out are longer than the limits found so far")
        return self._score_packed(rows, batch.labels, attention_mask=batch.attention_mask, **self._asked)


def _scatter(output: ModelOutput, scored: Tensor) -> ModelOutput:
    """The fields of the N scored positions, (1, N) -> (2B, L - 1), 0 elsewhere."""
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        values = getattr(output, name)
        if values is not None:
            # The scatter stays connected to the model when nothing is scored.
            setattr(output, name, values.new_zeros(scored.shape).masked_scatter(scored, values[0]))
    output.label_mask = scored
    return output
