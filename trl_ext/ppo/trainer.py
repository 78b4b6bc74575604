"""
`PPOTrainerX`: TRL's `GRPOTrainer` with the critic put back.

Where it differs from TRL 1.12's `PPOTrainer`:

1. It takes `num_ppo_epochs × num_mini_batches` optimizer steps per rollout, as the options say (trl#5645).
2. The KL to the reference is in the loss by default, with its own coefficient, beside the clipped objective, the value
   loss and an entropy bonus. `kl_placement="reward"` is TRL 1.12's placement.
3. Every term is a mean over the tokens of the whole optimizer batch, so micro-batches and ranks do not change it.
4. Whitening and every logged metric are over all ranks and real tokens.
5. The score is the reward of the last real token of a response, unless a reward function or an environment pays
   before; the episode ends there.
6. A response ends at an end token unless told otherwise.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from .. import _trl
from ..masked import masked_mean, masked_moments
from ..models.adapter_copies import check_base_is_kept
from ..models.context import context_limit
from ..models.generation import generating_by
from ..models.loading import adapter_configs, check_known, known_tokens, text_config
from ..models.precision import below_autocast, compile_nothing
from ..models.probe import apart_in_float32
from ..models.sampling import sampling_what_counts, why_not_from_cache
from ..models.sharding import forget_gradients, is_fsdp, is_partitioned, is_stage3, leave_outputs, unsharded
from ..models.trainable import take_back
from ..packing.exactness import why_not_run
from ..runs.best_metric import check_metric_of_sets
from ..runs.card import Training, WritesCard
from ..runs.credit import CreditOffer
from ..runs.failures import in_spite_of_errors
from ..runs.final_line import LastLine, in_mode_of
from ..runs.profiler import Phases
from ..runs.requirements import make_folder, require_parts
from ..runs.steps_left import refuse_finished_checkpoints
from ..runs.trackio_run import name_run
from .ahead.beside import RewardsBeside, score_beside
from .ahead.rollouts import RolloutsAhead, check_ahead
from .card import ppo_training
from .checkpoint import find_checkpoint, known_length, load_run
from .coefficients import Coefficients
from .config import PPOConfigX, PPOLoopConfig
from .credit import credit_of_responses
from .data import (
    NO_IDS_TO_COLLATE,
    TokenisedPrompt,
    check_budgets,
    check_datasets,
    is_tokenised,
    with_tokenised_prompts,
)
from .display import batch_plan
from .evaluation import AnswersHeldOut, HeldOut, lengths_and_ends, of_sampling, samples_are_due
from .guards import (
    naming_the_actor,
    needing_less,
    refuse_clip,
    require_finite_gradient,
    require_finite_loss,
    require_finite_rewards,
    require_finite_scores,
    require_finite_terms,
    require_room,
    require_same_policy,
)
from .metrics import drop_unmeasured, mark_unmeasured
from .micro_batches import critic_loss, cut, draw_micro_batches, micro_batch_terms, reads_full_kl
from .optimizer import (
    StepsByRole,
    check_own,
    give_own_groups,
    give_own_schedule,
    has_own_groups,
    norms_by_role,
    stepping_now,
)
from .returns import estimate_returns, rollout_metrics, sequence_kl
from .rewards import weighted_scores, weighted_tokens
from .roles import critic as critic_module
from .roles.adapters import REFERENCE, copy_adapter
from .roles.forward import ActorCriticOutput, LogitsHead, without_router_logits
from .roles.inputs import Given, Model, check_given, check_ids, resolve
from .roles.join import (
    can_be_asked,
    check_learning,
    join_to_actor,
    place_reference,
    place_reward_models,
)
from .roles.load import Roles, load_roles, load_tokenizer, own_tokenizer
from .roles.offload import send_to_host
from .roles.reward_functions import checked, named_apart
from .roles.reward_models import TokenScorer, check_readable, model_of_text, token_scorer
from .roles.turn_rewards import TURN_REWARDS, turn_sources
from .rollout import MicroBatch, Rollout
from .run_state import CriticWarmup, EarlyStop, RunState
from .saving import SavesActorAndCritic
from .vllm import check_vllm, colocated_engines


logger = logging.get_logger(__name__)

PHASES = ("generate", "score", "learn")


class PPOTrainerX(WritesCard, AnswersHeldOut, SavesActorAndCritic, GRPOTrainer):
    """
    Trainer for Proximal Policy Optimization (PPO) with four models: actor, critic, frozen reward, frozen reference.

    Generation (transformers, vLLM, tools, environments), reward functions, PEFT, quantisation, distribution, logging
    of completions and the loop itself are inherited. Overridden, in the order in which data flows:
    `create_accelerator_and_postprocess`, `create_optimizer`, `create_scheduler`, `train`, `_get_train_sampler`,
    `_set_signature_columns_if_needed`, `_prepare_inputs` (one rollout, mini-batches redrawn every epoch),
    `_generate_and_score_completions`, `_tokenize_prompts`, `_generate`, `_calculate_rewards`,
    `_get_per_token_logps_and_entropies` (GRPO's seam for old log-probabilities), `training_step`, `_compute_loss`,
    `_clip_grad_norm`, `_get_grad_norm`, `log`; by `AnswersHeldOut`, `_get_dataloader` (a stream is read whole by every
    process), `get_eval_dataloader`, `get_test_dataloader`, `prediction_step`, `_evaluate` and `evaluation_loop`; by
    `SavesActorAndCritic`, `_save`, `_push_from_checkpoint`, `_save_rng_state`, `_load_from_checkpoint`,
    `_load_best_model`, `_maybe_log_save_evaluate`, `_save_checkpoint`, `_get_output_dir` and `_finalize_training`;
    and, by `WritesCard`, `save_model` and `create_model_card`.

    Args:
        args ([`PPOConfigX`], *optional*): configuration.
        processing_class: the actor's tokenizer; loaded from the model's path if not given.
        model (`str`, `PreTrainedModel` or `PeftModel`): the actor, any causal language model. The folder or hub name
            of an adapter goes on training that adapter, on its base.
        ref_model: the reference. Not given: a frozen copy of the actor; with `peft_config`, the actor with its adapter
            switched off; for a `PeftModel`, a frozen copy of its adapter.
        reward_model: a sequence classification model with one label. It reads token ids if it shares the actor's
            tokenizer, text if it has its own. Or, where the actor trains an adapter, the folder of an adapter with a
            score head, trained on the actor's base: it is loaded onto that base.
        train_dataset: prompts in a column `prompt` (text or conversation), or tokenised in `input_ids`.
        value_model: the critic. Not given: a copy of the reward model if that shares the actor's tokenizer, else a
            copy of the actor's trunk with a new head. With `critic="head"`, the folder of a value head on this
            actor's trunk; not given: a new one. With `critic="adapter"`, the folder of an adapter with a score head;
            not given: a copy of the reward adapter, else a copy of the actor's adapter with a new head.
        data_collator: collates tokenised prompts, as in TRL 1.12.
        eval_dataset: held-out prompts.
        optimizers, callbacks, peft_config: as in `transformers.Trainer` and `GRPOTrainer`.
        reward_funcs: reward functions, models or paths, as in `GRPOTrainer`; they follow `reward_model` in
            `reward_weights` and in the log. A function may pay at single tokens: see docs/ppo.md.
        reward_processing_classes: tokenizers of the reward sources, in that order.
        quantization_config, tools, rollout_func, environment_factory: as in `GRPOTrainer`; an environment with
            `get_turn_rewards` pays for each turn.

    Raises:
        ValueError: when models, data and options do not go together; if possible before weights are loaded.
        FloatingPointError: during training, for a reward, loss or gradient that is not finite.
    """

    aux_loss_enabled: bool  # GRPO's, of a mixture of experts

    _tag_names: ClassVar = ["trl", "ppo", "trl-ext"]
    _name = "PPO"
    _paper: ClassVar = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": (
            "@article{schulman2017proximal,\n"
            "    title   = {{Proximal Policy Optimization Algorithms}},\n"
            "    author  = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},\n"
            "    year    = 2017,\n"
            "    eprint  = {arXiv:1707.06347}\n"
            "}"
        ),
    }

    def __init__(
        self,
        args: PPOConfigX | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: Model | None = None,
        ref_model: Model | None = None,
        reward_model: Model | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        value_model: Model | None = None,
        data_collator: Callable | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        # less commonly used
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        quantization_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
    ):
        # 1. Check the arguments before anything is loaded
        sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        held_out = None if any(isinstance(each, list) for each in sets) else eval_dataset  # rows in a list will do
        require_parts(processing_class, peft_config, train_dataset, held_out)
        args, given = resolve(
            args,
            model=model,
            ref_model=ref_model,
            reward_model=reward_model,
            value_model=value_model,
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            environment_factory=environment_factory,
        )
        for earlier in (given.model, given.ref_model):
            take_back(earlier)
        find_checkpoint(args.resume_from_checkpoint, args, train_dataset)
        check_own(optimizers, args)
        check_given(args, given)
        takes_part = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        check_ahead(args.rollout_lag, train_dataset, args.dataloader_num_workers, **takes_part)
        check_metric_of_sets(args.metric_for_best_model, eval_dataset, example="reward/score")
        processing_class = own_tokenizer(processing_class, given, args)
        tokenizer = load_tokenizer(processing_class, given.model, args)
        pad_of_prompts = (tokenizer if processing_class is None else processing_class).pad_token_id
        adapters = adapter_configs(given.model, given.peft_config)
        actor_config = text_config(given.model, args)
        context = context_limit(actor_config, *adapters, generates=True)
        self._known = known_tokens(given.model, actor_config)
        check_ids(args, given, tokenizer)
        if environment_factory is None:  # an environment may make its prompts itself
            of_actor = (tokenizer, context, args, pad_of_prompts, self._known)
            reads_columns = given.has_other_reward or rollout_func is not None
            check_datasets(train_dataset, eval_dataset, data_collator, *of_actor, reads_columns=reads_columns)
        else:
            check_budgets(args)
        self._tool_mask: list[list[int]] | None = None  # of this rank's last responses
        environments, turn_rewards = turn_sources(environment_factory, lambda: self._tool_mask)
        refuse_clip(args.reward_clip, [source.__name__ for source in turn_rewards])
        if args.use_vllm:
            check_vllm(args, given.model, actor_config)
        make_folder(args.output_dir)
        name_run(args)

        # 2. Load the four models
        set_seed(args.seed)
        roles = load_roles(args, tokenizer, given)
        if environment_factory is None:
            check_readable(roles.reward_funcs, train_dataset, eval_dataset, args, tokenizer, pad_of_prompts)
        loop_args = PPOLoopConfig(args)
        loop_args.model_init_kwargs = None  # every model is loaded
        if loop_args.reward_weights is not None:  # which are those of the sources that were passed
            loop_args.reward_weights = [*loop_args.reward_weights, *[1.0] * len(turn_rewards)]
        with colocated_engines(args, roles.actor):
            super().__init__(
                model=roles.actor,
                reward_funcs=[*(model_of_text(source) or source for source in roles.reward_funcs), *turn_rewards],
                args=loop_args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                reward_processing_classes=[
                    scorer and scorer.form.tokenizer
                    for scorer in map(token_scorer, [*roles.reward_funcs, *turn_rewards])
                ],
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=given.peft_config if given.has_new_adapter else None,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environments,
            )
        self.num_generations_eval = 1  # GRPO would need whole groups in every batch
        self.prompt_collator, self._pad_of_prompts = data_collator, pad_of_prompts
        self._set_up_rewards(roles.reward_funcs)
        self._set_up_sampling()
        self._set_up_models(roles, given)

        # 3. Set up what one call hands to the next, and the state of a run
        self._scores: Tensor | None = None  # of this rank's last batch, one per response
        self._paid: Tensor | None = None  # of the same, one per token, if a source pays at tokens
        self._logps_of_correction: Tensor | None = None  # of the same, if GRPO's correction reads them
        self._scored_beside: Rollout | None = None  # the same as critic and reference have scored it
        self._responses: dict[str, Tensor] = {}  # of the same, the columns of `held_out_responses`
        self._leaves_out = False  # nothing is learned in this micro-batch
        self._steps_by_role = StepsByRole()
        self._steps_alone = 0  # that the critic has taken on this mini-batch
        self._ahead = RolloutsAhead(self) if args.rollout_lag else None
        self.phases = Phases(self.accelerator.device, counts_memory=self.args.skip_memory_metrics)
        self.add_callback(self.phases)
        self.add_callback(LastLine())
        self.add_callback(CreditOffer(self))
        refuse_finished_checkpoints(self)
        self._start_run()

    # ---- Set-up ----

    def _start_run(self) -> None:
        """Set everything that a run changes to its state before the first rollout."""
        self._step = 0
        self._has_left_step = False  # a signal has ended the rollout after a step
        self._last_loaded_step = -1  # vLLM has the weights of another run
        if self._ahead is not None:
            self._ahead.forget()
        self.run_state = RunState(
            Coefficients(self.args, aux=self.router_aux_loss_coef),
            HeldOut(self.args.num_generations_eval),
            EarlyStop(self.args.target_kl),
            CriticWarmup(self.args.critic_warmup_steps, self.args.critic_warmup_until),
        )
        for mode in ("train", "eval"):  # an interrupted run may have left some
            self._metrics[mode].clear()
        for shown in (*self._logs.values(), self._pending_metrics, self._pending_extra_logs):
            shown.clear()
        self.phases.forget()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        leave_outputs(self.accelerator)
        compile_nothing(self.accelerator, "every forward pass asks for other outputs, of rows of another length")

    def _set_up_rewards(self, sources: list[Any]) -> None:
        """Name every reward source, set up the reward models that read text, and check environments' rewards."""
        if self.environment_factories is not None:  # every public method of an environment is a tool to GRPO
            for tools in (self.tools, *self._env_tools.values()):
                tools[:] = [tool for tool in tools if _trl.get_callable_name(tool) != TURN_REWARDS]
        self.reward_func_names[:] = named_apart([name or "reward_model" for name in self.reward_func_names])
        self._text_scorers: dict[int, TokenScorer] = {}
        for i, scorer in enumerate(map(token_scorer, sources)):
            if scorer is None:
                continue
            scorer.form.tools = self._env_tools if self._multi_environment else {None: self.tools}
            if not scorer.form.shares_ids:
                scorer.model = self.reward_funcs[i]  # on its device, as GRPO has put it there
                self._text_scorers[id(scorer.model)] = scorer
        for i in range(len(sources), len(self.reward_funcs)):
            self.reward_funcs[i] = checked(self.reward_funcs[i], self.reward_func_names[i])
        for source, name in zip(self.reward_funcs, self.reward_func_names, strict=True):
            if not isinstance(source, nn.Module):
                source.__name__ = name

    def _set_up_sampling(self) -> None:
        """Set the tokens that end a response: the option's, else those that model and tokenizer declare."""
        if self.args.stop_token_id is not None:
            self.eos_token_ids = [self.args.stop_token_id]
        elif self.args.stop_token is not None:
            self.eos_token_ids = [self._tokenizer.eos_token_id]
        ids = self.eos_token_ids
        if self.use_vllm:
            stops = {"stop_token_ids": list(ids), "ignore_eos": True}  # vLLM would add those of the model's folder
            self.vllm_generation.generation_kwargs = {**(self.vllm_generation.generation_kwargs or {}), **stops}
        else:
            self.generation_kwargs["eos_token_id"] = ids
            self.generation_config.eos_token_id = ids

    def _set_up_models(self, roles: Roles, given: Given) -> None:
        """Join critic and reward adapter to the actor; freeze and place reference and reward models."""
        args = self.args
        others = (given.ref_model, args.ref_adapter_name, args.ref_model_quantization)
        self._reference_is_start = args.needs_reference and all(other is None for other in others)
        copies_start = self._reference_is_start and not given.has_new_adapter
        if args.model_adapter_name is not None:
            self.model.set_adapter(args.model_adapter_name)
        self._ref_adapter = args.ref_adapter_name
        if copies_start and is_peft_model(self.model):  # the reference is the adapter that training starts from
            self._ref_adapter = REFERENCE
            copy_adapter(self.model, self.model.active_adapter, REFERENCE)
        if args.needs_reference and roles.reference is None:
            check_base_is_kept(self.model)
        self.critic: Any = roles.critic
        micro_batch = args.micro_batch_size // args.world_size
        if args.packing and micro_batch < args.num_generations:  # with a budget it is the whole mini-batch
            logger.warning(
                "A micro-batch has %d of the %d responses to a prompt, which is read anew for each of them. Raise "
                "`per_device_train_batch_size`, or set `micro_batch_tokens`.",
                *(micro_batch, args.num_generations),
            )
        reason = why_not_run(args, self.model) if args.packing else None
        if reason is not None:
            logger.warning("Rows are padded for the actor, not packed: %s.", reason)
        self._attached, forward = join_to_actor(self.model, roles, args, packs=args.packing and reason is None)
        self._ref_logits: LogitsHead = forward.head.logits
        self._packings = [forward.packing, self.critic.packing]  # of all models that read the rollout
        self._trunk_of_samples = None
        if can_be_asked(self.model, args):
            forward.head.settle()
            if self.aux_loss_enabled:
                self.aux_loss_enabled = forward.head.settle_aux_loss(args.router_aux_loss_coef)
                forward.asked = {"output_router_logits": True} if self.aux_loss_enabled else {}
            forward.settle(self.accelerator.autocast)
            # Under ZeRO-3 every process has to call the model equally often.
            elsewhere = args.use_vllm or args.use_transformers_continuous_batching or is_stage3(args.deepspeed_plugin)
            if args.packing and not (elsewhere or args.cache_implementation or args.generation_kwargs):
                reason = why_not_from_cache(forward.head.trunk)
                self._trunk_of_samples = forward.head.trunk if reason is None else None
                if reason is not None:
                    logger.info("Responses that have ended stay in the batch while the actor samples: %s.", reason)
        self.add_callback(
            check_learning(
                self.model,
                self.critic,
                args,
                self.optimizer,
                has_master_weights=self.is_deepspeed_enabled,
                warms_up=lambda: self._warms_up,
            )
        )
        if self.use_vllm:
            _trl.exclude_from_weight_sync(self.vllm_generation, *self._attached)
        if roles.reference is not None:
            self.ref_model, of_reference = place_reference(roles.reference, args, self.accelerator)
            self._ref_logits = of_reference.head.logits
            self._packings.append(of_reference.packing)
        place_reward_models(self.reward_funcs, roles.reward_adapter, self._ask_reward_adapter, self.accelerator)
        scorers = [*map(token_scorer, self.reward_funcs), *self._text_scorers.values()]
        for scorer in filter(None, scorers):
            with below_autocast(extract_model_from_parallel(scorer.model), self.accelerator):
                if not is_fsdp(args.fsdp):  # FSDP has partitioned its weights
                    scorer.try_padding()
                if args.packing:
                    scorer.pack(args.shares_prompts, self.accelerator.autocast, by_fsdp=is_fsdp(args.fsdp))
        self._reference_weights, self._reward_weights = send_to_host(
            args, self.model, self.ref_model, self.reward_funcs, self.accelerator
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create one optimizer for actor and critic, whose parameter groups have the critic's own options."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and has_own_groups(self.args):
            decayed = self.get_decay_parameter_names(self.model)
            parameters = [p for name, p in self.model.named_parameters() if name in decayed]
            give_own_groups(optimizer, self.critic, self.args, parameters)
            if self.is_deepspeed_enabled:
                self.add_callback(self._steps_by_role)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.critic_lr_scheduler_type is not None:
            give_own_schedule(scheduler, self.args, num_training_steps)
        return scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Train; resume from a checkpoint if given: its folder, or `True` for the last one in `output_dir`. Models, data
        and options must be those that the run began with. A checkpoint does not hold the state of a reward function or
        an environment, nor vLLM's random numbers.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args, self.train_dataset)
        self._start_run()
        evaluates_first = self.args.eval_on_start
        if checkpoint is not None:
            load_run(self, checkpoint)
            self.args.eval_on_start = False  # the run has begun before
        self.accelerator.print(batch_plan(self.args, known_length(self.train_dataset)))
        try:
            with tempfile.TemporaryDirectory() as self._step_end:
                output = super().train(None if checkpoint is None else str(checkpoint), **kwargs)
            if self._warms_up:
                logger.warning(
                    "Only the critic has learned: the run ended before its warm-up (`critic_warmup_steps`, "
                    "`critic_warmup_until`). Train for longer, raise `critic_learning_rate`, or lower them."
                )
            return output._replace(training_loss=output.metrics["train_loss"])
        finally:
            self.args.eval_on_start = evaluates_first

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self.run_state.passes_over_data):
            next(iter(sampler), None)  # draws the order of a pass over the data
        return sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            name for name in ("input_ids", "attention_mask") if name not in self._signature_columns
        ]

    # ---- 1. Collect a rollout ----

    def _prepare_inputs(self, rows: list[dict[str, Any]] | MicroBatch) -> Any:
        """
        Return the micro-batches of a step, a micro-batch as it is, or the rollout of an evaluation. A rollout serves
        `num_ppo_epochs` passes; every pass draws its mini-batches anew.
        """
        if isinstance(rows, MicroBatch):
            return rows
        if not self.model.training:
            return self._collect_held_out(rows)
        if self._ahead is not None:
            self._ahead.start()
        run, step_of_pass = self.run_state, self._step % self.args.steps_per_generation
        if not self.is_amid_rollout:
            run.rollout, run.packs = self._collect_rollout(rows), None
        self.phases.enter("learn")
        if step_of_pass == 0:
            over_ranks = (self._sum_over_ranks, self._max_over_ranks, self.accelerator.num_processes)
            if run.packs is None:  # models that are partitioned are tried out as they score, which this run may not do
                run.packs = self._packs(run.rollout)
            run.micro_batches = draw_micro_batches(run.rollout, self.args, *over_ranks, packs=run.packs)
        return run.micro_batches[step_of_pass]

    @property
    def is_amid_rollout(self) -> bool:
        """Return whether the next micro-batch is of a rollout that has been learned from before."""
        return self._step % self.batches_of_rollout != 0

    @property
    def batches_of_rollout(self) -> int:
        """Return in how many micro-batches a rollout is learned from, over all passes."""
        return self.args.steps_per_generation * self.num_iterations

    def _collect_rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        # 1. Move the KL coefficients by the last rollout
        self.stop_between_phases()
        run = self.run_state
        run.coefficients.close_rollout()
        if self.eval_dataset is not None and samples_are_due(self.args, self.state.global_step, self.state.max_steps):
            self.generate_completions(sampling=True)
        with self.phases.during("score"):
            # 2. Generate responses and score them
            with self.leaving_failed_step():
                rollout = self._generate_and_score_completions(rows)
            require_room(rollout, self.args, self._tokenizer)
            self.stop_between_phases()
            # 3. Score them with critic and reference
            if rollout.old_values is None:  # else that was done while reward functions were asked
                self._score_with_models(rollout)
                self.stop_between_phases()
            self._check_reference(rollout)
            # 4. Estimate per-token rewards, advantages and returns
            total, of_critic = estimate_returns(
                rollout, self.args, run.coefficients.now.kl, run.reward_moments, self._sum_over_ranks
            )
            run.warmup.saw(of_critic["value/explained_variance_mc"])
            if self.args.critic_warmup_until is not None:
                of_critic["value/warmup"] = float(self._warms_up)
            self._log_rollout(rollout, total, of_critic)
            if rollout.old_logps is not None:
                self._measure_kl(rollout)
        run.early_stop.stopped = False
        self._log_speed(rollout)
        return rollout

    def with_prompts(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows with their prompts in the column `prompt`."""
        if is_tokenised(rows[0]):
            return with_tokenised_prompts(rows, self._tokenizer, self.prompt_collator, self._pad_of_prompts)
        if self.prompt_collator is not None:
            raise ValueError(NO_IDS_TO_COLLATE.format(name="the stream", columns=list(rows[0])))
        return rows

    def _generate_and_score_completions(self, rows: list[dict[str, Any]]) -> Rollout:
        rows = self.with_prompts(rows)
        batch = super()._generate_and_score_completions(rows)
        # GRPO's statistics over groups of one mean nothing.
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)
        mark_unmeasured(metrics, self._has_sampling_logps(batch))
        self._responses |= of_sampling(batch)
        rollout = Rollout.from_grpo(batch, self._scores, self.eos_token_ids, self._paid)
        if self.args.policy_objective == "mask" and self.use_vllm:
            rollout.sampling_logps = batch["sampling_per_token_logps"]
            if not self.args.reads_old_policy:
                rollout.old_logps = rollout.sampling_logps
        scored, self._scored_beside = self._scored_beside, None
        if scored is not None and self.model.training:  # an error may have left one to an evaluation
            rollout.take_scores(scored)
        return rollout

    def _has_sampling_logps(self, batch: dict[str, Any]) -> bool:
        """Return whether vLLM gave the log-probability of some token that counts, on any rank."""
        if "importance_sampling_ratio" not in batch:
            return False
        counts = batch["completion_mask"].bool() & batch.get("tool_mask", batch["completion_mask"]).bool()
        known = counts & ~batch["sampling_per_token_logps"].isnan()
        return self._sum_over_ranks(known.sum().float()).item() > 0

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if isinstance(prompts[0], TokenisedPrompt):
            tokenised: Any = [prompt.input_ids for prompt in prompts], None, {}
        else:
            tokenised = super()._tokenize_prompts(prompts)
        check_known(chain.from_iterable(tokenised[0]), self._known, self._tokenizer, "The actor", "a prompt")
        return tokenised

    def _generate(self, prompts: list[Any]) -> tuple:
        if self.environment_factories is not None and self.tools:
            for tools in (*self._sync_tool_dicts, *self._async_tool_dicts):
                tools.pop(TURN_REWARDS, None)
        phase = self.phases.during("generate") if self.model.training else nullcontext()
        with (
            phase,
            without_router_logits(self.model),
            self._weights_for_generation(),
            self._own_distribution(),
            self._only_what_counts(),
            naming_the_actor(self.state.global_step),
        ):
            generate = partial(super()._generate, prompts)
            is_asked_ahead = self._ahead is not None and self.model.training
            generated = self._ahead.take(generate) if is_asked_ahead else generate()
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *rest = generated
        if self.model.training:
            self.stop_between_phases()
        self._tool_mask = tool_mask
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self._responses = lengths_and_ends(completion_ids, tool_mask, ends, self.accelerator.device)
        # Extra fields are passed to the reward functions; a model that shares the tokenizer reads the ids.
        extra_fields = {**extra_fields, "prompt_ids": prompt_ids}
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *rest

    def _own_distribution(self) -> AbstractContextManager[None]:
        """Sample from the distribution that is scored, whatever options came with the actor; vLLM gets every one."""
        if self.use_vllm:
            return nullcontext()
        return generating_by(self.accelerator.unwrap_model(self.model), self.generation_config)

    def _only_what_counts(self) -> AbstractContextManager[None]:
        """Read a prompt once, and drop responses that have ended, where that gives the same samples."""
        if self._trunk_of_samples is None:
            return nullcontext()
        actor = self.accelerator.unwrap_model(self.model)
        return sampling_what_counts(actor, self._trunk_of_samples, self.generation_config, self.accelerator.autocast)

    def _weights_for_generation(self) -> AbstractContextManager[None]:
        """Gather the actor's weights, once per rollout, under FSDP, and ZeRO-3 with `ds3_gather_for_generation`."""
        by_transformers = not self.use_vllm and self.rollout_func is None
        if by_transformers and self.is_fsdp_enabled:
            return unsharded(self.model, self.accelerator, *self._attached)
        if not (by_transformers and is_stage3(self.args.deepspeed_plugin) and self.args.ds3_gather_for_generation):
            return nullcontext()
        return _trl.gathered_for_generation(
            self.model_wrapped,
            self.accelerator,
            critic_module.generating_parameters(self.model, *self._attached),
            self.args.gradient_checkpointing_kwargs,
        )

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        """Return GRPO's rewards (all samples, sources); keep this rank's weighted sums, NaN if no source applies."""
        sources = list(self.reward_funcs)
        is_model = [isinstance(source, nn.Module) or token_scorer(source) is not None for source in sources]
        functions = {i: source for i, source in enumerate(sources) if not is_model[i]}
        calculate = partial(super()._calculate_rewards, inputs, prompts, completions, completion_ids_list)
        asked = [self._text_scorers.get(id(source), source) for source in sources]
        beside = None
        try:
            if functions and self._ahead is not None and self.model.training:
                beside = RewardsBeside(functions, getattr(self, "async_loop", None))
                beside.ask(self.reward_funcs, calculate)
                prompt_ids = [row["prompt_ids"] for row in inputs]
                self._scored_beside = score_beside(self, prompt_ids, completion_ids_list)
                asked = beside.answering(asked)
            self.reward_funcs[:] = asked
            with self.phases.part("score: reward"), self._reward_weights.on_device():
                rewards = calculate()
            if beside is not None:
                beside.log()
        finally:
            self.reward_funcs[:] = sources
            if beside is not None:
                beside.cancel()
        if beside is not None and self.accelerator.is_main_process:
            self._metrics["train"]["time/reward_wait"].append(beside.waited)
        start = self.accelerator.process_index * len(prompts)
        samples = list(zip(prompts, completions, strict=True))
        require_finite_rewards(rewards, is_model, self.reward_func_names, samples, start, self.state.global_step)
        own = slice(start, start + len(prompts))
        self._scores = weighted_scores(rewards, self.reward_weights)[own]
        self._paid = self._pay_tokens(rewards[own], completion_ids_list)
        for name, column in zip(self.reward_func_names, rewards.unbind(1), strict=True):
            self._responses[f"rewards/{name}"] = column[own]
        return rewards

    def _pay_tokens(self, rewards: Tensor, completion_ids: list[Any]) -> Tensor | None:
        """Return this rank's rewards by token, `None` if every source gave scores alone."""
        said = {i: getattr(source, "token_rewards", []) for i, source in enumerate(self.reward_funcs)}
        by_token = {i: responses for i, responses in said.items() if any(each is not None for each in responses)}
        if not by_token:
            return None
        refuse_clip(self.args.reward_clip, [self.reward_func_names[i] for i in by_token])
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=rewards.device)
        return weighted_tokens(rewards, by_token, lengths, self.reward_weights)

    def _ask_reward_adapter(self, **inputs: Tensor) -> Tensor:
        """Return scores (b,) through the actor's forward, as the adapter's base is in the actor's engine."""
        with self.accelerator.autocast():
            return self.model(**inputs, ppo_outputs=("scores",)).scores

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple[Tensor | None, None, None]:
        """
        Return log-probabilities before learning, if GRPO's correction for vLLM's probabilities reads them. Everything
        else is scored in `_score_with_models`, once and only if it is read.
        """
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return None, None, None
        ids, attended = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        rollout = Rollout.from_ids(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep], ids, attended)
        self._logps_of_correction = self._read(model, rollout, ("log_probs",)).log_probs
        return self._logps_of_correction, None, None

    # ---- 2. Score it ----

    @torch.no_grad()
    def _score_with_models(self, rollout: Rollout) -> None:
        """Fill in what is read before learning: state values, reference and, if needed, old log-probabilities."""
        outputs: tuple[str, ...] = ("state_values",) if self.model.training else ()
        if rollout.old_logps is None and self._reads_old_logps_early:
            outputs = ("log_probs", *outputs)
        with (
            self.phases.part("score: critic"),
            _trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            read = self._read(self.model, rollout, outputs)
        rollout.old_values = read.state_values
        if "log_probs" in outputs:
            rollout.old_logps = read.log_probs
        if self.args.needs_reference:
            outputs = ("log_probs", "trunk_states") if self.args.kl_estimator == "full" else ("log_probs",)
            with (
                self.phases.part("score: reference"),
                self._reference_weights.on_device(),
                self._reference() as reference,
            ):
                read = self._read(reference, rollout, outputs)
            rollout.ref_logps, rollout.ref_states = read.log_probs, read.trunk_states
        require_finite_scores(rollout, self.state.global_step)

    def _check_reference(self, rollout: Rollout) -> None:
        """Check before the first step that a reference made from the actor equals it."""
        if not self._reference_is_start:
            return
        self._reference_is_start = False
        first = torch.arange(len(rollout), device=rollout.mask.device)[: self.args.per_device_train_batch_size]
        part = rollout.select(first)
        with torch.no_grad(), _trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps = self._read(self.model, part, ("log_probs",)).log_probs
        exact = logps.dtype == torch.float32 and not self.args.bf16 and not self.args.fp16
        tolerance = 1e-3 if exact or self._differs_in_float32() else 0.1
        require_same_policy(logps, part.ref_logps, part.mask, tolerance, getattr(self.model, "peft_config", None))

    def _differs_in_float32(self) -> bool:
        """Return whether actor and reference differ in float32, without the rounding of the run."""
        actor = self.accelerator.unwrap_model(self.model)
        if is_fsdp(self.args.fsdp) or is_partitioned(actor):
            return False
        if self.ref_model is None:
            return bool(apart_in_float32(actor, actor, lambda: _trl.use_adapter(actor, self._ref_adapter)))
        with self._reference_weights.on_device():
            return bool(apart_in_float32(actor, self.accelerator.unwrap_model(self.ref_model)))

    @property
    def _reads_old_logps_early(self) -> bool:
        """
        Return whether old log-probabilities are read before the first learning pass gives them: by the KL in the
        reward, or by a second mini-batch, whose policy the first one's optimizer step has changed.
        """
        in_reward = self.args.needs_reference and self.args.kl_placement == "reward"
        return in_reward or self.args.num_mini_batches > 1 or not self.model.training

    def _forward(self, model: nn.Module, part: Rollout, outputs: tuple[str, ...], **kwargs: Any) -> ActorCriticOutput:
        """Return the outputs at the response tokens, (b, T) each."""
        if not outputs:
            return ActorCriticOutput()
        with self.accelerator.autocast():
            output = model(**part.model_inputs(), groups=part.groups(), ppo_outputs=outputs, **kwargs)
        return output.at_last(part.response_ids.size(1))

    def _read(self, model: nn.Module, rollout: Rollout, outputs: tuple[str, ...]) -> ActorCriticOutput:
        """Return the outputs at the response tokens of a whole rollout, (B, T) each, read part by part."""
        whole = ActorCriticOutput()
        rows = torch.arange(len(rollout), device=rollout.mask.device)
        n = self.num_generations if self.model.training else self.args.num_generations_eval
        size = self.args.local_rollout_forward_batch_size
        sizes = (size // n * n or size, self.args.score_batch_tokens)  # the responses to a prompt together
        layout = (self._packs(rollout), self.args.shares_prompts)
        parts, spare = cut(rollout, rows, *sizes, *layout, self._max_over_ranks)
        for part in (*parts, *spare):
            of_part = self._forward(model, rollout.select(part), outputs)
            for name in outputs:
                if getattr(whole, name) is None:
                    setattr(whole, name, of_part[name].new_empty(len(rollout), *of_part[name].shape[1:]))
                getattr(whole, name)[part] = of_part[name]
        return whole

    def _packs(self, rollout: Rollout) -> bool:
        """Return whether every model reads the sequences in rows without padding."""
        prompts, answers = rollout.lengths()
        longest = int((prompts + answers).max())
        return all(packing.fits(longest) for packing in self._packings if packing is not None)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """Within the context, the yielded model is the reference: a model of its own, or the actor's adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        actor = self.accelerator.unwrap_model(self.model)
        with (
            _trl.use_adapter(actor, adapter_name=self._ref_adapter),
            _trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield self.model

    # ---- 3. Log it ----

    def _log_rollout(self, rollout: Rollout, total: Tensor, of_critic: dict[str, float]) -> None:
        metrics = rollout_metrics(rollout, total, self._sum_over_ranks, self.num_generations)
        for name, value in (metrics | of_critic).items():
            self._metrics["train"][name].append(value)
        # GRPO's table of completions shows an advantage per response: the mean over its tokens.
        per_response = masked_mean(rollout.advantages, rollout.mask, dim=1)
        per_response = per_response.masked_fill(~rollout.mask.any(dim=1), torch.nan)
        shown = self.accelerator.gather(per_response).tolist()
        for _ in shown:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(shown)

    def _measure_kl(self, rollout: Rollout) -> None:
        """Log KL(π_old ‖ π_ref) of the rollout over all ranks, nats per sequence: k1 summed over each response."""
        if not self.args.needs_reference:
            return
        per_sequence = sequence_kl(rollout.old_logps, rollout.ref_logps, rollout.mask)
        count, kl, _ = masked_moments(per_sequence.nan_to_num(), ~per_sequence.isnan(), self._sum_over_ranks)
        if count > 0:
            self._metrics["train"]["kl/ref"].append(kl.item())
            self.run_state.coefficients.saw_kl(kl.item())

    # ---- 4. Learn ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._leaves_out = self.run_state.early_stop.stopped and self.is_amid_rollout
        if not self._leaves_out:
            # The beginning of the Trainer's step, since the micro-batch is needed here; it counts into `step_time`.
            start = time.perf_counter()
            model.train()
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()
            *first, last = self._prepare_inputs(inputs)
            self._leaves_out = last.num_tokens == 0  # of the whole optimizer batch, so every rank decides alike
            if not self._leaves_out:
                self._step_critic(model)
                self._accumulate(model, first)
            self._current_train_step_time += time.perf_counter() - start
        if self._leaves_out:
            return self._leave_out()
        with self._only_critic_steps() if self._warms_up else nullcontext():
            loss = super().training_step(model, last, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._close_optimizer_step()
        return loss

    def _accumulate(self, model: nn.Module, micro_batches: list[MicroBatch]) -> None:
        """Add up the gradients of all micro-batches of a step but the last, which every rank then waits for."""
        state = self.accelerator.gradient_state
        # DeepSpeed has a boundary of its own, which follows `sync_gradients`.
        exchanges = self.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        for micro_batch in micro_batches:
            state._set_sync_gradients(False)
            with nullcontext() if exchanges else self.accelerator.no_sync(model):
                Trainer.training_step(self, model, micro_batch)
            state._set_sync_gradients(True)

    def _step_critic(self, model: nn.Module) -> None:
        """At the beginning of a mini-batch, take the steps in which the critic learns alone."""
        of_mini_batch, first = self.args.gradient_accumulation_steps, self._step % self.args.steps_per_generation
        if self.args.critic_steps == 1 or first % of_mini_batch:
            return
        alone = [
            replace(each, critic_alone=True)
            for each in chain.from_iterable(self.run_state.micro_batches[first : first + of_mini_batch])
        ]
        if self.critic.needs_states:  # which these steps do not change
            for each in alone:
                each.scored_states = self._states_of(model, each.sequences())
        of_critic = {id(parameter) for parameter in self.critic.parameters()}
        for taken in range(int(self.args.critic_steps) - 1):
            self._steps_alone = taken
            if is_stage3(self.args.deepspeed_plugin):
                forget_gradients(parameter for parameter in self.model.parameters() if id(parameter) not in of_critic)
            with self._only_critic_steps(), stepping_now(self.accelerator, model):
                self._accumulate(model, alone[:-1])
                Trainer.training_step(self, model, alone[-1])
                if not self.is_deepspeed_enabled:  # which has stepped
                    with self.phases.part("learn: optimizer step"):
                        self._step_with_critics_gradient()
                self.optimizer.zero_grad()
        self._steps_alone += 1
        self._steps_by_role.forget_norms()

    def _step_with_critics_gradient(self) -> None:
        largest = self.args.critic_max_grad_norm or self.args.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.critic.parameters(), largest)
        if not self.args.fp16:
            parameters, step = self.critic.named_parameters(), self.state.global_step
            require_finite_gradient(norm, parameters, step, steps_alone=self._steps_alone)
        self.optimizer.step()

    def _only_critic_steps(self) -> AbstractContextManager[None]:
        """Leave the actor alone where it would step with zeros, as in ZeRO; elsewhere it has no gradients."""
        return self._steps_by_role.critic_alone() if self.is_deepspeed_enabled else nullcontext()

    @torch.no_grad()
    def _states_of(self, model: nn.Module, part: Rollout) -> Tensor:
        with _trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._forward(model, part, ("scored_states",)).scored_states

    def _leave_out(self) -> Tensor:
        """
        Skip a micro-batch. Without gradients, weights and the optimizer's moments stay the same; zero gradients would
        still move both.
        """
        self._step += 1
        self.run_state.early_stop.left_out_steps += self.accelerator.sync_gradients
        if self.args.fp16:  # the loss scaler would need gradients
            self.accelerator.gradient_state._set_sync_gradients(False)
        return torch.zeros((), device=self.accelerator.device)

    def _compute_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        rollout, step = inputs.sequences(), self.state.global_step
        if inputs.critic_alone:
            return self._critic_loss(model, rollout, inputs)
        # 1. Run actor and critic in one forward pass
        outputs: tuple[str, ...] = ("log_probs", "entropy", "state_values")
        kwargs: dict[str, Any] = {"train_actor": not self._warms_up}
        if reads_full_kl(self.args):
            outputs = (*outputs, "ref_kl")
            kwargs |= {"ref_states": rollout.ref_states, "ref_head": self._ref_logits}
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        output = self._forward(model, rollout, outputs, **kwargs)
        # 2. Compute the terms of the loss
        terms = micro_batch_terms(output, rollout, inputs, self.args, self.run_state.coefficients.now)
        read = {"log_probs": output.log_probs, "values": output.state_values}
        require_finite_terms(terms, read, rollout, step, self._steps_alone)
        self.run_state.ledger.add(terms)
        # Gradients are averaged over ranks, but the terms are shares of a sum.
        return terms.total * self.accelerator.num_processes

    def _critic_loss(self, model: nn.Module, rollout: Rollout, inputs: MicroBatch) -> Tensor:
        kwargs: dict[str, Any] = {"train_actor": False}
        if inputs.scored_states is not None:
            kwargs["scored_states"] = inputs.scored_states
        values = self._forward(model, rollout, ("state_values",), **kwargs).state_values
        loss = critic_loss(values, rollout, inputs, self.args)
        step = self.state.global_step
        require_finite_loss(loss, {"value_loss": loss}, {"values": values}, rollout, step, self._steps_alone)
        return loss * self.accelerator.num_processes

    def _close_optimizer_step(self) -> None:
        run = self.run_state
        step = run.ledger.close_step(run.coefficients.now, self._sum_over_ranks, self._max_over_ranks)
        run.coefficients.saw_old_kl(step["old_kl"])
        if run.rollout.old_logps is None:
            run.rollout.old_logps = run.rollout.first_logps
            self._measure_kl(run.rollout)
        if self._warms_up:
            self._drop_actor_gradients()
        if not self.is_deepspeed_enabled:  # which keeps gradients elsewhere
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            run.ledger.add_norms(norms_by_role(self.model, self.critic, scale))
        run.early_stop.saw(step["old_kl"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._leaves_out:
            return None
        if self.args.critic_max_grad_norm is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        of_critic = list(self.critic.parameters())
        others = {id(parameter) for parameter in of_critic}
        of_actor = [parameter for parameter in self.model.parameters() if id(parameter) not in others]
        largest = (self.args.max_grad_norm, self.args.critic_max_grad_norm)
        clipped = zip((of_actor, of_critic), largest, strict=True)
        norms = [nn.utils.clip_grad_norm_(parameters, norm) for parameters, norm in clipped]
        return torch.stack([norm.to(self.accelerator.device) for norm in norms]).norm()  # of nothing it is on the CPU

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._leaves_out:  # DeepSpeed would repeat the last one
            return None
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.is_deepspeed_enabled:
            device = self.accelerator.device
            self.run_state.ledger.add_norms(self._steps_by_role.pop_norms(grad_norm, self._sum_over_ranks, device))
        if not self.args.fp16:  # loss scaling expects overflows
            parameters, applied = self.model.named_parameters(), self.is_deepspeed_enabled
            require_finite_gradient(grad_norm, parameters, self.state.global_step, applied, self._steps_alone)
        return grad_norm

    @property
    def _warms_up(self) -> bool:
        """Return whether only the critic learns in this optimizer step."""
        return self.run_state.warmup.holds(self.state.global_step)

    def _drop_actor_gradients(self) -> None:
        """Set the actor's gradients to `None`, which leaves its parameters alone; zeros would still decay them."""
        of_critic = {id(parameter) for parameter in self.critic.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in of_critic:
                parameter.grad = None

    # ---- Log ----

    def _needing_less(self, phase: str | None) -> str:
        return needing_less(phase, self.args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        run = self.run_state
        if "train_loss" in logs and run.ledger.mean_loss is not None:
            # The Trainer's starts at a checkpoint, and counts steps that were skipped.
            logs["train_loss"] = run.ledger.mean_loss
        with in_mode_of(logs, self.model):
            if "loss" in logs:
                # The Trainer's mean counts steps that an early stop has skipped.
                del logs["loss"]
                logs |= run.ledger.pop_window() | run.early_stop.pop_log()
                logs.update(self.phases.pop_memory(self.accelerator.gather, *PHASES))
            elif not self.model.training:
                logs.update(self.phases.pop_memory(self.accelerator.gather, "evaluate"))
            drop_unmeasured(self._metrics["train" if self.model.training else "eval"])
            with self._in_spite_of_completions():
                super().log(logs, start_time)

    @contextmanager
    def _in_spite_of_completions(self) -> Iterator[None]:
        """Within the context, completions that cannot be written down, with `log_completions`, are a warning."""
        if not self.log_completions:
            yield
            return
        path = Path(self.args.output_dir) / "completions" / f"completions_{self.state.global_step:05d}.parquet"
        with in_spite_of_errors(str(path), OSError):
            try:
                yield
            except OSError:
                with suppress(OSError):
                    path.unlink(missing_ok=True)  # half written
                raise

    def credit(self, most: int) -> list[dict[str, Any]]:
        """Return the tokens of this rank's first responses with their credit; none before the first rollout."""
        rollout = self.run_state.rollout
        return [] if rollout is None else credit_of_responses(rollout, self._tokenizer, most)

    def _log_speed(self, rollout: Rollout) -> None:
        """Log the seconds of this rollout's phases, and of learning from the rollout before."""
        metrics, seconds = self._metrics["train"], self.phases.pop_seconds()
        spent = {phase: sum(seconds[phase]) for phase in PHASES if phase in seconds}
        for phase, of_phase in spent.items():
            metrics[f"time/{phase}"].append(of_phase)
        if "learn" in spent:
            tokens = self._sum_over_ranks(rollout.attended.sum().float()).item()
            metrics["tokens_per_second"].append(tokens / sum(spent.values()))

    def describe(self) -> Training:
        return ppo_training(self)

    # ---- Over all ranks ----

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _max_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.gather(tensor).max()
