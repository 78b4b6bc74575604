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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.lm_head import score_only
from ..models.scoring_head import ScoringHead
from ..models.sharding import is_partitioned
from ..packing import attention, flex
from ..packing.exactness import KINDS_OF_LAYERS, is_harmless, length_limit, lengths, shrunk, why_not_model
from ..packing.segments import SharedRows, attention_mask_of, share_prefixes
from . import probe


logger = logging.getLogger(__name__)

# Tokens in the longest sequence of the first trial; what a length of the config becomes for a trial, where the model
# reads it; up to which a length is tried as it is.
SHORT = 12
SHRUNK = 8
LONGEST = 512
UNTRIED = "cannot be tried out"
INPUTS = {"input_ids", "attention_mask", "use_cache"}


class PairForward:
    """
    Scores pairs with `model`, whose forward TRL's `add_fused_lm_head` has patched; replaces that forward.

    Args:
        model: the base causal LM.
        role: what the model is in the run, for errors.
        silent: whether the model has to be without noise when it is trained.

    Attributes:
        head: what makes log-probabilities; it settles when sharing is asked for, or at the first batch.
        sharing: whether rows are shared. Off until `share` finds it exact.
        piecewise: whether attention goes piece by piece, or by FlexAttention; otherwise by a mask over the row.
        one_kernel: whether FlexAttention reads shared rows, not SDPA piece by piece; decided by the first rows on
            CUDA.
        limit: batches with sequences longer than this many tokens are computed as TRL does.
        row_limit: rows are not longer than this many tokens, for models that count places in the row.
        limited_by: what in the config the two limits are of.
        outputs: while a list, every scored batch's output is added to it.
    """

    def __init__(self, model: PreTrainedModel, role: str = "model", silent: bool = False):
        self.model = model
        self.head = ScoringHead(model, role, silent)
        self.sharing = False
        self.piecewise = False
        self.one_kernel: bool | None = None
        self.limit = length_limit(model)
        self.row_limit: int | None = None
        self.limited_by: list[str] = ["rope_parameters"] if self.limit else []
        self.outputs: list[ModelOutput] | None = None
        self._heads: list[attention.Heads] = []
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

    def share(self, aux_loss: bool = False) -> str | None:
        """
        Switches sharing on where random pairs have the same log-probabilities both ways.

        Args:
            aux_loss: whether a mixture of experts' load-balancing loss has to be the same, too.

        Returns:
            Why rows are not shared; `None` where they are.
        """
        if not is_partitioned(self.model):
            self.head.settle()
        reasons = [why_not_model(self.model)]
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device.type
        if reasons == [None]:
            # A model with an attention of its own may still be exact with a mask over the row.
            asks_sdpa = self.model.config.get_text_config()._attn_implementation == "sdpa"
            for self.piecewise in [True, False] if asks_sdpa else [False]:
                reasons.append(self._probe(aux_loss))
                in_fewer_bits = torch.is_autocast_enabled(device)
                with torch.autocast(device, enabled=False):
                    if reasons[-1] is None and in_fewer_bits:  # more digits tell more apart
                        reasons[-1] = self._probe(aux_loss)
                    if reasons[-1] is None:
                        self._find_limits(aux_loss)
                        break
        self.model.train(was_training)
        self.sharing = reasons[-1] is None
        self.piecewise &= self.sharing
        said = list(dict.fromkeys(filter(None, reasons)))
        if self.sharing and said:
            logger.info("Attention over shared rows reads a mask: %s.", said[0])
        return None if self.sharing else "; with a mask over the row, ".join(said)

    # ---- A batch ----

    def _score(self, *args: Any, labels: Tensor, **kwargs: Any) -> ModelOutput:
        # What PEFT names without passing it is not there; anything else, such as images or embeddings, goes TRL's way.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if not args and kwargs.keys() - {"output_router_logits"} <= INPUTS:
            self.head.settle()
        if args or kwargs.keys() - {"output_router_logits"} != INPUTS:
            return self._fused_forward(*args, labels=labels, fused_lm_head=True, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if self.sharing and len(ids) % 2 == 0 and _is_padded_right(mask):
            shared = self._share(ids, mask)
            if shared is not None:
                return self._score_shared(shared, labels, **kwargs)
        scored = labels[:, 1:] != -100
        with score_only(self.head.trunk, lambda states: states[:, :-1][scored]):
            output = self._fused_forward(shift_labels=labels[:, 1:][scored][None], fused_lm_head=True, **kwargs)
        return _scatter(output, scored)

    def _share(self, ids: Tensor, mask: Tensor) -> SharedRows | None:
        """As many pairs in a row as it may hold; `None` if a sequence or a row of one pair is too long."""
        # With a mask over the whole row, pairs side by side would pay for scores between them.
        pairs_per_row = len(ids) // 2 if self.piecewise else 1
        shared = share_prefixes(ids, mask, pairs_per_row)
        if self.limit is not None and shared.longest > self.limit:
            return None
        while self.row_limit is not None and shared.input_ids.size(1) > self.row_limit:
            if pairs_per_row == 1:
                return None
            pairs_per_row = (pairs_per_row + 1) // 2
            shared = share_prefixes(ids, mask, pairs_per_row)
        return shared

    def _score_shared(self, shared: SharedRows, labels: Tensor, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        scored = labels[:, 1:] != -100
        predicts = shared.packed_index[:, :-1][scored]
        kwargs |= {"input_ids": shared.input_ids, "position_ids": shared.position_ids}
        if self.piecewise:
            mask: Any = attention.placeholder(self.model.dtype, labels.device)
            kwargs |= {"shared_rows": shared} | self._kernel(shared)
        else:
            mask = self._masks(shared)
        with (
            _given_rows(self.head.trunk, shared, mask),
            score_only(self.head.trunk, lambda states: states.flatten(0, 1)[predicts]),
        ):
            output = self._fused_forward(
                # TRL's mask, which its load-balancing loss reads; the trunk is given that of the rows.
                attention_mask=attention_mask,
                shift_labels=labels[:, 1:][scored][None],
                fused_lm_head=True,
                **kwargs,
            )
        return _scatter(output, scored)

    def _kernel(self, shared: SharedRows) -> dict[str, Any]:
        """Arguments for an attention by FlexAttention: on CUDA, if it gives what the pieces give."""
        if not self._heads:  # the first call says what the layers ask for
            return {"shared_heads": self._heads}
        if self.one_kernel is None and shared.input_ids.is_cuda:
            device, dtype = shared.input_ids.device, self.model.dtype
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
            reason = flex.why_not(self._heads, dtype, device, attention.pieces)
            if reason is not None:
                logger.warning("FlexAttention is not used; attention goes piece by piece (%s).", reason)
            self.one_kernel = reason is None
        return {"shared_blocks": flex.Blocks(shared)} if self.one_kernel else {}

    def _masks(self, shared: SharedRows) -> Any:
        """Who sees whom, in the form that the model's own attention reads; by kind of layer where a window matters."""
        config = self.model.config.get_text_config()
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        everything = self._mask(attention_mask_of(shared))
        if not window or shared.longest <= window or (kinds and "sliding_attention" not in kinds):
            return everything
        near = self._mask(attention_mask_of(shared, window))
        return {"full_attention": everything, "sliding_attention": near} if kinds else near

    def _mask(self, visible: Tensor) -> Tensor:
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return visible
        dtype = self.model.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    # ---- What is exact ----

    def _probe(self, aux_loss: bool = False) -> str | None:
        """Say what differs for short pairs."""
        if is_partitioned(self.model):  # no forward can be run of it here
            return None
        known = [value for name, value in lengths(self.model) if name in KINDS_OF_LAYERS]
        length = min([SHORT, *known, *([self.limit] if self.limit else [])])
        common, tail = length // 2, length - length // 2
        return self._differs([(common, tail, max(tail - 1, 1)), (common, max(tail - 2, 1), tail)], aux_loss)

    def _find_limits(self, aux_loss: bool) -> None:
        """Goes beyond every length in the config, one after the other, the smallest first."""
        for name, value in lengths(self.model):
            if is_harmless(self.model, name, value):
                continue
            by_sequence = self._beyond(name, value, aux_loss)
            if by_sequence is None:
                continue
            self.limited_by.append(name)
            if not by_sequence:
                self.row_limit = value
                return
            self.limit = min(value, self.limit or value)

    def _beyond(self, name: str, value: int, aux_loss: bool) -> bool | None:
        """Whether, for this length, sequences have to be shorter, or rows (`False`), or neither of them (`None`)."""
        if is_partitioned(self.model):
            return name in KINDS_OF_LAYERS
        if value > SHRUNK and self._reads(name, value):
            with shrunk(self.model, name, value, SHRUNK):
                return self._beyond_as_it_is(SHRUNK, aux_loss)
        return self._beyond_as_it_is(value, aux_loss) if value <= LONGEST else name in KINDS_OF_LAYERS

    def _reads(self, name: str, value: int) -> bool:
        """Return whether another value of this field changes what the model computes: a small one can be tried."""
        try:
            batch = probe.pairs(self.model, _longer_than(SHRUNK))
            before = self._plain(batch).log_probs
            with shrunk(self.model, name, value, SHRUNK):
                return not torch.allclose(self._plain(batch).log_probs, before, rtol=0, atol=1e-2)
        except Exception:  # whatever it is, nothing has been learnt about this field
            return False

    def _beyond_as_it_is(self, value: int, aux_loss: bool) -> bool | None:
        longer = UNTRIED if self.limit else self._differs(_longer_than(value), aux_loss)
        if longer is None:
            return None
        sequence = min(value, self.limit or value)
        by_sequence = self._differs(_in_rows_longer_than(value, sequence), aux_loss) is None
        # Where TRL's rows cannot be as long, no more can be asked for.
        return None if by_sequence and UNTRIED in longer else by_sequence

    def _differs(self, sizes: list[tuple[int, int, int]], aux_loss: bool) -> str | None:
        asked: dict[str, Any] = {"output_router_logits": True} if aux_loss else {}
        try:
            batch = probe.pairs(self.model, sizes)
            plain, shared = partial(self._plain, **asked), partial(self._over_rows, **asked)
            return probe.what_differs(self.model, batch, plain, shared)
        except Exception as error:  # TRL's own rows cannot be run, so there is nothing to compare with
            return f"{type(self.model).__name__} {UNTRIED} ({type(error).__name__}: {error})"

    @torch.no_grad()
    def _plain(self, batch: probe.Pairs, **asked: Any) -> ModelOutput:
        return self._fused_forward(**vars(batch), **asked, use_cache=False, fused_lm_head=True)

    @torch.no_grad()
    def _over_rows(self, batch: probe.Pairs, **asked: Any) -> ModelOutput:
        shared = self._share(batch.input_ids, batch.attention_mask)
        if shared is None:
            raise ValueError("the pairs that are tried out are longer than the limits found so far")
        return self._score_shared(shared, batch.labels, attention_mask=batch.attention_mask, **asked)


def _longer_than(length: int) -> list[tuple[int, int, int]]:
    """Pairs (common, chosen, rejected) of sequences of more than `length` tokens; one may come out right by chance."""
    pairs = []
    for common in (length // 2, length // 4, length):
        tail = length - common + max(length // 4, 16)
        pairs.append((common, tail, tail - 1))
    return pairs


def _in_rows_longer_than(length: int, sequence: int) -> list[tuple[int, int, int]]:
    """Pairs of sequences of at most `sequence` tokens; the longest rows that they fit in have more than `length`."""
    common = sequence // 4
    tail = sequence - common
    return [(common, tail, tail - 1)] * (length // (common + 2 * tail - 1) + 1)


@contextmanager
def _given_rows(trunk: nn.Module, shared: SharedRows, mask: Any) -> Iterator[None]:
    """
    Within the context, `trunk` is given `mask` instead of TRL's, and the router logits of its tokens in the rows,
    (R · T, experts) in each layer, come back in TRL's layout (2B · L, experts).
    """

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": mask}

    def lay_out(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
        routers = getattr(output, "router_logits", None)
        if routers is not None:
            places = shared.packed_index.flatten()
            output.router_logits = tuple(logits.reshape(-1, logits.size(-1))[places] for logits in routers)
        return output

    handles = [
        trunk.register_forward_pre_hook(see, with_kwargs=True),
        trunk.register_forward_hook(lay_out),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
