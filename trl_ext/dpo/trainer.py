"""`DPOTrainerX`: TRL's `DPOTrainer`, faster by packed rows, with the implicit reward in the open."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOTrainer

from .._trl import unwrap_model_for_generation, use_adapter
from ..data.pairs import check_columns, require_rows_left
from ..data.rendering import with_template_kwargs
from ..models import loading
from ..models.adapter_copies import (
    base_left_alone,
    check_base_is_kept,
    check_copyable,
    copied_whole,
    round_as_trained,
)
from ..models.context import context_limit
from ..models.generation import complete
from ..models.noise import disable_noise
from ..models.precision import below_autocast, drop_checkpointing, keep_4_bit_differentiable
from ..models.rounding import warn_of_casting, warn_of_rounding
from ..models.saved_adapter import restore_adapters, saved_adapter
from ..models.sharding import (
    check_fsdp,
    check_unquantized,
    is_fsdp,
    is_partitioned,
    is_stage3,
    leave_outputs,
    unsharded,
)
from ..models.trainable import RequireGradients, check_optimizer, check_trainable, take_back
from ..packing.exactness import why_not_run
from ..packing.forward import warn_of_padding
from ..runs.best_metric import evaluated
from ..runs.card import Training, WritesCard
from ..runs.checkpoints import require_optimizer
from ..runs.credit import CreditOffer
from ..runs.failures import in_spite_of_errors
from ..runs.final_line import LastLine, in_mode_of, whole_run_loss
from ..runs.profiler import Phases
from ..runs.requirements import make_folder, require_full_batches, require_kind, require_parts
from ..runs.saving import SavesWhole
from ..runs.steps_left import refuse_finished_checkpoints
from ..runs.tables import show_table, write_rows
from ..runs.trackio_run import name_run
from .card import dpo_training
from .config import DPOConfigX
from .credit import ScoredPairs, credit_of_pairs
from .data import (
    SOURCE,
    SourceCollator,
    check_rows_known,
    check_tokenised,
    drop_equal_pairs,
    drop_equal_tokens,
    warn_of_user_turns,
)
from .forward import PairForward
from .guards import check_vocabularies, require_finite
from .losses import divergence_score, implicit_reward, smoothing_term
from .metrics import COLUMNS, PreferenceLedger, pooled
from .reference import (
    check_adapter_to_copy,
    check_quantized_reference,
    copy_at_start,
    load_reference,
    require_same_start,
)


logger = logging.getLogger(__name__)

REFERENCE = "ref_model"  # the folder in a checkpoint of a reference that follows the policy


class DPOTrainerX(WritesCard, SavesWhole, DPOTrainer):
    """
    Takes what `trl.DPOTrainer` takes and computes what it computes: every loss type, PEFT and QLoRA, precomputed
    reference log-probabilities, vision data (which goes TRL's way untouched).

    - What the two sequences of a pair have in common is computed once, in rows without padding, where that is exact
      (`packing`).
    - `label_smoothing` works with `loss_type="sigmoid"`.
    - Every log line has the metrics of docs/metrics.md over all pairs of the logging window and all ranks; with a
      column `source` in the data, the accuracy of each source.
    - Pairs whose completions are equal are dropped, with a warning.

    Overridden: `create_accelerator_and_postprocess`, `_prepare_dataset`, `_set_signature_columns_if_needed`,
    `_precompute_ref_logps`, `compute_ref_log_probs`, `training_step`, `_compute_loss`, `_finalize_training`, `log`,
    `_evaluate`, `evaluation_loop`, `evaluate`, `_save_rng_state`, `_load_optimizer_and_scheduler`,
    `_load_from_checkpoint`, `_load_best_model`; by `SavesWhole`, `train`, `_maybe_log_save_evaluate`,
    `_get_dataloader`, `_save_checkpoint`, `_get_output_dir` and `_push_from_checkpoint`; and, by `WritesCard`,
    `save_model` and `create_model_card`.

    Args:
        args: a [`DPOConfigX`]; all others as for `trl.DPOTrainer`. `ref_model` may be a path. `model` may be the
            folder or hub name of an adapter: it goes on being trained, on its base, against a frozen copy of itself.

    Raises:
        ValueError: for data that cannot be trained on, before a model is loaded where that can be seen.
        FloatingPointError: when a loss is not finite.
    """

    data_collator: Any
    control: Any
    aux_loss_enabled: bool  # TRL's, of a mixture of experts
    _total_train_tokens: int  # TRL's

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | None = None,
        args: DPOConfigX | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        # 1. What is given, checked before anything is loaded
        require_kind(model)
        if ref_model is not None:
            require_kind(ref_model, "ref_model")
        path = model if isinstance(model, str) else model.config._name_or_path
        require_parts(processing_class, kwargs.get("peft_config"), train_dataset, eval_dataset)
        if args is None:
            args = DPOConfigX(f"{path.rstrip('/').split('/')[-1]}-DPO")
        elif not isinstance(args, DPOConfigX):
            raise TypeError(f"`args` is a {type(args).__name__}; DPOTrainerX needs a `DPOConfigX`.")
        saved = saved_adapter(model, args, kwargs.get("peft_config"))
        if saved is not None:  # until both are loaded, its base stands for it
            model = path = saved.base
            args = saved.args_of_base(args)
            if processing_class is None:
                processing_class = saved.processing_class(trust_remote_code=args.trust_remote_code)
        take_back(model)
        check_columns(train_dataset, eval_dataset, partial(loading.tokenizer_of, model, processing_class, args))
        config = loading.text_config(model, args)
        if processing_class is None:  # TRL loads it, unchecked
            loading.load_tokenizer(path, **loading.source_options(args))
        loading.require_tokens(args, loading.tokenizer_of(model, processing_class, args))
        make_folder(args.output_dir)
        name_run(args)
        if isinstance(ref_model, str):
            loading.check_no_adapter(ref_model, "ref_model")
        if ref_model is not None:
            check_vocabularies(config, loading.text_config(ref_model, args, "ref_model"))
            loading.check_same_tokens(
                loading.tokenizer_of(model, processing_class, args), ref_model, "ref_model", args
            )
        has_adapters = kwargs.get("peft_config") is not None or (isinstance(model, nn.Module) and is_peft_model(model))
        has_adapters |= saved is not None
        if is_stage3(args.deepspeed_plugin):
            check_unquantized(args, kwargs.get("quantization_config"), {} if has_adapters else {"model": model})
        if is_fsdp(args.fsdp):
            check_fsdp(args, kwargs.get("quantization_config"), {"model": model, "ref_model": ref_model})
        if isinstance(model, nn.Module) and kwargs.get("peft_config") is None:
            check_trainable(model, "policy")
        if args.generate_during_eval and args.precompute_ref_log_probs and ref_model is None and not has_adapters:
            raise ValueError(
                "`generate_during_eval` shows the reference's completions, and with `precompute_ref_log_probs` no "
                "reference is kept. Switch one of them off."
            )
        # 2. The reference, where TRL would make another
        if args.ref_model_quantization is not None:
            check_quantized_reference(args, model, ref_model, has_adapters)
        if ref_model is None:
            check_adapter_to_copy(model)
            if saved is not None:
                check_copyable(saved.config)
        self._reference_is_start = ref_model is None and args.ref_model_quantization is None
        if args.ref_model_quantization is not None or isinstance(ref_model, str):
            ref_model = load_reference(args, model, ref_model, kwargs.get("quantization_config"))
        elif ref_model is None:
            ref_model = copy_at_start(model, args, has_adapters)
        if saved is not None:
            model = saved.load(args, kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None
        # 3. What a run keeps beside TRL's own
        self._context = context_limit(config, *loading.adapter_configs(model, kwargs.get("peft_config")))
        self._known = loading.known_tokens(model, config)
        self._ledgers = {"train": PreferenceLedger(), "eval": PreferenceLedger()}
        self._forwards: list[PairForward] = []
        self._eval_prefix = self._prefix_of_all = "eval"
        self._sets: dict[str, dict[str, float]] = {}  # of several held-out sets, by the prefix of their names
        self.phases = Phases(args.device, counts_memory=args.skip_memory_metrics)
        self._tokens_logged = 0
        # 4. TRL's trainer: it loads the policy, prepares the data and may precompute the reference
        if ref_model is None and isinstance(model, PeftModel):
            round_as_trained(model)
        with base_left_alone(model), copied_whole(model, "default"):  # TRL copies an adapter that training starts from
            super().__init__(
                model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
            )
        if args.precompute_ref_log_probs and self._reference_is_start:
            self.ref_model = None  # under FSDP a copy has been asked
        require_full_batches(args, self.train_dataset, self.eval_dataset)
        # 5. What is trained
        trained = check_trainable(self.model, "policy")
        check_optimizer(self.optimizer, {"policy": trained}, "Give it those of `model`, or leave it out.")
        if self._reference_is_start and not args.precompute_ref_log_probs:
            check_base_is_kept(self.model)
        self._learning = RequireGradients("policy", trained)
        self._credit = CreditOffer(self)
        self._last_batch: ScoredPairs | None = None
        for callback in (self._learning, self.phases, LastLine(), self._credit):
            self.add_callback(callback)
        refuse_finished_checkpoints(self)
        warn_of_rounding(self.model.parameters(), self.args.learning_rate, self.is_deepspeed_enabled, "policy")
        # 6. How pairs are scored and collated
        self._score_pairs()
        if data_collator is None and not self._is_vision_dataset:
            self.data_collator = SourceCollator(self.data_collator)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        leave_outputs(self.accelerator)

    # ---- 1. The data ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfigX, dataset_name: str) -> Any:
        warn_of_user_turns(dataset, dataset_name)
        with PartialState().main_process_first():  # the others read its cache
            dataset = with_template_kwargs(drop_equal_pairs(dataset, dataset_name))
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        check_tokenised(dataset, dataset_name, rows, args.max_length, self._context)
        dataset = check_rows_known(dataset, dataset_name, self._tokenizer, self._known)
        with PartialState().main_process_first():
            dataset = drop_equal_tokens(dataset, dataset_name, args.max_length, args.truncation_mode)
        require_rows_left(
            dataset,
            dataset_name,
            f"`chosen` and `rejected` are equal in all of them, at least within `max_length={args.max_length}`",
        )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SOURCE not in self._signature_columns:
            self._signature_columns.append(SOURCE)

    # ---- 2. Log-probabilities of policy and reference ----

    def _score_pairs(self) -> None:
        """Replace the forward of actor and reference, once; say whether rows are packed, and why not."""
        if self._forwards:
            return
        actor = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        keep_4_bit_differentiable(actor)
        drop_checkpointing(actor, self.args)
        models = {"model": loading.base_of(actor)}
        if self.ref_model is not None:
            models["ref_model"] = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
        # TRL has prepared the reference, and not yet the actor.
        unwrapped = below_autocast(models["ref_model"], self.accelerator) if "ref_model" in models else nullcontext()
        with unwrapped:
            self._forwards = [PairForward(model, role, self.args.disable_dropout) for role, model in models.items()]
            for role, forward in zip(models, self._forwards, strict=True):
                if self.args.disable_dropout:
                    disable_noise(forward.model)
                    if role == "ref_model":
                        forward.model.eval()
                if not (self._is_vision_dataset or is_partitioned(forward.model) or is_fsdp(self.args.fsdp)):
                    forward.head.settle()
                    if self.aux_loss_enabled and role == "model":
                        self.aux_loss_enabled = forward.head.settle_aux_loss(self.args.router_aux_loss_coef)
            if self.args.torch_compile:
                logger.warning("`torch_compile` compiles nothing here: pairs are scored in other rows in every batch.")
            if self.args.packing and not self._is_vision_dataset:
                self._pack(why_not_run(self.args, actor))

    def _pack(self, of_run: str | None) -> None:
        """Pack rows where that is exact, unless `of_run` says why not; log which rows stay padded."""
        for role, forward in zip(("actor", "reference"), self._forwards, strict=False):
            with self.accelerator.autocast():  # as in training
                reason = of_run or forward.pack(self.aux_loss_enabled and role == "actor")
            warn_of_padding(reason, f"the {role}", forward.packing, self.args.max_length)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        self._score_pairs()
        with self.phases.during("reference"):
            return super()._precompute_ref_logps(*args, **kwargs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key != SOURCE})

    # ---- 3. The loss ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.phases.enter("learn")
        is_free = self.args.include_num_input_tokens_seen == "no"  # else the Trainer counts there
        if is_free and self.state.num_input_tokens_seen > self._total_train_tokens:  # the run is resumed
            self._total_train_tokens = self._tokens_logged = self.state.num_input_tokens_seen
        loss = super().training_step(*args, **kwargs)
        if is_free:  # TRL begins with 0 again when a run is resumed, and checkpoints keep the state
            self.state.num_input_tokens_seen = self._total_train_tokens
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        sources = inputs.get(SOURCE)
        inputs = {key: value for key, value in inputs.items() if key != SOURCE}
        with self._listening(model) as (policy, of_policy, of_reference):
            result = super()._compute_loss(policy, inputs, return_outputs)
        loss, *rest = result if return_outputs else (result,)
        # 1. Log-ratios to the reference, of chosen and rejected completions
        mask = inputs["completion_mask"][:, 1:]
        logps = self._completion_logps(of_policy[0].log_probs, mask)
        if of_reference:
            ref_logps = self._completion_logps(of_reference[0].log_probs, mask)
            if self._credit.is_read and self.model.training:
                self._last_batch = ScoredPairs.of_batch(inputs, of_policy[0].log_probs, of_reference[0].log_probs)
        else:  # precomputed
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        logratios = logps - ref_logps
        if self.model.training:
            self._learning.check_graph(loss)
        # 2. What TRL's sigmoid loss leaves out
        if self.label_smoothing:
            scores = divergence_score(logratios, self.f_divergence_type, self.f_alpha_divergence_coef)
            chosen, rejected = scores.chunk(2)
            smoothing = smoothing_term(self.beta * (chosen - rejected), self.label_smoothing).mean()
            losses = zip(self.loss_types, self.loss_weights, strict=True)
            loss = loss + sum(weight for kind, weight in losses if kind == "sigmoid") * smoothing
        ids, attended = inputs["input_ids"], inputs["attention_mask"]
        require_finite(
            loss, logps.detach(), logratios.detach(), ids, attended, self._tokenizer, self.state.global_step
        )
        # 3. For the log
        self._record(logps.detach(), logratios.detach(), mask, sources)
        return (loss, *rest) if return_outputs else loss

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[tuple[Callable[..., Any], list[Any], list[Any]]]:
        """
        Listen within the context to what policy and reference answer, in whatever order they are asked; yield the
        policy as a function, its outputs, and those of the reference. The two may be one model under two adapters:
        what is not asked through the function is the reference's.
        """
        of_policy: list[Any] = []
        of_reference: list[Any] = []

        def policy(**kwargs: Any) -> Any:
            before = len(of_reference)
            of_policy.append(model(**kwargs))
            del of_reference[before:]
            return of_policy[-1]

        reference = self._forwards[-1]  # that of the actor, where there is no other
        reference.outputs = of_reference
        try:
            yield policy, of_policy, of_reference
        finally:
            reference.outputs = None

    def _completion_logps(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """Return sums over completions; with `ld_alpha`, the tokens beyond the shorter of the two count less."""
        per_token = per_token[:, -mask.size(1) :]  # without a prompt's virtual tokens
        if self.ld_alpha is None:
            return per_token.sum(dim=1)
        shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
        beyond = mask.cumsum(dim=1) > shorter.unsqueeze(1)
        return (per_token * torch.where(beyond, self.ld_alpha, 1.0)).sum(dim=1)

    # ---- 4. Log ----

    def _record(self, logps: Tensor, logratios: Tensor, mask: Tensor, sources: list[str] | None) -> None:
        """Enter the batch's pairs, of all ranks, into the ledger; before the first step they check the reference."""
        rewards = implicit_reward(logratios, torch.zeros_like(logratios), self.beta)
        of_both = (rewards, logratios, logps, mask.sum(dim=1))
        pairs = torch.stack([half.float() for values in of_both for half in values.chunk(2)], dim=1)
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        mode = "train" if self.model.training else "eval"
        if sources is not None and self.accelerator.num_processes > 1:
            sources = gather_object(sources)
        pairs = gather(pairs)
        if self.model.training and self._reference_is_start and self._is_at_start():
            columns = dict(zip(COLUMNS, pairs.unbind(1), strict=True))
            logratios = torch.cat([columns["chosen_logratios"], columns["rejected_logratios"]])
            lengths = torch.cat([columns["chosen_lengths"], columns["rejected_lengths"]])
            policy = self.accelerator.unwrap_model(self.model)
            reference = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
            with self.accelerator.autocast():  # as in training
                require_same_start(logratios, lengths, policy, reference, self.args)
        for ledger in (mode, "together") if mode == "eval" else (mode,):
            if ledger in self._ledgers:
                self._ledgers[ledger].add(pairs, None if sources is None else sources[: len(pairs)])

    def credit(self, most: int) -> list[dict[str, Any]]:
        """
        Return the tokens of the first pairs of this rank's last batch with their implicit rewards; none where the
        reference was asked beforehand, as its sums are all that is kept.
        """
        batch = self._last_batch
        return [] if batch is None else credit_of_pairs(batch, self._tokenizer, self.beta, most)

    def _is_at_start(self) -> bool:
        """Return whether no optimizer step was taken, here or before a checkpoint, and nothing is noisy on purpose."""
        is_noisy = not self.args.disable_dropout or bool(self.args.neftune_noise_alpha)
        return not (is_noisy or self._learning.has_begun or self.state.global_step)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # the closing line: the loss of the whole run, also a resumed one
            lines = self.state.log_history
            if self._initial_global_step:
                logs["train_loss"] = whole_run_loss(lines, self._initial_global_step) or logs["train_loss"]
            if self.aux_loss_enabled:  # the line of the last step took it
                with_it = (line for line in reversed(lines) if "aux_loss" in line)
                logs.update(next(({"aux_loss": line["aux_loss"]} for line in with_it), {}))
        with in_mode_of(logs, self.model):
            mode = "train" if self.model.training else "eval"
            for key, value in self._ledgers[mode].pop().items():
                self._metrics[mode][key] = [value]
            if mode == "eval":
                logs.update(self.phases.pop_memory(self.accelerator.gather, "evaluate"))
                if self._eval_prefix != "eval":
                    self._log_one_of_several(logs)
            elif "loss" in logs:
                logs.update(self._speed() | self.phases.pop_memory(self.accelerator.gather, "reference", "learn"))
            super().log(logs, start_time)

    def _log_one_of_several(self, logs: dict[str, float]) -> None:
        """Name the metrics of a held-out set by the set, where TRL has one name for all; after the last, add all's."""
        collected = self._metrics["eval"]
        logs.update({f"{self._eval_prefix}_{key}": sum(of) / len(of) for key, of in collected.items()})
        collected.clear()
        if self._sets:
            self._sets[f"{self._eval_prefix}_"] = dict(logs)
            if all(self._sets.values()):  # the last one
                together = pooled(self._sets) | self._ledgers["together"].pop()
                logs.update({f"{self._prefix_of_all}_{key}": value for key, value in together.items()})

    def _speed(self) -> dict[str, float]:
        """Return seconds by phase and tokens per second of learning, since the last line of training."""
        seconds = self.phases.pop_seconds()
        learning = seconds.get("learn")  # of every optimizer step
        if not learning:
            return {}
        tokens = self._metrics["train"]["num_tokens"][0]  # since the first step, over all ranks
        line = {"tokens_per_second": (tokens - self._tokens_logged) / sum(learning)}
        line["time/learn"] = sum(learning) / len(learning)
        if "reference" in seconds:
            line["time/reference"] = sum(seconds["reference"])
        self._tokens_logged = tokens
        return line

    # ---- 5. Evaluate ----

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluated(super()._evaluate, self.args.metric_for_best_model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        warn_of_casting(self)
        with self.phases.during("evaluate"):
            return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(held_out, dict):
            sets = {name: name if eval_dataset is None else part for name, part in held_out.items()}
            return self._evaluate_sets(sets, ignore_keys, metric_key_prefix)
        self._eval_prefix = metric_key_prefix
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(held_out, str):  # one of several, by its name; the Trainer comes back for each of them
            held_out = self.eval_dataset[held_out]
        if self.args.generate_during_eval and isinstance(held_out, Dataset):
            self._complete_prompts(held_out, metric_key_prefix)
        return metrics

    def _evaluate_sets(
        self, sets: dict[str, Any], ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        """
        Evaluate held-out sets, each under its own name. The line of the last one also has the metrics of all their
        pairs together under the names of a single set, which is what the best model is chosen by.
        """
        self._ledgers["together"] = PreferenceLedger()
        self._prefix_of_all = metric_key_prefix
        self._sets = {f"{metric_key_prefix}_{name}_": {} for name in sets}
        metrics: dict[str, float] = {}
        try:
            for name, of in sets.items():
                metrics |= self.evaluate(of, ignore_keys, f"{metric_key_prefix}_{name}")
        finally:
            self._sets = {}
            del self._ledgers["together"]
        return metrics

    def _complete_prompts(self, held_out: Dataset, name: str) -> None:
        """Show and write down what actor and reference make of the first prompts of the held-out set `name`."""
        if "prompt_ids" not in held_out.column_names:
            held_out = self._prepare_dataset(held_out, self.processing_class, self.args, "eval")
        prompts = list(islice(filter(None, held_out["prompt_ids"]), self.args.num_eval_samples))
        if not prompts:  # pairs that have nothing in common: there is nothing to go on from
            logger.warning("No held-out pair has a prompt, so `generate_during_eval` has nothing to complete.")
            return
        actor = self._complete(self.model, prompts)
        if self.ref_model is not None:
            reference = self._complete(self.ref_model, prompts)
        else:  # the actor without its adapter
            peft = self.accelerator.unwrap_model(self.model)
            with use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None):
                reference = self._complete(self.model, prompts)
        if self.is_world_process_zero():
            columns = ("prompt", "actor", "reference")
            rows = list(zip(self._tokenizer.batch_decode(prompts), actor, reference, strict=True))
            label = f"{name}_step_{self.state.global_step:05d}"
            show_table(f"{label}: held-out prompts, actor and reference", columns, rows)
            path = Path(self.args.output_dir) / "completions" / f"{label.replace('/', '_')}.jsonl"
            with in_spite_of_errors(str(path), OSError):
                write_rows(path, [dict(zip(columns, row, strict=True)) for row in rows])

    def _complete(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        with (
            unwrap_model_for_generation(model, self.accelerator) as unwrapped,
            unsharded(unwrapped, self.accelerator),
            self.accelerator.autocast(),
        ):
            longest, device = self.args.eval_max_new_tokens, self.accelerator.device
            return complete(unwrapped, self._tokenizer, prompts, longest, device)

    # ---- 6. Save ----

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the reference with the random numbers, where it follows the policy."""
        super()._save_rng_state(output_dir)
        if self.args.sync_ref_model and self.args.should_save and not self._reference_is_spread():
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(Path(output_dir) / REFERENCE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        require_optimizer(checkpoint, self.args.deepspeed_plugin)
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.sync_ref_model and checkpoint is not None:
            folder = Path(checkpoint) / REFERENCE
            if self._reference_is_spread() or not folder.is_dir():
                raise ValueError(
                    f"{folder} is not there, or cannot be read into a partitioned model (ZeRO-3, FSDP): with "
                    "`sync_ref_model` the reference has followed the policy, so the run cannot be resumed. Start a "
                    "new one from the checkpoint's model."
                )
            loading.restore_weights(self.accelerator.unwrap_model(self.ref_model), folder)

    def _reference_is_spread(self) -> bool:
        return is_fsdp(self.args.fsdp) or is_partitioned(self.accelerator.unwrap_model(self.ref_model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights: the Trainer leaves out those saved under other names, of experts (transformers#48805)."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_peft_model(self.model):
            restore_adapters(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        else:
            loading.restore_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            loading.restore_weights(self.model, self.state.best_model_checkpoint)

    def describe(self) -> Training:
        return dpo_training(self)
