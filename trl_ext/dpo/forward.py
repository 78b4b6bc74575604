"""
The forward of a model that scores pairs: TRL's call with TRL's result, computed over shared rows where that is exact.

TRL asks `model(input_ids, attention_mask, labels, fused_lm_head=True)` for a batch of B chosen and B rejected
sequences. The answer keeps TRL's (2B, L - 1) layout, so that every loss and metric downstream is TRL's own. The change
sits inside the base model's forward: DDP, DeepSpeed, PEFT, the adapter-off reference, precomputing and evaluation all
go through it.
"""

import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..heads import ScoringHead
from ..scoring import score_only
from ..zero import is_partitioned
from . import attention, flex
from .exactness import length_limit, why_not_model
from .prefix_sharing import SharedRows, attention_mask_of, share_prefixes


logger = logging.getLogger(__name__)

# The largest mean difference of the probe's log-probabilities, in nats, that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
TOLERANCE_16_BIT = 0.1


class PairForward:
    """
    Scores pairs with `model`, whose forward TRL's `add_fused_lm_head` has patched; replaces that forward.

    Args:
        model: the base causal LM.
        pack_pairs: all pairs of a batch in one row, where attention can go piece by piece; otherwise a row each.
        role: what the model is in the run, for errors.
        silent: whether the model has to be without noise when it is trained.

    Attributes:
        head: what makes log-probabilities; it settles when sharing is asked for, or at the first batch.
        sharing: whether rows are shared. Off until `share` finds it exact.
        one_kernel: whether FlexAttention reads shared rows, not SDPA piece by piece; decided by the first rows on
            CUDA.
        limit: sequences longer than this many tokens are computed as TRL does: a sliding window or a long-context
            rotary embedding would tell the layouts apart.
        outputs: while a list, every scored batch's output is added to it.
    """

    def __init__(self, model: PreTrainedModel, pack_pairs: bool = True, role: str = "model", silent: bool = False):
        self.model = model
        self.head = ScoringHead(model, role, silent)
        self.pack_pairs = pack_pairs
        self.sharing = False
        self.one_kernel: bool | None = None
        self.limit = length_limit(model)
        self.outputs: list[ModelOutput] | None = None
        self._fused_forward = fused_forward = model.forward

        @functools.wraps(type(model).forward)
        def forward(_: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return fused_forward(*args, **kwargs, **({} if labels is None else {"labels": labels}))
            output = self._score(*args, labels=labels, **kwargs)
            if self.outputs is not None:
                self.outputs.append(output)
            return output

        model.forward = types.MethodType(forward, model)

    def share(self) -> str | None:
        """
        Switches sharing on where random pairs have the same log-probabilities both ways.

        Returns:
            Why rows are not shared; `None` where they are.
        """
        if not is_partitioned(self.model):
            self.head.settle()
        reason = why_not_model(self.model)
        if reason is None:
            attention.use(self.model)
            reason = None if is_partitioned(self.model) else self._probe()
            if reason is not None and attention.in_use(self.model):
                # A model with an attention class of its own may still be exact with a mask over the row.
                attention.stop_using(self.model)
                reason = self._probe()
        if reason is not None:
            attention.stop_using(self.model)
        self.sharing = reason is None
        return reason

    def _score(self, *args: Any, labels: Tensor, **kwargs: Any) -> ModelOutput:
        # What PEFT names without passing it is not there; anything else, such as images, embeddings or router logits,
        # goes TRL's way.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if not args and set(kwargs) <= {"input_ids", "attention_mask", "use_cache", "output_router_logits"}:
            self.head.settle()
        if args or set(kwargs) != {"input_ids", "attention_mask", "use_cache"}:
            return self._fused_forward(*args, labels=labels, fused_lm_head=True, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if self.sharing and len(ids) % 2 == 0 and _is_padded_right(mask):
            shared = self._share(ids, mask)
            if self.limit is None or shared.longest <= self.limit:
                return self._score_shared(shared, labels)
        scored = labels[:, 1:] != -100
        with score_only(self.head.trunk, lambda states: states[:, :-1][scored]):
            output = self._fused_forward(shift_labels=labels[:, 1:][scored][None], fused_lm_head=True, **kwargs)
        return _scatter(output, scored)

    def _share(self, ids: Tensor, mask: Tensor) -> SharedRows:
        # With a mask over the whole row, pairs side by side would pay for scores between them.
        packed = self.pack_pairs and attention.in_use(self.model)
        return share_prefixes(ids, mask, pairs_per_row=None if packed else 1)

    def _score_shared(self, shared: SharedRows, labels: Tensor) -> ModelOutput:
        scored = labels[:, 1:] != -100
        predicts = shared.packed_index[:, :-1][scored]
        if attention.in_use(self.model):
            # A mask of four dimensions is passed on as it is; the attention function reads the rows instead.
            who_sees_whom = {"attention_mask": predicts.new_ones(1, 1, 1, 1).bool(), "shared_rows": shared}
            if self._uses_flex(shared):
                who_sees_whom["shared_blocks"] = flex.block_mask_of(shared)
        else:
            visible = attention_mask_of(shared)
            dtype = self.model.dtype
            hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            who_sees_whom = {"attention_mask": hidden.masked_fill_(~visible, torch.finfo(dtype).min)}
        with score_only(self.head.trunk, lambda states: states.flatten(0, 1)[predicts]):
            output = self._fused_forward(
                input_ids=shared.input_ids,
                position_ids=shared.position_ids,
                shift_labels=labels[:, 1:][scored][None],
                fused_lm_head=True,
                **who_sees_whom,
            )
        return _scatter(output, scored)

    def _uses_flex(self, shared: SharedRows) -> bool:
        """Whether to attend by FlexAttention: on CUDA, if it gives what the pieces give."""
        if self.one_kernel is None and shared.input_ids.is_cuda:
            reason = flex.why_not(self.model, shared.input_ids.device, attention.pieces)
            if reason is not None:
                logger.warning("FlexAttention is not used; attention goes piece by piece (%s).", reason)
            self.one_kernel = reason is None
        return bool(self.one_kernel)

    @torch.no_grad()
    def _probe(self) -> str | None:
        """Two random pairs both ways; what differs, in words."""
        parameter = next(self.model.parameters())
        vocabulary = self.model.config.get_text_config().vocab_size
        length = min(12, self.limit or 12)
        prompt = length // 2
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (4, length), generator=generator)
        ids[2:, :prompt] = ids[:2, :prompt]
        mask = torch.ones_like(ids)
        mask[1, length - 2 :] = mask[2, length - 1 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :prompt] = -100
        ids, mask, labels = (x.to(parameter.device) for x in (ids, mask, labels))
        was_training = self.model.training
        self.model.eval()
        try:
            expected = self._fused_forward(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            got = self._score_shared(self._share(ids, mask), labels)
        except Exception as error:  # whatever it is, it is a reason
            return f"{type(self.model).__name__} cannot be run on shared rows ({type(error).__name__}: {error})"
        finally:
            self.model.train(was_training)
        scored = labels[:, 1:] != -100
        if not torch.isfinite(expected.log_probs[scored]).all():
            return f"{type(self.model).__name__} gives log-probabilities that are not finite"
        difference = (got.log_probs - expected.log_probs)[scored].abs().mean().item()
        if difference <= TOLERANCE.get(self.model.dtype, TOLERANCE_16_BIT):
            return None
        return f"{type(self.model).__name__} gives other log-probabilities on shared rows ({difference:.2g} nats)"


def _scatter(output: ModelOutput, scored: Tensor) -> ModelOutput:
    """The fields of the N scored positions, (1, N) -> (2B, L - 1), 0 elsewhere."""
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        values = getattr(output, name)
        if values is not None:
            # The scatter stays connected to the model when nothing is scored.
            setattr(output, name, values.new_zeros(scored.shape).masked_scatter(scored, values[0]))
    output.label_mask = scored
    return output


def _is_padded_right(mask: Tensor) -> bool:
    return bool((mask[:, :-1] >= mask[:, 1:]).all())


@contextmanager
def recorded(forwards: list[PairForward]) -> Iterator[list[ModelOutput]]:
    """Within the context, the outputs of all scored batches, in order, in the list that it yields."""
    outputs: list[ModelOutput] = []
    for forward in forwards:
        forward.outputs = outputs
    try:
        yield outputs
    finally:
        for forward in forwards:
            forward.outputs = None
