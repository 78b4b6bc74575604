"""`PPOConfigX`: TRL 1.12's `PPOConfig` option names on top of `trl.GRPOConfig`.

The config holds what the user wrote, and nothing derived from it, so that a copy made by `dataclasses.replace` or from
`to_dict()` is the same config. What the Trainer's loop and GRPO read is derived in one place, `for_trainer_loop`.
"""

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from ..device import computes_in_bf16
from ..frozen import QUANTIZATIONS
from ..zero import check_batch_fields, check_own_optimizer
from .advantages import validate_estimator
from .kl import BandController, FixedController, KLController, ProportionalController, SchulmanController


# One name for one thing: the left name is the option, GRPO's name on the right is set from it.
GRPO_NAMES = {
    "response_length": "max_completion_length",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "num_ppo_epochs": "num_iterations",
    "ent_coef": "entropy_coef",
}

# Options of GRPO that mean nothing in PPO, and what to do instead.
_GROUPS = "PPO samples one response per prompt and has no groups; raise the batch size instead"
_LOSS = "PPO has one loss, the clipped objective"
_REWARDS = "PPO does not scale rewards by group; see `normalize_rewards` and `whiten_rewards`"
_FROZEN = "the reference model of PPO is frozen"
_ENTROPY = "the entropy bonus of PPO has the fixed coefficient `ent_coef`"
_ROLLOUT = "the rollout is per_device_train_batch_size × gradient_accumulation_steps × world size"
MEANINGLESS_IN_PPO = {
    "num_generations": _GROUPS,
    "num_generations_eval": _GROUPS,
    "loss_type": _LOSS,
    "importance_sampling_level": _LOSS,
    "delta": f"{_LOSS}; its range is `cliprange`",
    "epsilon_high": f"{_LOSS}; its range is `cliprange`",
    "sapo_temperature_neg": _LOSS,
    "sapo_temperature_pos": _LOSS,
    "vespo_k_pos": _LOSS,
    "vespo_lambda_pos": _LOSS,
    "vespo_k_neg": _LOSS,
    "vespo_lambda_neg": _LOSS,
    "off_policy_mask_threshold": f"{_LOSS}; see `target_kl` for an early stop",
    "top_entropy_quantile": _LOSS,
    "use_bias_correction_kl": "the KL term of PPO is chosen by `kl_estimator` and `kl_placement`",
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

LOSS_KL_ESTIMATORS = ("k2", "k3", "full")
REWARD_KL_ESTIMATORS = ("k1", "k2", "k3")
DEFAULT_KL_HORIZON = 10_000
KL_CONTROLLERS = ("fixed", "proportional", "band")


@dataclass
class PPOConfigX(GRPOConfig):
    """
    Configuration of [`PPOTrainerX`]: the option names of TRL 1.12's `PPOConfig`, and everything that `GRPOConfig` and
    `TrainingArguments` offer and that means something in PPO.

    Every field's help states its unit and, where a source document gives one, the document's value (S1 §6.2). Batch
    arithmetic, as in TRL 1.12: the rollout holds `per_device_train_batch_size × gradient_accumulation_steps × world
    size` prompts, a mini-batch is rollout / `num_mini_batches`, and a rollout is learned from in `num_ppo_epochs ×
    num_mini_batches` optimizer steps. `logging_steps`, `eval_steps`, `save_steps` and `max_steps` count those.

    Raises:
        ValueError: for an option outside its range, two names of one option set differently, or an option of GRPO set
            that means nothing in PPO. "Set" means different from the default.
    """

    # Batches
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW for the actor."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout. Integer >= 1."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Mini-batches, hence optimizer steps, in one pass over a rollout. Integer >= 1."}
    )
    total_episodes: int | None = field(
        default=None,
        metadata={
            "help": "Responses to sample in the whole run; sets `max_steps`. Unset: `num_train_epochs` decides."
        },
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Sequences per forward pass, without gradient, when a rollout is scored."}
    )
    num_sample_generations: int = field(
        default=10,
        metadata={"help": "How many times in the run sample completions of `eval_dataset` are printed. 0: never."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that check the prompts of the datasets before training."}
    )

    # Models
    sft_model_path: str | None = field(
        default=None, metadata={"help": "Path of the actor, when no `model` is passed to the trainer."}
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Path of the reward model, when no reward is passed to the trainer. Where the actor trains an "
            "adapter, it may be the folder of a reward adapter, which is loaded onto the actor's base."
        },
    )
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "Name of the adapter to train, when the actor holds several."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "Name of the actor's adapter that is the reference model."}
    )

    # Frozen models
    offload_frozen_models: bool = field(
        default=False,
        metadata={
            "help": "Keep the weights of reference and reward models in host memory, and on the device only while "
            "they score. Not with ZeRO-3 or FSDP, which partition them."
        },
    )
    reward_model_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the reward models that are given by path in fewer bits, with bitsandbytes: '8bit' or '4bit' "
            "(NF4). A critic made from the reward model stays in full precision.",
            "choices": ["8bit", "4bit"],
        },
    )
    ref_model_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the reference in fewer bits: '8bit' or '4bit' (NF4). For a `ref_model` given by path, or "
            "the copy of an actor given by path. The KL is then not 0 before the first step.",
            "choices": ["8bit", "4bit"],
        },
    )

    # Responses
    response_length: int = field(default=53, metadata={"help": "Longest response, in tokens."})
    stop_token: str | None = field(
        default=None,
        metadata={
            "help": "'eos': a response ends at the tokenizer's eos token only. Unset: at any end token that the model "
            "or the tokenizer declares.",
            "choices": ["eos"],
        },
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "Id of the one token that ends a response. Excludes `stop_token`."}
    )

    # Reward
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response without an end token. >= 0."}
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={"help": "Divide scores by their running standard deviation over all ranks and rollouts."},
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip scores to ± this value, after `normalize_rewards`. Positive."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the per-token rewards of a rollout to unit variance, mean kept."}
    )

    # KL to the reference model
    kl_coef: float = field(
        default=0.05,
        metadata={
            "help": "Coefficient α of KL(π_θ ‖ π_ref): larger holds the actor closer to the reference. 0: no "
            "reference model is loaded."
        },
    )
    kl_placement: str = field(
        default="loss",
        metadata={
            "help": "'loss': −αL^KL as in the documents; per state. 'reward': subtracted from the per-token rewards "
            "as in TRL 1.12, so that it also reaches earlier tokens through the returns.",
            "choices": ["loss", "reward"],
        },
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Per-token estimate of the KL. In the loss its gradient counts: 'k2' (default; the gradient of "
            "KL(π_θ ‖ π_ref)), 'full' (exact, over the vocabulary) or 'k3' (the gradient of KL(π_ref ‖ π_θ), GRPO's "
            "choice). In the reward its value counts: 'k1' (default, unbiased), 'k2' or 'k3'.",
            "choices": ["k1", "k2", "k3", "full"],
        },
    )
    kl_controller: str = field(
        default="fixed",
        metadata={
            "help": "How `kl_coef` follows the measured KL, once per rollout: 'fixed', 'proportional' (Ziegler 2019) "
            "or 'band' (halved below `kl_band`, doubled above it).",
            "choices": list(KL_CONTROLLERS),
        },
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Target of the proportional controller, in nats per sequence."}
    )
    kl_horizon: int | None = field(
        default=None, metadata={"help": "Horizon of the proportional controller, in episodes (default 10000)."}
    )
    kl_band: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Lower and upper end of the band controller, in nats per sequence. S1 §6.2: 0.5 to 2."},
    )

    # Loss
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; also the temperature of every log-probability. > 0."}
    )
    cliprange: float = field(
        default=0.2, metadata={"help": "ε of L^CLIP: the ratio counts within 1 ± ε. Ratio space. S1 §6.2: 0.2."}
    )
    vf_coef: float = field(default=0.5, metadata={"help": "Coefficient of the value loss ½(V − R)². S1 §6.2: 0.5."})
    cliprange_value: float | None = field(
        default=0.2,
        metadata={"help": "The value counts within V_old ± this, in reward units. null: no clipping."},
    )
    ent_coef: float = field(
        default=0.01, metadata={"help": "Coefficient of the entropy bonus, nats per token. S1 §6.2: 0.01."}
    )
    old_kl_coef: float = field(
        default=0.0,
        metadata={"help": "Coefficient of KL[π_old ‖ π_θ], nats per token (S1 §4.2.3; Schulman 2017 §4). 0: off."},
    )
    old_kl_target: float | None = field(
        default=None,
        metadata={"help": "Target d of Schulman's controller of `old_kl_coef`, nats per token. Unset: fixed."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "When `policy/approx_kl` (nats per token, all ranks) of an optimizer step exceeds this, the rest "
            "of the rollout is not learned from. Unset: never."
        },
    )

    # Advantages
    gamma: float = field(default=1.0, metadata={"help": "Discount factor, 0 to 1. S1 §6.2: 0.99."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE, 0 to 1. S1 §6.2: 0.95."})
    advantage_estimator: str = field(
        default="gae",
        metadata={
            "help": "'gae'; '1_step', '2_step', … (S1 §2.9); 'reinforce' (rewards-to-go); 'reinforce_baseline' "
            "(rewards-to-go minus the value)."
        },
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={
            "help": "Scale a rollout's advantages to mean 0 and variance 1 over all ranks. Returns keep theirs."
        },
    )

    # Critic
    critic: str = field(
        default="model",
        metadata={
            "help": "'model': the critic is a model of its own. 'head': a value head on the actor's trunk, one "
            "forward pass for both. 'adapter': an adapter and a value head of its own on the actor's base, which the "
            "actor's adapter leaves as it is; the adapter's form is that of the actor's, or of the reward adapter.",
            "choices": ["model", "head", "adapter"],
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the critic. Unset: `learning_rate`."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "First optimizer steps in which only the critic learns."}
    )

    # GRPO's names of the options above. Unset here: they are set from them in `for_trainer_loop`.
    max_completion_length: int | None = field(default=None, metadata={"help": "GRPO's name of `response_length`."})
    beta: float | None = field(default=None, metadata={"help": "GRPO's name of `kl_coef`."})
    epsilon: float | None = field(default=None, metadata={"help": "GRPO's name of `cliprange`."})
    num_iterations: int | None = field(default=None, metadata={"help": "GRPO's name of `num_ppo_epochs`."})
    entropy_coef: float | None = field(default=None, metadata={"help": "GRPO's name of `ent_coef`."})
    num_generations: int | None = field(default=None, metadata={"help": "Not used: one response per prompt."})

    def __post_init__(self):
        self._take_grpo_names()
        self._refuse_meaningless_options()
        self._validate_ranges()
        self._validate_kl()
        self._validate_frozen()
        if getattr(self, "bf16", None) is None:
            self.bf16: bool | None = not self.fp16 and computes_in_bf16(self.use_cpu)
        self._run_parent_post_init()
        check_own_optimizer(self, critic_learning_rate=self.critic_learning_rate)

    # ---- Validation ----

    def _take_grpo_names(self) -> None:
        """Lets GRPO's name set an option that is at its default; refuses two different values."""
        for name, grpo_name in GRPO_NAMES.items():
            value, grpo_value = getattr(self, name), getattr(self, grpo_name)
            if grpo_value is None or grpo_value == value:
                setattr(self, grpo_name, None)
                continue
            if value != _default(type(self), name):
                raise ValueError(
                    f"`{name}={value}` and `{grpo_name}={grpo_value}` are two names of one option, set differently. "
                    f"Keep `{name}` and remove `{grpo_name}`."
                )
            setattr(self, name, grpo_value)
            setattr(self, grpo_name, None)

    def _refuse_meaningless_options(self) -> None:
        for name, instead in MEANINGLESS_IN_PPO.items():
            value = getattr(self, name)
            allowed = (_default(type(self), name), 1) if name.startswith("num_generations") else None
            if value not in (allowed or (_default(type(self), name),)):
                raise ValueError(f"`{name}={value!r}` is an option of GRPO that means nothing in PPO: {instead}.")

    def _validate_ranges(self) -> None:
        self.kl_band = [float(end) for end in self.kl_band]
        validate_estimator(self.advantage_estimator)
        for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size"):
            value = getattr(self, name)
            self._require(name, value == int(value) and value >= 1, "an integer of at least 1")
        for name in ("cliprange", "temperature"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        names = ("kl_coef", "vf_coef", "ent_coef", "old_kl_coef", "critic_warmup_steps", "num_sample_generations")
        for name in names:
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or above, and finite")
        self._require("missing_eos_penalty", (self.missing_eos_penalty or 0) >= 0, "0 or above, or unset")
        of_kl = ("target_kl", "kl_target", "kl_horizon", "old_kl_target")
        for name in ("reward_clip", "cliprange_value", "total_episodes", "critic_learning_rate", *of_kl):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "above 0, or unset")
        quantised = {f"{role}_model_quantization": QUANTIZATIONS for role in ("reward", "ref")}
        for name, choices in (
            {"critic": ("model", "head", "adapter"), "stop_token": (None, "eos")} | quantised
        ).items():
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("Both `stop_token` and `stop_token_id` are set; keep the one you mean.")
        others = {"temperature", "max_new_tokens", "max_length", "eos_token_id", "num_return_sequences", "do_sample"}
        others |= {"max_tokens", "n", "logprobs", "stop_token_ids", "ignore_eos"}  # vLLM's names
        twice = sorted(others & set(self.generation_kwargs or {}))
        if twice:
            raise ValueError(
                f"`generation_kwargs` holds {twice}, which `temperature`, `response_length` and `stop_token_id` say "
                "already, or which PPO fixes. Remove them."
            )
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(
                f"`total_episodes={self.total_episodes}` sets the number of optimizer steps, and so does "
                f"`max_steps={self.max_steps}`. Keep one of them."
            )
        if self.target_kl is not None and self.fp16:
            raise ValueError("`target_kl` leaves out optimizer steps, which fp16 loss scaling cannot do; use bf16.")

    def _validate_frozen(self) -> None:
        if self.ref_model_quantization is not None and self.kl_coef == 0:
            raise ValueError(
                f"`ref_model_quantization={self.ref_model_quantization!r}` with `kl_coef=0`: no reference is loaded. "
                "Remove it."
            )
        for name in ("reward_model_quantization", "ref_model_quantization"):
            if self.offload_frozen_models and getattr(self, name) == "8bit":
                raise ValueError(
                    f"`offload_frozen_models` cannot move what `{name}='8bit'` makes: an 8-bit layer of bitsandbytes "
                    "keeps its weights outside its parameters once it has run. Use '4bit', or switch one of them off."
                )

    def _validate_kl(self) -> None:
        self._require("kl_placement", self.kl_placement in ("loss", "reward"), "'loss' or 'reward'")
        self._require("kl_controller", self.kl_controller in KL_CONTROLLERS, f"one of {KL_CONTROLLERS}")
        in_loss = self.kl_placement == "loss"
        allowed = LOSS_KL_ESTIMATORS if in_loss else REWARD_KL_ESTIMATORS
        if in_loss and self.kl_estimator == "k1":
            raise ValueError(
                "`kl_estimator='k1'` has no gradient in expectation, so in the loss it would not hold the actor to "
                "the reference. Use `kl_estimator='k2'`, or `kl_placement='reward'` to subtract k1 from the rewards "
                "as TRL 1.12 did."
            )
        self._require(
            "kl_estimator", self.kl_estimator in (None, *allowed), f"one of {allowed} in the {self.kl_placement}"
        )
        needs = {"kl_target": "proportional", "kl_horizon": "proportional"}
        for name, controller in needs.items():
            if getattr(self, name) is not None and self.kl_controller != controller:
                raise ValueError(f"`{name}` is read by `kl_controller='{controller}'` only; set that or remove it.")
        if self.kl_controller == "proportional" and self.kl_target is None:
            raise ValueError("`kl_controller='proportional'` needs `kl_target`, in nats per sequence.")
        low_high = self.kl_band if len(self.kl_band) == 2 else (1.0, 0.0)
        self._require("kl_band", 0 < low_high[0] < low_high[1], "two numbers, 0 < low < high")
        if self.kl_band != [0.5, 2.0] and self.kl_controller != "band":
            raise ValueError("`kl_band` is read by `kl_controller='band'` only; set that or remove it.")
        if self.kl_controller != "fixed" and self.kl_coef == 0:
            raise ValueError(f"`kl_controller='{self.kl_controller}'` scales `kl_coef`, which is 0; start above 0.")
        if self.old_kl_target is not None and self.old_kl_coef == 0:
            raise ValueError("`old_kl_target` steers `old_kl_coef`, which is 0; start it above 0.")

    def _require(self, name: str, holds: bool, needed: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be {needed}.")

    # ---- What GRPO and the Trainer read ----

    def _run_parent_post_init(self) -> None:
        """
        Runs GRPO's checks, and DeepSpeed's `auto`, on the derived values, then takes those back.

        GRPO refuses groups of one. Groups of two over twice the micro-batches pass its checks at every batch size.
        """
        derived = self._derived_values()
        counting = f"{self.local_batch_size} prompts of a rollout in `num_mini_batches={self.num_mini_batches}`"
        written = {name: getattr(self, name) for name in (*derived, "generation_batch_size")}
        for name, value in derived.items():
            setattr(self, name, value)
        self.num_generations, self.steps_per_generation = 2, 2 * derived["steps_per_generation"]
        try:
            super().__post_init__()
            check_batch_fields(self, counting)
        finally:
            for name, value in written.items():
                setattr(self, name, value)

    def _derived_values(self) -> dict[str, Any]:
        """The fields that GRPO and the Trainer's loop read."""
        micro_batch = self._local_micro_batch
        micro_batches = self.local_batch_size // micro_batch
        derived = {grpo_name: getattr(self, name) for name, grpo_name in GRPO_NAMES.items()}
        return derived | {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": micro_batches // self.num_mini_batches,
            "steps_per_generation": micro_batches,
            "num_generations": 1,
            "num_generations_eval": 1,
        }

    def for_trainer_loop(self) -> "PPOConfigX":
        """
        A copy with the values that GRPO and the Trainer's loop read: GRPO's names, the Trainer's own meaning of
        `gradient_accumulation_steps` (micro-batches per optimizer step), and `max_steps`. GRPO's `beta` is 0 in it,
        because the trainer holds the reference model itself. Its `to_dict()` is still the user's.
        """
        loop = copy.copy(self)
        for name, value in self._derived_values().items():
            setattr(loop, name, value)
        loop.generation_batch_size = self.batch_size
        if self.total_episodes is not None:
            loop.max_steps = math.ceil(self.total_episodes / self.batch_size) * self.optimizer_steps_per_rollout
        loop.kl_estimator = self.kl_estimator or ("k2" if self.kl_placement == "loss" else "k1")
        loop.beta = 0.0
        loop.disable_dropout = True
        if self.critic_warmup_steps:
            loop.ddp_find_unused_parameters = True  # DDP would wait for the actor's gradients
        loop._written = self
        return loop

    def build_kl_controllers(self) -> tuple[KLController, KLController]:
        """Controllers of `kl_coef` and of `old_kl_coef`."""
        reference: KLController = FixedController(self.kl_coef)
        if self.kl_controller == "proportional" and self.kl_target is not None:
            reference = ProportionalController(self.kl_coef, self.kl_target, self.kl_horizon or DEFAULT_KL_HORIZON)
        elif self.kl_controller == "band":
            reference = BandController(self.kl_coef, *self.kl_band)
        if self.old_kl_target is None:
            return reference, FixedController(self.old_kl_coef)
        return reference, SchulmanController(self.old_kl_coef, self.old_kl_target)

    def to_dict(self) -> dict[str, Any]:
        written = self._as_written
        if written is not self:
            return written.to_dict()
        hidden = super().to_dict()
        # The parent hides every field whose name ends in "_token", set or not; `stop_token` is no secret.
        unset = {name: None for name in hidden if name.endswith("_token") and getattr(written, name) is None}
        return hidden | unset | {"stop_token": written.stop_token}

    # ---- TRL 1.12's computed fields ----

    @property
    def local_batch_size(self) -> int:
        """Prompts per rollout on one rank."""
        written = self._as_written
        return written.per_device_train_batch_size * written.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Prompts per rollout on all ranks."""
        return self.local_batch_size * self.world_size

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward and backward pass on all ranks."""
        return self._local_micro_batch * self.world_size

    @property
    def local_mini_batch_size(self) -> int:
        """Sequences per optimizer step on one rank."""
        return self.local_batch_size // self.num_mini_batches

    @property
    def mini_batch_size(self) -> int:
        """Sequences per optimizer step on all ranks."""
        return self.local_mini_batch_size * self.world_size

    @property
    def num_total_batches(self) -> int | None:
        """Rollouts in the run; `None` when neither `total_episodes` nor `max_steps` fixes it."""
        if self.total_episodes is not None:
            return math.ceil(self.total_episodes / self.batch_size)
        return math.ceil(self.max_steps / self.optimizer_steps_per_rollout) if self.max_steps > 0 else None

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def needs_reference(self) -> bool:
        """Whether the run reads KL(π_θ ‖ π_ref)."""
        return self.kl_coef != 0

    @property
    def _as_written(self) -> "PPOConfigX":
        """The user's config, of which this is perhaps the loop's copy."""
        return self.__dict__.get("_written", self)

    @property
    def _local_micro_batch(self) -> int:
        """Sequences per forward and backward pass on one rank: the largest size that divides a mini-batch."""
        if self.local_batch_size % self.num_mini_batches:
            raise ValueError(
                f"A rollout holds {self.local_batch_size} prompts per rank (per_device_train_batch_size × "
                f"gradient_accumulation_steps), which num_mini_batches={self.num_mini_batches} does not divide. "
                "Change one of the three."
            )
        wanted = self._as_written.per_device_train_batch_size
        return max(size for size in range(1, wanted + 1) if self.local_mini_batch_size % size == 0)


def _default(config_class: type, name: str) -> Any:
    """Default of a dataclass field."""
    declared = next(f for f in fields(config_class) if f.name == name)
    return declared.default_factory() if callable(declared.default_factory) else declared.default
