"""`RewardTrainerX`: TRL's `RewardTrainer` on packed pairs, with checks of data and model first, and a card."""

import logging
from functools import partial
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RewardConfig, RewardTrainer

from ..data.formats import column_names
from ..data.pairs import check_columns, check_written, require_rows_left
from ..data.rendering import with_template_kwargs
from ..models.loading import (
    base_of,
    check_known,
    is_quantized,
    known_tokens,
    load_tokenizer,
    require_tokens,
    source_options,
    such_as,
    text_config,
)
from ..models.noise import has_noise
from ..models.precision import drop_checkpointing, keep_4_bit_differentiable
from ..models.rounding import warn_of_rounding
from ..models.sharding import check_fsdp, is_fsdp, leave_outputs
from ..models.trainable import RequireGradients, check_optimizer, check_trainable, take_back
from ..packing.exactness import why_not_run
from ..packing.forward import warn_of_padding
from ..packing.scores import PackedScores
from ..packing.segments import pairs_of
from ..runs.best_metric import evaluated
from ..runs.card import Training, WritesCard
from ..runs.checkpoints import require_optimizer
from ..runs.final_line import LastLine, in_mode_of, whole_run_loss
from ..runs.requirements import make_folder, require_full_batches, require_kind, require_parts
from ..runs.saving import SavesWhole
from ..runs.steps_left import refuse_finished_checkpoints
from ..runs.trackio_run import name_run
from .card import reward_training
from .config import RewardConfigX


logger = logging.getLogger(__name__)

# TRL's inputs of a batch of pairs.
INPUTS = {"input_ids", "attention_mask", "use_cache", "margin"}
# The columns of a dataset that is tokenised, now and in earlier versions of TRL.
TOKENISED = ({"chosen_ids", "rejected_ids"}, {"chosen_input_ids", "rejected_input_ids"})


class RewardTrainerX(WritesCard, SavesWhole, RewardTrainer):
    """
    Takes what `trl.RewardTrainer` takes and trains as it does.

    - What the two sequences of a pair have in common is computed once, in rows without padding, where that is exact
      (`packing` of [`RewardConfigX`]; a `trl.RewardConfig` packs too).
    - `accuracy` is the share of all pairs of the logging window or the evaluation, over all ranks, where TRL's is a
      mean over batches, whatever their sizes; an evaluation logs their number as `eval_pairs`.

    Overridden: `_prepare_dataset`, which says how many pairs are longer than `max_length` and left out; `compute_loss`
    and `log`, which read packed rows and count pairs;
    `evaluate` and `_evaluate`: of several held-out sets each is logged under its name, and all together under the
    names of a single one; `_finalize_training`, which gives a resumed run the loss of all its steps;
    `_load_optimizer_and_scheduler`, which refuses a checkpoint without the optimizer;
    `create_accelerator_and_postprocess`, which leaves FSDP2's outputs in float32; by `SavesWhole`, `train`,
    `_maybe_log_save_evaluate`, `_get_dataloader`, `_save_checkpoint`, `_get_output_dir` and `_push_from_checkpoint`;
    and, by `WritesCard`, `save_model` and `create_model_card`.

    Raises:
        ValueError: for data that cannot be trained on, an encoder-decoder, or a model without a trainable parameter,
            before a model is loaded where that can be seen; when no pair is left, or one has a token that the model
            has no embedding of.
        FloatingPointError: when a loss is not finite.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        require_kind(model)
        if type(model).__name__.endswith("ForCausalLM"):
            raise ValueError(
                f"`model` is a {type(model).__name__}, which writes text. Give its path, or "
                "`AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)`."
            )
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardConfigX(f"{name.rstrip('/').split('/')[-1]}-Reward")
        elif not isinstance(args, RewardConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; RewardTrainerX needs a `RewardConfigX`.")
        require_parts(processing_class, kwargs.get("peft_config"), train_dataset, eval_dataset)
        take_back(model)
        require_one_label(text_config(model, args, scores=True), model)
        if is_fsdp(args.fsdp):
            check_fsdp(args, kwargs.get("quantization_config"), {"model": model})
        if processing_class is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            processing_class = load_tokenizer(path, **source_options(args))
        require_tokens(args, processing_class)
        # What is not tokenised yet; how it is written only if TRL does not change the tokenizer first.
        sees_text = args.chat_template_path is None and args.eos_token is None
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        raw = {name: None if _is_tokenised(each) else each for name, each in held_out.items()}
        rows = None if _is_tokenised(train_dataset) else train_dataset
        check_columns(rows, raw, lambda: processing_class if sees_text else None)
        make_folder(args.output_dir)
        name_run(args)
        if isinstance(model, nn.Module) and kwargs.get("peft_config") is None:
            check_trainable(model, "reward model")
        self._in_order: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._eval_prefix = self._prefix_of_all = "eval"
        self._sets: dict[str, dict[str, float]] = {}  # of several held-out sets, by the prefix of their names
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        require_full_batches(args, self.train_dataset, self.eval_dataset)
        trained = check_trainable(self.model, "reward model")
        check_optimizer(self.optimizer, {"reward model": trained}, "Give it those of `model`, or leave it out.")
        drop_checkpointing(self.accelerator.unwrap_model(self.model), self.args)
        self._check_known()
        self._keep_computable()
        self._scores = PackedScores(base_of(self.model))
        if getattr(self.args, "packing", True):  # which a `trl.RewardConfig` does not have
            self._pack()
        self.add_callback(RequireGradients("reward model", trained))
        self.add_callback(LastLine())
        refuse_finished_checkpoints(self)
        warn_of_rounding(self.model.parameters(), self.args.learning_rate, self.is_deepspeed_enabled, "reward model")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        leave_outputs(self.accelerator)

    def _keep_computable(self) -> None:
        """Let gradients through 4-bit weights, and give the score head the dtype of the states that it reads."""
        model: Any = self.model
        keep_4_bit_differentiable(model)
        if not is_quantized(model):
            return
        # On a quantised base TRL casts what is trained to bfloat16; the trunk's states stay as they are.
        for name, parameter in model.named_parameters():
            if "score.modules_to_save." in name:
                parameter.data = parameter.data.to(model.get_input_embeddings().weight.dtype)

    def _pack(self) -> None:
        """Read packed rows from here on where that is exact; say where and up to what it is not."""
        reason = why_not_run(self.args, self.model)
        if reason is None and has_noise(self.model):
            reason = "dropout is active, in layers that `disable_dropout` leaves alone"
        if reason is None and self.args.torch_compile:
            reason = "`torch_compile` would compile anew for every batch"
        with self.accelerator.autocast():  # as in training
            reason = reason or self._scores.packing.switch_on()
        warn_of_padding(reason, "the reward model", self._scores.packing, self.args.max_length)

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
        if not _is_tokenised(dataset):
            check_written(dataset_name, dataset, lambda: processing_class)
            dataset = with_template_kwargs(dataset)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        too_long = f"`chosen` or `rejected` has more than `max_length={args.max_length}` tokens"
        if not isinstance(dataset, Dataset):
            require_rows_left(prepared, dataset_name, f"in all of them {too_long}. Raise it")
            return prepared
        dropped = len(dataset) - len(prepared)
        if dropped and len(prepared) == 0:
            raise ValueError(
                f"In all {dropped} rows of the {dataset_name} dataset {too_long}, so that no pair is left. Raise it, "
                "or shorten the texts."
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

    def _score(self, model: Any, **inputs: Any) -> Any:
        """Return the model's output for TRL's batch of pairs: B chosen sequences before B rejected ones, (2B, L)."""
        packed = None
        if inputs.keys() <= INPUTS:  # whatever else there is goes TRL's way
            ids = inputs["input_ids"]
            packed = self._scores(model, ids, inputs["attention_mask"], pairs_of(len(ids)))
        return model(**inputs) if packed is None else packed

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scored = partial(self._score, model)
        loss, outputs = super().compute_loss(scored, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
        require_finite(loss, chosen, rejected, inputs, self.processing_class, self.state.global_step)
        mode = "train" if self.model.training else "eval"
        # At the end of an evaluation some ranks repeat pairs, which are left out here.
        self._in_order[mode].append(self.accelerator.gather_for_metrics(chosen > rejected))
        return (loss, outputs) if return_outputs else loss

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        require_optimizer(checkpoint, self.args.deepspeed_plugin)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluated(super()._evaluate, self.args.metric_for_best_model, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(held_out, dict):
            self._eval_prefix = metric_key_prefix
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._prefix_of_all = metric_key_prefix
        self._sets = {f"{metric_key_prefix}_{name}": {} for name in held_out}
        metrics: dict[str, float] = {}
        try:
            for name, rows in held_out.items():
                of = name if eval_dataset is None else rows
                metrics |= self.evaluate(of, ignore_keys, f"{metric_key_prefix}_{name}")
        finally:
            self._sets = {}
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._initial_global_step:
            whole = whole_run_loss(self.state.log_history, self._initial_global_step)
            logs["train_loss"] = whole or logs["train_loss"]
        with in_mode_of(logs, self.model):
            self._log_pairs(logs)
            super().log(logs, start_time)

    def _log_pairs(self, logs: dict[str, float]) -> None:
        """Add what was counted; name the metrics by their held-out set, for which TRL has one name."""
        mode = "train" if self.model.training else "eval"
        if self._in_order[mode]:
            in_order = torch.cat(self._in_order[mode])
            self._metrics[mode]["accuracy"] = [in_order.float().mean().item()]
            if mode == "eval":
                self._metrics[mode]["pairs"] = [float(len(in_order))]
            self._in_order[mode].clear()
        prefix = self._eval_prefix
        if mode == "train" or prefix == "eval":
            return
        of_set = {key: sum(of) / len(of) for key, of in self._metrics[mode].items()}
        self._metrics[mode].clear()
        logs.update({f"{prefix}_{key}": value for key, value in of_set.items()})
        if prefix in self._sets:
            self._sets[prefix] = of_set | {"loss": logs[f"{prefix}_loss"]}
            if all(self._sets.values()):  # the last one
                together = pooled(list(self._sets.values()))
                logs.update({f"{self._prefix_of_all}_{key}": value for key, value in together.items()})

    def describe(self) -> Training:
        return reward_training(self)


def require_one_label(config: Any, model: Any) -> None:
    """Raise `ValueError` for the path of a classifier of several labels, whose head a reward cannot go on from."""
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if isinstance(model, str) and is_classifier and config.num_labels != 1:
        raise ValueError(
            f"{model!r} (`model`) is a classifier of {config.num_labels} labels, and a reward model has one. Start "
            f"from a causal language model, which gets a head for scores{such_as(model, 'model')}."
        )


def _is_tokenised(dataset: Any) -> bool:
    is_dataset = isinstance(dataset, Dataset | IterableDataset)
    return is_dataset and any(names <= set(column_names(dataset)) for names in TOKENISED)


def pooled(sets: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean over held-out sets, weighted by their `pairs`, which are summed."""
    total = sum(each["pairs"] for each in sets)
    means = {key: sum(each[key] * each["pairs"] for each in sets) / total for key in sets[0]}
    return means | {"pairs": total}


def require_finite(loss: Tensor, chosen: Tensor, rejected: Tensor, inputs: Any, tokenizer: Any, step: int) -> None:
    """
    Raise `FloatingPointError` when the loss of a batch is NaN or infinite, with the step and the pair it comes from.

    Args:
        chosen, rejected (B,): scores.
        inputs: with `input_ids` and `attention_mask` (2B, L), chosen then rejected.
        step: optimizer steps taken so far.
    """
    if torch.isfinite(loss):
        return
    broken = (~torch.isfinite(chosen - rejected)).nonzero().flatten().tolist()
    pair = broken[0] if broken else int((chosen - rejected).abs().argmax())
    ids = inputs["input_ids"][pair][inputs["attention_mask"][pair].bool()]
    raise FloatingPointError(
        f"The loss is {loss.item()} after {step} optimizer steps. Pair {pair} of the batch has the scores "
        f"{chosen[pair].item():.4g} (chosen) and {rejected[pair].item():.4g} (rejected); its chosen sequence begins "
        f"{tokenizer.decode(ids)!r:.300}. Nothing of this batch was learnt. A lower learning "
        "rate, or bfloat16 instead of float16, is the usual cure; before the first step, look at the weights that "
        "were loaded."
    )
