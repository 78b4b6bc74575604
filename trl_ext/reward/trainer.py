"""`RewardTrainerX`: TRL's `RewardTrainer`, which counts pairs, and whose card says what was trained."""

import logging
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardTrainer

from ..models.loading import check_known, known_tokens
from ..models.precision import drop_checkpointing
from ..runs.card import Training, WritesCard
from .card import reward_training


logger = logging.getLogger(__name__)


class RewardTrainerX(WritesCard, RewardTrainer):
    """
    Takes what `trl.RewardTrainer` takes and trains as it does.

    Overridden: `_prepare_dataset`, which says how many pairs are longer than `max_length` and left out; `compute_loss`
    and `log`, in which `accuracy` is the share of all pairs of the logging window or the evaluation, over all ranks,
    where TRL's is a mean over batches, whatever their sizes; an evaluation logs their number as `eval_pairs`; and, by
    `WritesCard`, `save_model` and `create_model_card`.

    Raises:
        ValueError: when no pair is left, or one has a token that the model has no embedding of.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._in_order: dict[str, list[Tensor]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)
        drop_checkpointing(self.accelerator.unwrap_model(self.model), self.args)
        self._check_known()

    def _check_known(self) -> None:
        tokenizer: Any = self.processing_class
        config: Any = self.model.config
        known = known_tokens(self.model, config.get_text_config())
        check_known([tokenizer.pad_token_id], known, tokenizer, "The reward model", "the pad token")
        for name, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            for side in ("chosen_ids", "rejected_ids") if isinstance(dataset, Dataset) else ():
                ids = chain.from_iterable(dataset[side])
                check_known(ids, known, tokenizer, "The reward model", f"a row of the {name} dataset")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not isinstance(dataset, Dataset):
            return prepared
        dropped = len(dataset) - len(prepared)
        if dropped and len(prepared) == 0:
            raise ValueError(
                f"In all {dropped} rows of the {dataset_name} dataset `chosen` or `rejected` has more than "
                f"`max_length={args.max_length}` tokens, so that no pair is left. Raise it, or shorten the texts."
            )
        if dropped:
            logger.warning(
                "Left out %d of %d rows of the %s dataset: `chosen` or `rejected` is longer than `max_length=%s`.",
                dropped,
                len(dataset),
                dataset_name,
                args.max_length,
            )
        return prepared

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
        mode = "train" if self.model.training else "eval"
        # At the end of an evaluation some ranks repeat pairs, which are left out here.
        self._in_order[mode].append(self.accelerator.gather_for_metrics(chosen > rejected))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._in_order[mode]:
            in_order = torch.cat(self._in_order[mode])
            self._metrics[mode]["accuracy"] = [in_order.float().mean().item()]
            if mode == "eval":
                self._metrics[mode]["pairs"] = [float(len(in_order))]
            self._in_order[mode].clear()
        super().log(logs, start_time)

    def describe(self) -> Training:
        return reward_training(self)
