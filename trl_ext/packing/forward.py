"""
A model's forward over packed rows: which rows it is given and how it attends over them, found out by trial.

A model either attends piece by piece (`attention`), on CUDA in one kernel (`flex`), or, where it has an attention of
its own, by a mask over the whole row. What is found inexact is not packed, or packed up to a length.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.sharding import is_partitioned
from . import attention, flex, probe
from .exactness import (
    CHOOSES_KEYS,
    KINDS_OF_LAYERS,
    attends_by_itself,
    is_harmless,
    length_limit,
    lengths,
    shrunk,
    why_not_model,
)
from .segments import PackedRows, attention_mask_of, pack


logger = logging.getLogger(__name__)

# Tokens in the longest sequence of the first trial; what a length of the config becomes for a trial, where the model
# reads it; up to which a length is tried as it is.
SHORT = 12
SHRUNK = 8
LONGEST = 512
UNTRIED = "cannot be tried out"


class PackedForward:
    """
    Gives a model packed rows where that is exact.

    Args:
        model: a transformer that takes `position_ids`.
        plain, packed: what it answers to pairs in padded rows and over packed rows, for the trial.
        shares: whether the common beginning of a group stands once in its row.
        gives: what `plain` and `packed` answer, for log lines.

    Attributes:
        on: whether rows are packed. Off until `switch_on` finds it exact.
        piecewise: whether attention goes piece by piece, or by FlexAttention; otherwise by a mask over the row.
        one_kernel: whether FlexAttention reads the rows, not SDPA piece by piece; decided by the first rows on CUDA.
        limit: sequences longer than this many tokens are not packed.
        row_limit: rows are not longer than this many tokens, for models that count places in the row.
        limited_by: the config's fields behind the two limits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plain: probe.Scored,
        packed: probe.Scored,
        shares: bool = True,
        gives: str = "log-probabilities",
    ):
        self.model, self.shares, self._gives = model, shares, gives
        self.on = False
        self.piecewise = False
        self.one_kernel: bool | None = None
        self.limit = length_limit(model)
        self.row_limit: int | None = None
        self.limited_by: list[str] = ["rope_parameters"] if self.limit else []
        self._plain, self._packed = plain, packed
        self._heads: list[attention.Heads] = []

    def lay_out(self, ids: Tensor, mask: Tensor, groups: Sequence[Sequence[int]]) -> PackedRows | None:
        """
        Return the sequences in rows, as [`pack`] makes them; `None` if one or a group of them is too long, or if the
        rows save no token, since attention over a padded batch is one call.
        """
        if not self.shares:
            groups = [[member] for group in groups for member in group]
        # With a mask over the whole row, groups side by side would pay for scores between them: one in a row.
        rows = pack(ids, mask, groups, self.row_limit if self.piecewise else 0)
        if self.limit is not None and rows.longest > self.limit:
            return None
        if self.row_limit is not None and rows.input_ids.size(1) > self.row_limit:
            return None
        padded = len(ids) * int(mask.any(dim=0).sum())
        saves = rows.input_ids.numel() < padded
        # The ranks that share weights read in the same way, whatever their own batches are.
        return rows if saves or is_partitioned(self.model) else None

    def fits(self, longest: int) -> bool:
        """Return whether sequences of at most `longest` tokens stand in packed rows."""
        return self.on and all(limit is None or longest <= limit for limit in (self.limit, self.row_limit))

    @contextmanager
    def reading(self, trunk: nn.Module, rows: PackedRows) -> Iterator[dict[str, Any]]:
        """
        Within the context `trunk`, called by the model, is given the mask of the rows in place of any other, and the
        router logits of a mixture of experts, (R · T, experts) in each layer, come back as (N · L, experts).

        Yields:
            What to call the model with, beside its own arguments.
        """
        kwargs: dict[str, Any] = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
        if self.piecewise:
            mask: Any = attention.placeholder(self.model.dtype, rows.input_ids.device)
            kwargs |= {"packed_rows": rows} | self._kernel(rows)
        else:
            mask = self._masks(rows)

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"attention_mask": mask}

        def lay_back(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
            routers = getattr(output, "router_logits", None)
            if routers is not None:
                places = rows.packed_index.flatten()
                output.router_logits = tuple(logits.reshape(-1, logits.size(-1))[places] for logits in routers)
            return output

        handles = [
            trunk.register_forward_pre_hook(see, with_kwargs=True),
            trunk.register_forward_hook(lay_back),
        ]
        try:
            yield kwargs
        finally:
            for handle in handles:
                handle.remove()

    def _kernel(self, rows: PackedRows) -> dict[str, Any]:
        """Return the arguments for an attention by FlexAttention: on CUDA, if it gives what the pieces give."""
        if not self._heads:  # the first call says what the layers ask for
            return {"packed_heads": self._heads}
        if self.one_kernel is None and rows.input_ids.is_cuda:
            device, dtype = rows.input_ids.device, self.model.dtype
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
            reason = flex.why_not(self._heads, dtype, device, attention.pieces)
            if reason is not None:
                logger.warning("FlexAttention is not used; attention goes piece by piece (%s).", reason)
            self.one_kernel = reason is None
        return {"packed_blocks": flex.Blocks(rows)} if self.one_kernel else {}

    def _masks(self, rows: PackedRows) -> Any:
        """Return the mask that the model's own attention reads, or one for each kind of layer if a window matters."""
        config = self.model.config.get_text_config()
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        windows = {"full_attention": None}
        if window and rows.longest > window and (not kinds or "sliding_attention" in kinds):
            windows = (windows if kinds else {}) | {"sliding_attention": window}
        masks = {kind: attention_mask_of(rows, each) for kind, each in windows.items()}
        if config._attn_implementation != "sdpa":  # eager attention adds a mask to its scores
            dtype = self.model.dtype
            for kind, seen in masks.items():
                masks[kind] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return masks if len(masks) > 1 else masks.popitem()[1]

    # ---- What is exact ----

    def switch_on(self, by_mask: bool = True) -> str | None:
        """
        Switch packing on where random pairs get the same log-probabilities both ways, up to the lengths where they do.

        Args:
            by_mask: whether a mask over the whole row will do for a model with an attention of its own. It saves
                tokens that sequences share, and nothing where they stand side by side.

        Returns:
            Why rows are not packed; `None` where they are.
        """
        reasons = [why_not_model(self.model)]
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device.type
        if reasons == [None]:
            # A model with an attention of its own may still be exact with a mask over the row.
            ways = [True] * self._may_go_piecewise() + [False] * by_mask
            if not ways:
                reasons.append(probe.reads_whole_rows(self.model))
            for self.piecewise in ways:
                reasons.append(self._probe())
                in_fewer_bits = torch.is_autocast_enabled(device)
                with torch.autocast(device, enabled=False):
                    if reasons[-1] is None and in_fewer_bits:  # more digits tell more apart
                        reasons[-1] = self._probe()
                    if reasons[-1] is None:
                        self._find_limits()
                        break
        self.model.train(was_training)
        self.on = reasons[-1] is None
        self.piecewise &= self.on
        said = list(dict.fromkeys(filter(None, reasons)))
        if self.on and said:
            logger.info("Attention over shared rows reads a mask: %s.", said[0])
        return None if self.on else "; with a mask over the row, ".join(said)

    def _may_go_piecewise(self) -> bool:
        """Return whether pieces are worth a trial; where none is possible, whether the attention is transformers'."""
        if not is_partitioned(self.model):
            return True
        asks_sdpa = self.model.config.get_text_config()._attn_implementation == "sdpa"
        is_known = self.model._supports_flex_attn or (asks_sdpa and self.model._supports_attention_backend)
        return is_known and not attends_by_itself(self.model)

    def _probe(self) -> str | None:
        """Say what differs for short pairs."""
        if is_partitioned(self.model):  # no forward can be run of it here
            return None
        known = [value for name, value in lengths(self.model) if name in KINDS_OF_LAYERS]
        length = min([SHORT, *known, *([self.limit] if self.limit else [])])
        common, tail = length // 2, length - length // 2
        return self._differs([(common, tail, max(tail - 1, 1)), (common, max(tail - 2, 1), tail)])

    def _find_limits(self) -> None:
        """Go beyond every length in the config, one after the other, the smallest first."""
        for name, value in lengths(self.model):
            if is_harmless(self.model, name, value):
                continue
            by_sequence = self._beyond(name, value)
            if by_sequence is None:
                continue
            self.limited_by.append(name)
            if not by_sequence:
                self.row_limit = value
                return
            self.limit = min(value, self.limit or value)

    def _beyond(self, name: str, value: int) -> bool | None:
        """Return whether, for this length, sequences have to be shorter, or rows (`False`), or neither (`None`)."""
        if name in CHOOSES_KEYS:  # by a last digit where keys are about as good: a trial may miss it
            return True
        if is_partitioned(self.model):
            return name in KINDS_OF_LAYERS
        if value > SHRUNK and self._reads(name, value):
            with shrunk(self.model, name, value, SHRUNK):
                return self._beyond_as_it_is(SHRUNK)
        return self._beyond_as_it_is(value) if value <= LONGEST else name in KINDS_OF_LAYERS

    def _reads(self, name: str, value: int) -> bool:
        """Return whether another value of this field changes what the model computes: a small one can be tried."""
        try:
            batch = probe.pairs(self.model, _longer_than(SHRUNK))
            before = self._plain(batch).log_probs
            with shrunk(self.model, name, value, SHRUNK):
                return not torch.allclose(self._plain(batch).log_probs, before, rtol=0, atol=1e-2)
        except Exception:  # whatever it is, nothing has been learnt about this field
            return False

    def _beyond_as_it_is(self, value: int) -> bool | None:
        longer = UNTRIED if self.limit else self._differs(_longer_than(value))
        if longer is None:
            return None
        # Sequences that are not longer, so many that the longest rows they fit in are.
        sequence = min(value, self.limit or value)
        common, tail = sequence // 4, sequence - sequence // 4
        pairs = [(common, tail, tail - 1)] * (value // (common + 2 * tail - 1) + 1)
        by_sequence = self._differs(pairs) is None
        # Where padded rows cannot be as long, no more can be asked for.
        return None if by_sequence and UNTRIED in longer else by_sequence

    def _differs(self, sizes: list[tuple[int, int, int]]) -> str | None:
        try:
            batch = probe.pairs(self.model, sizes)
            return probe.what_differs(self.model, batch, self._plain, self._packed, self._gives)
        except Exception as error:  # padded rows cannot be run, so there is nothing to compare with
            return f"{type(self.model).__name__} {UNTRIED} ({type(error).__name__}: {error})"


def _longer_than(length: int) -> list[tuple[int, int, int]]:
    """Pairs (common, chosen, rejected) of sequences of more than `length` tokens; one may come out right by chance."""
    pairs = []
    for common in (length // 2, length // 4, length):
        tail = length - common + max(length // 4, 16)
        pairs.append((common, tail, tail - 1))
    return pairs


def warn_of_padding(reason: str | None, name: str, packing: PackedForward, longest: int | None = None) -> None:
    """Say, once, where a model's rows stay padded, and why; `longest` is how many tokens a sequence may have."""
    names = ", ".join(packing.limited_by)
    if reason is not None:
        logger.warning("Rows are padded for %s, not packed: %s.", name, reason)
        return
    if packing.limit is not None and (longest is None or longest > packing.limit):
        up_to = "in batches whose sequences have at most %d tokens: longer ones would see the difference (%s)."
        logger.warning(f"Rows of %s are packed {up_to}", name, packing.limit, names)
    if packing.row_limit is not None:
        up_to = "up to %d tokens: the model counts places in the row (%s)."
        logger.warning(f"Rows of %s are packed {up_to}", name, packing.row_limit, names)
