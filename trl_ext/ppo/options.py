"""
The options of PPO by topic, one class each: name, range, default, and a help with the unit and the value that Zhang
2025 §6.2 recommends (docs/theory.md has the article's title). `TOPIC` is the heading of a class's options in `--help`.

`config_checks.py` checks whether options go together; `PPOConfigX` in `config.py` joins the topics.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ..models.quantization import QUANTIZATIONS
from ..ranges import (
    COUNT,
    COUNT_OR_UNSET,
    FRACTION,
    FRACTION_OR_UNSET,
    NOT_NEGATIVE,
    NOT_NEGATIVE_OR_UNSET,
    NUMBER_OR_UNSET,
    POSITIVE,
    POSITIVE_OR_UNSET,
    SHARE_OR_UNSET,
    SWITCH,
    Range,
    one_of,
)
from .kl import IN_THE_LOSS, IN_THE_REWARD
from .terms import WEIGHED_BY


CRITICS = ("model", "head", "adapter")
KL_PLACEMENTS = ("loss", "reward")
POLICY_OBJECTIVES = ("clip", "mask")
KL_CONTROLLERS = ("fixed", "proportional", "band")
# An object of its own, by which a `lam` that nobody has written is told from one of the same value that somebody has.
LAM = float("0.95")
LOSS_KL_ESTIMATORS = (*IN_THE_LOSS, "full")
REWARD_KL_ESTIMATORS = (*IN_THE_REWARD,)
COUNT_FROM_0 = Range("an integer of at least 0", lambda value: type(value) is int and value >= 0)
TOKEN_ID = Range("an integer of 0 or above, or unset", lambda id_: id_ is None or (id_ == int(id_) and id_ >= 0))
BAND = Range("two numbers, 0 < low < high", lambda band: len(band) == 2 and 0 < float(band[0]) < float(band[1]))
FINITE_OR_UNSET = Range("above 0 and finite, or unset", lambda value: value is None or 0 < value < float("inf"))
WITHOUT_DROPOUT = Range("True: with dropout, ratio and KL would measure its noise", lambda value: value is True)
PATTERNS = Range(
    "a list of patterns", lambda names: isinstance(names, list) and all(isinstance(n, str) for n in names)
)
# Schedules of one factor per parameter group.
CRITIC_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass
class BatchOptions:
    TOPIC: ClassVar[str] = "Rollouts, mini-batches and steps"

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW for the actor."})
    num_ppo_epochs: Annotated[int, COUNT] = field(
        default=4, metadata={"help": "Passes over each rollout. Integer >= 1."}
    )
    num_mini_batches: Annotated[int, COUNT] = field(
        default=1,
        metadata={"help": "Mini-batches, each one optimizer step, in one pass over a rollout. Integer >= 1."},
    )
    total_episodes: Annotated[int | None, COUNT_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Responses to sample in the whole run; sets `max_steps`. Unset: `num_train_epochs` is used."
        },
    )
    num_generations: Annotated[int, COUNT] = field(
        default=1,
        metadata={
            "help": "Responses to each prompt, n. A rollout holds the same number of responses for any n, to 1/n as "
            "many prompts; n divides a rank's mini-batch."
        },
    )
    num_generations_eval: Annotated[int, COUNT] = field(
        default=1,
        metadata={"help": "Responses to each held-out prompt, of which the mean and the best score are logged."},
    )
    local_rollout_forward_batch_size: Annotated[int, COUNT] = field(
        default=64, metadata={"help": "Sequences per forward pass, without gradient, when a rollout is scored."}
    )
    micro_batch_tokens: Annotated[int | None, COUNT_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Tokens of a forward and backward pass, at most. A mini-batch is cut into as few passes as hold "
            "it, and `per_device_train_batch_size` counts for the size of the rollout only. Loss and gradient stay "
            "the same. Unset: passes of equally many sequences."
        },
    )
    score_batch_tokens: Annotated[int | None, COUNT_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Tokens of a forward pass when a rollout is scored, at most; a reward model scores a text that is "
            "longer in its own tokens alone. Unset: passes of `local_rollout_forward_batch_size` sequences."
        },
    )
    packing: Annotated[bool, SWITCH] = field(
        default=True,
        metadata={
            "help": "Score and learn from sequences side by side in rows without padding, the prompt of several "
            "responses once, where that gives the same numbers. Off: in padded rows."
        },
    )
    dataset_num_proc: Annotated[int | None, COUNT_OR_UNSET] = field(
        default=None, metadata={"help": "Processes that check the prompts of the datasets before training."}
    )


@dataclass
class ModelOptions:
    TOPIC: ClassVar[str] = "Models and adapters"

    sft_model_path: str | None = field(
        default=None, metadata={"help": "Path of the actor, if no `model` is passed to the trainer."}
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Path of the reward model, if no reward is passed to the trainer. If the actor trains an adapter, "
            "it may be the folder of a reward adapter, which is loaded onto the actor's base."
        },
    )
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "Name of the adapter to train, if the actor has several."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "Name of the actor's adapter to use as the reference model."}
    )
    disable_dropout: Annotated[bool, WITHOUT_DROPOUT] = field(
        default=True, metadata={"help": "Dropout is off in every model; True is the only value."}
    )


@dataclass
class FrozenModelOptions:
    TOPIC: ClassVar[str] = "Memory of the frozen models"

    offload_frozen_models: Annotated[bool, SWITCH] = field(
        default=False,
        metadata={
            "help": "Keep the weights of reference and reward models in host memory, and move them to the device only "
            "while they score. Not with ZeRO-3 or FSDP, which partition them."
        },
    )
    reward_model_quantization: Annotated[str | None, one_of(*QUANTIZATIONS)] = field(
        default=None,
        metadata={
            "help": "Load the reward models that are given by path in fewer bits, with bitsandbytes: '8bit' or '4bit' "
            "(NF4). A critic made from the reward model stays in full precision.",
            "choices": ["8bit", "4bit"],
        },
    )
    ref_model_quantization: Annotated[str | None, one_of(*QUANTIZATIONS)] = field(
        default=None,
        metadata={
            "help": "Load the reference in fewer bits: '8bit' or '4bit' (NF4). For a `ref_model` given by path, or "
            "the copy of an actor given by path. The KL is then not 0 before the first step.",
            "choices": ["8bit", "4bit"],
        },
    )


@dataclass
class ResponseOptions:
    TOPIC: ClassVar[str] = "Responses"

    response_length: Annotated[int, COUNT] = field(
        default=53, metadata={"help": "Maximum length of a response, in tokens."}
    )
    temperature: Annotated[float, POSITIVE] = field(
        default=1.0, metadata={"help": "Sampling temperature; also the temperature of every log-probability. > 0."}
    )
    stop_token: Annotated[str | None, one_of(None, "eos")] = field(
        default=None,
        metadata={
            "help": "'eos': a response ends only at the tokenizer's eos token. Unset: at any end token that the "
            "model or the tokenizer declares.",
            "choices": ["eos"],
        },
    )
    stop_token_id: Annotated[int | None, TOKEN_ID] = field(
        default=None, metadata={"help": "Id of the only token that ends a response. Not together with `stop_token`."}
    )
    num_sample_generations: Annotated[int, NOT_NEGATIVE] = field(
        default=10,
        metadata={"help": "How many times per run to print sample completions of `eval_dataset`. 0: never."},
    )
    rollout_lag: Annotated[int, COUNT_FROM_0] = field(
        default=0,
        metadata={
            "help": "With a vLLM server: learn from responses that were sampled with the weights of so many rollouts "
            "ago, while the server generates the next. 1 overlaps as much as a larger number. 0: generate, then learn."
        },
    )


@dataclass
class RewardOptions:
    TOPIC: ClassVar[str] = "From scores to rewards"

    missing_eos_penalty: Annotated[float | None, NOT_NEGATIVE_OR_UNSET] = field(
        default=None, metadata={"help": "Subtract this from the score of a response without an end token. >= 0."}
    )
    normalize_rewards: Annotated[bool, SWITCH] = field(
        default=False,
        metadata={"help": "Divide scores by their running standard deviation over all ranks and rollouts."},
    )
    reward_clip: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Clip scores to ± this value, after `normalize_rewards`. Positive. Not with rewards at tokens or "
            "turns."
        },
    )
    whiten_rewards: Annotated[bool, SWITCH] = field(
        default=False, metadata={"help": "Scale the per-token rewards of a rollout to unit variance; keep the mean."}
    )


@dataclass
class RewardCallOptions:
    TOPIC: ClassVar[str] = "Asking reward functions"

    reward_timeout: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward function may take; then it has failed. A sync function runs in a "
            "thread, which is left to itself. Unset: any time."
        },
    )
    reward_max_retries: Annotated[int, COUNT_FROM_0] = field(
        default=0,
        metadata={
            "help": "How often a reward function that raises or is too late is asked again, after 1, 2, 4, … and at "
            "most 60 seconds, before the run ends. Integer >= 0."
        },
    )
    reward_max_concurrency: Annotated[int | None, COUNT_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Ask reward functions for one response at a time, each for so many at once, per process. Unset: "
            "one call for all responses of a process."
        },
    )


@dataclass
class KLOptions:
    TOPIC: ClassVar[str] = "KL to the reference model"

    kl_coef: Annotated[float, NOT_NEGATIVE] = field(
        default=0.05,
        metadata={
            "help": f"Coefficient α of {WEIGHED_BY['kl_coef']}: a larger value keeps the actor closer to the "
            "reference. 0: no reference model is loaded."
        },
    )
    kl_placement: Annotated[str, one_of(*KL_PLACEMENTS)] = field(
        default="loss",
        metadata={
            "help": "'loss': −αL^KL, applied per state. 'reward': subtracted from the per-token "
            "rewards as in TRL 1.12, so that it also reaches earlier tokens through the returns.",
            "choices": list(KL_PLACEMENTS),
        },
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Per-token estimate of the KL. In the loss its gradient counts: 'k2' (default; the gradient of "
            "KL(π_θ ‖ π_ref)), 'full' (exact, over the vocabulary) or 'k3' (the gradient of KL(π_ref ‖ π_θ), GRPO's "
            "choice). In the reward its value counts: 'k1' (default, unbiased), 'k2' or 'k3'.",
            "choices": list(dict.fromkeys(REWARD_KL_ESTIMATORS + LOSS_KL_ESTIMATORS)),
        },
    )
    kl_controller: Annotated[str, one_of(*KL_CONTROLLERS)] = field(
        default="fixed",
        metadata={
            "help": "How `kl_coef` follows the measured KL, once per rollout: 'fixed', 'proportional' (Ziegler 2019) "
            "or 'band' (halved below `kl_band`, doubled above it).",
            "choices": list(KL_CONTROLLERS),
        },
    )
    kl_target: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None, metadata={"help": "Target of the proportional controller, in nats per sequence."}
    )
    kl_horizon: Annotated[int | None, POSITIVE_OR_UNSET] = field(
        default=None, metadata={"help": "Horizon of the proportional controller, in episodes (default 10000)."}
    )
    kl_band: Annotated[list[float], BAND] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={
            "help": "Lower and upper limit of the band controller, in nats per sequence. Zhang 2025 §6.2: 0.5 to 2."
        },
    )


@dataclass
class LossOptions:
    TOPIC: ClassVar[str] = "Loss terms"

    policy_objective: Annotated[str, one_of(*POLICY_OBJECTIVES)] = field(
        default="clip",
        metadata={
            "help": "'clip': L^CLIP. 'mask': ratio · Â where the ratio is from 1 − `cliprange` to 1 + "
            "`cliprange_high`, and nothing elsewhere, whatever the sign of Â; with vLLM the ratio is to the "
            "probabilities that it sampled by (SAO, arXiv:2607.07508).",
            "choices": list(POLICY_OBJECTIVES),
        },
    )
    cliprange: Annotated[float, POSITIVE] = field(
        default=0.2,
        metadata={"help": "ε of L^CLIP: the ratio counts within 1 ± ε. Ratio space. Zhang 2025 §6.2: 0.2."},
    )
    cliprange_high: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Upper ε: the ratio counts up to 1 + this, which lets unlikely tokens rise further (clip-higher, "
            "arXiv:2503.14476: 0.28). Unset: `cliprange`."
        },
    )
    dual_clip: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Ratio beyond which a token with a negative advantage has no gradient (dual clip, "
            "arXiv:1912.09729: 3.0). Above 1 + `cliprange_high`. Unset: none."
        },
    )
    vf_coef: Annotated[float, NOT_NEGATIVE] = field(
        default=0.5,
        metadata={"help": f"Coefficient of the value loss, {WEIGHED_BY['vf_coef']}. Zhang 2025 §6.2: 0.5."},
    )
    cliprange_value: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=0.2,
        metadata={"help": "Clip the value to V_old ± this, in reward units. null: no clipping."},
    )
    ent_coef: Annotated[float, NOT_NEGATIVE] = field(
        default=0.01,
        metadata={"help": f"Coefficient of the entropy bonus, {WEIGHED_BY['ent_coef']}. Zhang 2025 §6.2: 0.01."},
    )
    old_kl_coef: Annotated[float, NOT_NEGATIVE] = field(
        default=0.0,
        metadata={
            "help": f"Coefficient of {WEIGHED_BY['old_kl_coef']} (Zhang 2025 §4.2.3; Schulman 2017 §4). 0: off."
        },
    )
    old_kl_target: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={"help": "Target d of Schulman's controller of `old_kl_coef`, in nats per token. Unset: fixed."},
    )
    positive_nll_coef: Annotated[float, NOT_NEGATIVE] = field(
        default=0.0,
        metadata={
            "help": f"Coefficient of {WEIGHED_BY['positive_nll_coef']}: those that reach `positive_min_score` are "
            "imitated (VAPO, arXiv:2504.05118: 0.1). 0: off."
        },
    )
    positive_min_score: Annotated[float | None, NUMBER_OR_UNSET] = field(
        default=None, metadata={"help": "Lowest score of a response that `positive_nll_coef` imitates."}
    )
    target_kl: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "If `policy/approx_kl` (nats per token, all ranks) of an optimizer step exceeds this, skip the "
            "remaining steps of the rollout. Unset: never."
        },
    )


@dataclass
class AdvantageOptions:
    TOPIC: ClassVar[str] = "Advantages and returns"

    gamma: Annotated[float, FRACTION] = field(
        default=1.0, metadata={"help": "Discount factor, 0 to 1. Zhang 2025 §6.2: 0.99."}
    )
    lam: Annotated[float, FRACTION] = field(
        default=LAM, metadata={"help": "λ of GAE, 0 to 1, where `lam_alpha` is unset. Zhang 2025 §6.2: 0.95."}
    )
    lam_alpha: Annotated[float | None, FINITE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "α of a λ that follows the length l of a response, 1 − 1/(α·l), in place of `lam`: α·l is the "
            "horizon in tokens. VAPO (arXiv:2504.05118): 0.05. Not beside a `lam`. Unset: `lam`."
        },
    )
    critic_lam: Annotated[float | None, FRACTION_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "λ of the returns that the critic learns, 0 to 1. VC-PPO (arXiv:2503.01491): 1.0. Unset: the λ of "
            "the advantages."
        },
    )
    critic_gate: Annotated[bool, SWITCH] = field(
        default=False,
        metadata={
            "help": "Learn from rewards-to-go minus their mean while the critic explains nothing of them "
            "(`value/explained_variance_mc` at most 0); the critic learns on (EVPO, arXiv:2604.19485)."
        },
    )
    advantage_estimator: str = field(
        default="gae",
        metadata={
            "help": "'gae'; '1_step', '2_step', …; 'reinforce' (rewards-to-go); 'reinforce_baseline' "
            "(rewards-to-go minus the value)."
        },
    )
    whiten_advantages: Annotated[bool, SWITCH] = field(
        default=True,
        metadata={
            "help": "Scale a rollout's advantages to mean 0 and variance 1 over all ranks. Returns are not scaled."
        },
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: without a `lam` that nobody has written, which would come back as another object."""
        return {name: value for name, value in vars(self).items() if value is not LAM}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"lam": LAM} | state)


@dataclass
class CriticOptions:
    TOPIC: ClassVar[str] = "Critic"

    critic: Annotated[str, one_of(*CRITICS)] = field(
        default="model",
        metadata={
            "help": "'model': the critic is a model of its own. 'head': a value head on the actor's trunk, with one "
            "forward pass for both. 'adapter': an adapter and a value head of its own on the actor's base, which the "
            "actor's adapter leaves unchanged; the adapter has the form of the actor's or of the reward adapter.",
            "choices": list(CRITICS),
        },
    )
    critic_learning_rate: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None, metadata={"help": "Initial learning rate of the critic. Unset: `learning_rate`."}
    )
    critic_weight_decay: Annotated[float | None, NOT_NEGATIVE_OR_UNSET] = field(
        default=None, metadata={"help": "Weight decay of the critic. Unset: `weight_decay`."}
    )
    critic_lr_scheduler_type: Annotated[str | None, one_of(None, *CRITIC_SCHEDULES)] = field(
        default=None,
        metadata={
            "help": "Schedule of the critic's learning rate, with the warm-up of `warmup_steps`; "
            "`lr_scheduler_kwargs` are the actor's. Unset: `lr_scheduler_type`.",
            "choices": list(CRITIC_SCHEDULES),
        },
    )
    critic_max_grad_norm: Annotated[float | None, POSITIVE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Largest norm of the critic's gradient, beside `max_grad_norm` for the actor's alone. Unset: "
            "`max_grad_norm` for the norm of both together. Not with DeepSpeed or FSDP."
        },
    )
    critic_steps: Annotated[int, COUNT] = field(
        default=1,
        metadata={
            "help": "Optimizer steps of the critic on each mini-batch, the last of them together with the actor's "
            "(SAO, arXiv:2607.07508: 2). `max_steps`, schedules and logs count those of the actor. Not with "
            "`critic='adapter'` or FSDP, and with `critic='head'` only beside `critic_stop_gradient`."
        },
    )
    critic_stop_gradient: Annotated[bool, SWITCH] = field(
        default=False,
        metadata={"help": "With `critic='head'`: keep the gradient of the value loss out of the actor's trunk."},
    )
    freeze_critic: Annotated[list[str], PATTERNS] = field(
        default_factory=list,
        metadata={
            "help": "Patterns of the names of the critic's parameters that stay as they are, such as '*self_attn*' "
            "(SAO, arXiv:2607.07508, freezes the attention)."
        },
    )
    critic_warmup_steps: Annotated[int, COUNT_FROM_0] = field(
        default=0, metadata={"help": "Number of optimizer steps at the start in which only the critic learns."}
    )
    critic_warmup_until: Annotated[float | None, SHARE_OR_UNSET] = field(
        default=None,
        metadata={
            "help": "Only the critic learns until `value/explained_variance_mc` of a rollout reaches this, above 0 "
            "and at most 1 (VC-PPO, arXiv:2503.01491); of this and `critic_warmup_steps` the later counts. Unset: "
            "`critic_warmup_steps` alone."
        },
    )


@dataclass
class GRPONames:
    """GRPO's names, unset in a user's config; `PPOLoopConfig` sets them from the options."""

    TOPIC: ClassVar[str] = "GRPO's names of these options"

    max_completion_length: int | None = field(default=None, metadata={"help": "GRPO's name of `response_length`."})
    beta: float | None = field(default=None, metadata={"help": "GRPO's name of `kl_coef`."})
    epsilon: float | None = field(default=None, metadata={"help": "GRPO's name of `cliprange`."})
    epsilon_high: float | None = field(default=None, metadata={"help": "GRPO's name of `cliprange_high`."})
    delta: float | None = field(default=None, metadata={"help": "GRPO's name of `dual_clip`."})
    num_iterations: int | None = field(default=None, metadata={"help": "GRPO's name of `num_ppo_epochs`."})
    entropy_coef: float | None = field(default=None, metadata={"help": "GRPO's name of `ent_coef`."})
