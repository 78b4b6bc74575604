"""Checks of PPO options that do not go together, by topic; the range of each option is beside it in `options.py`."""

import inspect
from typing import Any

from ..models.sharding import is_fsdp
from ..ranges import default_of, require
from .advantages import find_estimator
from .options import LAM, LOSS_KL_ESTIMATORS, REWARD_KL_ESTIMATORS, CriticOptions


# The metric of the best checkpoint, unless another is named.
BEST_METRIC = "eval_reward/score"

# Options of GRPO that mean nothing in PPO, and what to do instead.
_LOSS = "leave it out: PPO has one loss, whose form is `policy_objective`, clip or mask"
_REWARDS = "leave it out: PPO does not scale rewards by group, but with `normalize_rewards` or `whiten_rewards`"
_FROZEN = "leave it out: the reference model of PPO is frozen"
_ENTROPY = "set `ent_coef` instead, the fixed coefficient of PPO's entropy bonus"
_ROLLOUT = (
    "set `gradient_accumulation_steps` instead: a rollout is `per_device_train_batch_size` × "
    "`gradient_accumulation_steps` × the number of processes"
)
MEANINGLESS_IN_PPO = {
    "loss_type": _LOSS,
    "importance_sampling_level": _LOSS,
    "sapo_temperature_neg": _LOSS,
    "sapo_temperature_pos": _LOSS,
    "vespo_k_pos": _LOSS,
    "vespo_lambda_pos": _LOSS,
    "vespo_k_neg": _LOSS,
    "vespo_lambda_neg": _LOSS,
    "off_policy_mask_threshold": f"{_LOSS}; see `target_kl` for an early stop",
    "top_entropy_quantile": _LOSS,
    "use_bias_correction_kl": "leave it out: the KL term of PPO is that of `kl_estimator` and `kl_placement`",
    "scale_rewards": _REWARDS,
    "multi_objective_aggregation": _REWARDS,
    "sync_ref_model": _FROZEN,
    "ref_model_mixup_alpha": _FROZEN,
    "ref_model_sync_steps": _FROZEN,
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "steps_per_generation": _ROLLOUT,
    "generation_batch_size": _ROLLOUT,
}

# Generation options that PPO has under its own names, or fixes; the last line has vLLM's names.
NOT_FOR_GENERATION = {
    *("temperature", "max_new_tokens", "max_length", "eos_token_id", "num_return_sequences", "do_sample"),
    *("disable_compile", "bos_token_id", "pad_token_id"),
    *("max_tokens", "n", "logprobs", "stop_token_ids", "ignore_eos"),
}
# Options of GRPO that sample from another distribution than the one that is scored, and the values at which they do
# not. A quantised cache does so too.
SAMPLING = {
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "vllm_structured_outputs_regex": (None,),
}
# Options that `generation_kwargs` may hold: they change how tokens are computed, not which. The second line is vLLM's.
HARMLESS_IN_GENERATION = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("skip_special_tokens", "spaces_between_special_tokens", "detokenize", "priority"),
}

_NOT_SCORED = (
    "may change what is sampled, while π_θ, π_old and π_ref are scored over the full distribution at `temperature`: "
    "ratio, KL and gradient would be those of a policy that nobody sampled from."
)
_INSTEAD = (
    "To sample more narrowly lower `temperature`, at which responses are scored too; truncate when the trained model "
    "is used."
)


def check_options(args: Any) -> None:
    """Raise `ValueError` for options of a `PPOConfigX` that do not go together."""
    refuse_meaningless(args)
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` adds noise to the embeddings in training, and PPO "
            "compares the same policy's log-probabilities before and after a step: ratio and KL would measure the "
            "noise. Leave it out."
        )
    if args.total_episodes is not None and args.max_steps > 0:
        raise ValueError(
            f"`total_episodes={args.total_episodes}` sets the number of optimizer steps, and so does "
            f"`max_steps={args.max_steps}`. Keep one of them."
        )
    check_best_metric(args)
    if args.stop_token is not None and args.stop_token_id is not None:
        raise ValueError("Both `stop_token` and `stop_token_id` are set; keep the one you mean.")
    check_kl(args)
    check_frozen_models(args)
    check_advantages(args)
    if (args.positive_nll_coef > 0) != (args.positive_min_score is not None):
        raise ValueError(
            f"`positive_nll_coef={args.positive_nll_coef}` with `positive_min_score={args.positive_min_score}`: the "
            "term imitates responses that reach a score, so set both, or neither."
        )
    check_critic(args)
    check_lag(args)
    if args.policy_objective == "mask" and args.dual_clip is not None:
        raise ValueError(
            f"`dual_clip={args.dual_clip}` bounds the objective of `policy_objective='clip'`; 'mask' leaves out every "
            "token whose ratio is above 1 + `cliprange_high`. Remove one of them."
        )
    if args.policy_objective == "mask" and args.cliprange >= 1:
        raise ValueError(
            f"`policy_objective='mask'` with `cliprange={args.cliprange}`: no ratio is below 1 − {args.cliprange}, so "
            "no token that has become unlikelier would be left out. Set `cliprange` below 1; `cliprange_high` is the "
            "upper side."
        )
    if args.policy_objective == "mask" and args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            "`policy_objective='mask'` takes the ratio to the probabilities that vLLM sampled by, for which "
            "`vllm_importance_sampling_correction` would correct once more. Set it to False."
        )
    high = args.cliprange if args.cliprange_high is None else args.cliprange_high
    above = args.dual_clip is None or args.dual_clip > 1 + high
    require(args, "dual_clip", above, f"above {1 + high:g}, where the ratio is clipped already, or unset")


def refuse_meaningless(args: Any) -> None:
    for name, instead in MEANINGLESS_IN_PPO.items():
        default, value = default_of(type(args), name), getattr(args, name)
        if value != default:
            raise ValueError(f"`{name}={value!r}` is an option of GRPO that means nothing in PPO: {instead}.")


def check_best_metric(args: Any) -> None:
    """Raise `ValueError` for a metric that PPO does not have, and for a schedule that needs one when none is set."""
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model={args.metric_for_best_model!r}`: PPO has no held-out loss. Use "
            f"{BEST_METRIC!r}, or leave it unset."
        )
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in ("reduce_lr_on_plateau", "greedy") and args.metric_for_best_model is None:
        raise ValueError(
            f"`lr_scheduler_type={schedule!r}` follows a metric. Set `metric_for_best_model`, such as "
            f"{BEST_METRIC!r}, say with `lr_scheduler_kwargs={{'mode': 'max'}}` that higher is better, and measure "
            "it: `eval_strategy='steps'` with `eval_steps` and an `eval_dataset`."
        )


def check_sampling(args: Any) -> None:
    """
    Raise `ValueError` for options that would sample from another distribution than the scored one, which is the full
    one at `temperature`. Called after `generation_kwargs` has been parsed.
    """
    for name, neutral in SAMPLING.items():
        if getattr(args, name) not in neutral:
            raise ValueError(f"`{name}={getattr(args, name)!r}` {_NOT_SCORED} Leave it at {neutral[0]!r}. {_INSTEAD}")
    options = args.generation_kwargs or {}
    twice = sorted(NOT_FOR_GENERATION & options.keys())
    if twice:
        raise ValueError(
            f"`generation_kwargs` holds {twice}, which `temperature`, `response_length` and `stop_token_id` say "
            "already, or which the trainer fixes. Remove them."
        )
    others = sorted(options.keys() - HARMLESS_IN_GENERATION)
    if others:
        raise ValueError(
            f"`generation_kwargs` holds {others}: what is not among {sorted(HARMLESS_IN_GENERATION)} {_NOT_SCORED} "
            f"Remove them. {_INSTEAD}"
        )
    if "quantized" in (args.cache_implementation, options.get("cache_implementation")):
        raise ValueError(f"`cache_implementation='quantized'` {_NOT_SCORED} Take another cache.")


def check_kl(args: Any) -> None:
    # The estimator
    in_loss = args.kl_placement == "loss"
    allowed = LOSS_KL_ESTIMATORS if in_loss else REWARD_KL_ESTIMATORS
    if in_loss and args.kl_estimator == "k1":
        raise ValueError(
            "`kl_estimator='k1'` has no gradient in expectation, so in the loss it would not hold the actor to "
            "the reference. Use `kl_estimator='k2'`, or `kl_placement='reward'` to subtract k1 from the rewards "
            "as TRL 1.12 did."
        )
    is_allowed = args.kl_estimator in (None, *allowed)
    require(args, "kl_estimator", is_allowed, f"one of {allowed} in the {args.kl_placement}")
    # The controllers
    for name in ("kl_target", "kl_horizon"):
        if getattr(args, name) is not None and args.kl_controller != "proportional":
            raise ValueError(f"`{name}` is read by `kl_controller='proportional'` only; set that or remove it.")
    if args.kl_controller == "proportional" and args.kl_target is None:
        raise ValueError("`kl_controller='proportional'` needs `kl_target`, in nats per sequence.")
    if args.kl_band != default_of(type(args), "kl_band") and args.kl_controller != "band":
        raise ValueError("`kl_band` is read by `kl_controller='band'` only; set that or remove it.")
    if args.kl_controller != "fixed" and args.kl_coef == 0:
        raise ValueError(f"`kl_controller='{args.kl_controller}'` scales `kl_coef`, which is 0; start above 0.")
    if args.old_kl_target is not None and args.old_kl_coef == 0:
        raise ValueError("`old_kl_target` steers `old_kl_coef`, which is 0; start it above 0.")


def check_advantages(args: Any) -> None:
    find_estimator(args.advantage_estimator)
    for name in ("lam_alpha", "critic_lam"):
        if getattr(args, name) is not None and args.advantage_estimator != "gae":
            raise ValueError(
                f"`{name}={getattr(args, name)}` is read by `advantage_estimator='gae'` only, and it is "
                f"{args.advantage_estimator!r}. Remove one of them."
            )
    if args.critic_gate and args.advantage_estimator == "reinforce":
        raise ValueError(
            "`critic_gate` switches the critic's part of the advantages off and on, and "
            "`advantage_estimator='reinforce'` has none. Remove one of them."
        )
    if args.critic_warmup_until is not None and args.vf_coef == 0:
        raise ValueError(
            f"`critic_warmup_until={args.critic_warmup_until}` waits for a critic that does not learn with "
            "`vf_coef=0`. Remove one of them."
        )
    if args.lam_alpha is not None and args.lam is not LAM:
        raise ValueError(
            f"`lam={args.lam}` and `lam_alpha={args.lam_alpha}` both set the λ of the advantages. Keep one of them, "
            "in a recipe too."
        )


def check_critic(args: Any) -> None:
    options = (inspect.get_annotations(CriticOptions).keys() | {"critic_lam"}) - {"TOPIC", "critic"}
    given = sorted(name for name in options if getattr(args, name) != default_of(type(args), name))
    idle = {
        "which `advantage_estimator='reinforce'` does not ask": args.advantage_estimator == "reinforce",
        "which learns nothing with `vf_coef=0`": args.vf_coef == 0,
    }
    for why, holds in idle.items():
        if given and holds:
            name = given[0]
            raise ValueError(f"`{name}={getattr(args, name)}` is an option of the critic, {why}. Remove one of them.")
    optim = str(getattr(args.optim, "value", args.optim))
    if args.critic_steps > 1 and optim.startswith(("schedule_free", "adamw_apex")):
        raise ValueError(
            f"`critic_steps={args.critic_steps}` with `optim={optim!r}`, which counts its steps for actor and critic "
            "together. Use `critic_steps=1`, or another optimizer such as adamw_torch."
        )
    if args.critic_stop_gradient and args.critic != "head":
        raise ValueError(
            f"`critic_stop_gradient` keeps the value loss out of the actor's trunk, which `critic={args.critic!r}` "
            "does not train. Remove it, or set `critic='head'`."
        )
    if args.critic_steps > 1 and (
        args.critic == "adapter" or (args.critic == "head" and not args.critic_stop_gradient)
    ):
        way = "set `critic_stop_gradient`, " if args.critic == "head" else ""
        raise ValueError(
            f"`critic_steps={args.critic_steps}` steps the critic without the actor, and `critic={args.critic!r}` "
            f"shares the actor's trunk, which would move with it. Use `critic_steps=1`, {way}or choose "
            "`critic='model'`."
        )
    if args.critic_max_grad_norm is not None and not args.max_grad_norm:
        raise ValueError(
            f"`critic_max_grad_norm={args.critic_max_grad_norm}` with `max_grad_norm={args.max_grad_norm}`, which "
            "switches clipping off. Set `max_grad_norm` for the actor too, as large as you like."
        )
    if args.critic_lr_scheduler_type is not None:
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`critic_lr_scheduler_type={args.critic_lr_scheduler_type!r}` beside `lr_scheduler_type="
                f"{schedule!r}`, which follows a metric and sets all learning rates. Remove one of them."
            )


def check_lag(args: Any) -> None:
    """Raise `ValueError` for a `rollout_lag` without a server, or whose age nothing accounts for."""
    if not args.rollout_lag:
        return
    if not (args.use_vllm and args.vllm_mode == "server"):
        engine = f"`vllm_mode={args.vllm_mode!r}`" if args.use_vllm else "`use_vllm=False`"
        raise ValueError(
            f"`rollout_lag={args.rollout_lag}` needs a vLLM server, which generates while this program learns, and "
            f"the run has {engine}. Set `use_vllm=True` and `vllm_mode='server'` (`trl-ext serve RECIPE` starts one), "
            "or leave `rollout_lag` at 0."
        )
    if args.policy_objective == "clip" and not args.vllm_importance_sampling_correction:
        raise ValueError(
            f"`rollout_lag={args.rollout_lag}` with `vllm_importance_sampling_correction=False`: the clipped "
            "objective would take samples of an older policy for the current one's. Leave the correction on, or set "
            "`policy_objective='mask'`, whose ratio is to the policy that sampled."
        )


def check_engine(args: Any) -> None:
    """Raise `ValueError` for options that the engine, DeepSpeed or FSDP, cannot follow. Called once it is known."""
    engine = "FSDP" if is_fsdp(args.fsdp) else "DeepSpeed" if args.deepspeed_plugin is not None else None
    if engine and args.critic_max_grad_norm is not None:
        raise ValueError(
            f"`critic_max_grad_norm={args.critic_max_grad_norm}` with {engine}, which clips the gradient of actor and "
            "critic by the norm of both. Remove it."
        )
    if engine == "FSDP" and args.critic_steps > 1:
        raise ValueError(
            f"`critic_steps={args.critic_steps}` with FSDP, where the critic has no steps without the actor. Use "
            "`critic_steps=1`, or DeepSpeed."
        )


def check_frozen_models(args: Any) -> None:
    if args.ref_model_quantization is not None and args.kl_coef == 0:
        raise ValueError(
            f"`ref_model_quantization={args.ref_model_quantization!r}` with `kl_coef=0`: no reference is loaded. "
            "Remove it."
        )
    for name in ("reward_model_quantization", "ref_model_quantization"):
        if args.offload_frozen_models and getattr(args, name) == "8bit":
            raise ValueError(
                f"`offload_frozen_models` cannot move what `{name}='8bit'` makes: an 8-bit layer of bitsandbytes "
                "keeps its weights outside its parameters once it has run. Use '4bit', or switch one of them off."
            )
