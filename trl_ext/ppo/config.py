"""`PPOConfigX`: TRL 1.12's `PPOConfig` option names on top of `trl.GRPOConfig`.

The config holds what the user wrote and nothing derived from it, so that a copy made by `dataclasses.replace` or from
`to_dict()` is the same config. GRPO and the Trainer's loop read another type, `PPOLoopConfig`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from trl import GRPOConfig

from ..models.precision import computes_in_bf16
from ..models.sharding import check_batch_fields, check_own_sections, check_passes_of_a_step
from ..packing.budget import size_of_parts
from ..ranges import check_ranges, default_of
from ..runs.requirements import check_startable, require_device
from ..runs.saving import SavingOptions, check_saving
from .config_checks import BEST_METRIC, check_engine, check_options, check_sampling
from .options import (
    AdvantageOptions,
    BatchOptions,
    CriticOptions,
    FrozenModelOptions,
    GRPONames,
    KLOptions,
    LossOptions,
    ModelOptions,
    ResponseOptions,
    RewardCallOptions,
    RewardOptions,
)


# One name for one thing: the left name is the option, GRPO's name on the right is set from it.
GRPO_NAMES = {
    "response_length": "max_completion_length",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "cliprange_high": "epsilon_high",
    "dual_clip": "delta",
    "num_ppo_epochs": "num_iterations",
    "ent_coef": "entropy_coef",
}


@dataclass
class PPOConfigX(  # a dataclass has the fields of its last base first, so `--help` shows the topics from below
    GRPONames,
    CriticOptions,
    AdvantageOptions,
    LossOptions,
    KLOptions,
    RewardCallOptions,
    RewardOptions,
    ResponseOptions,
    FrozenModelOptions,
    ModelOptions,
    BatchOptions,
    SavingOptions,
    GRPOConfig,
):
    """
    Configuration of [`PPOTrainerX`]: the option names of TRL 1.12's `PPOConfig`, and every option of `GRPOConfig` and
    `TrainingArguments` that means something in PPO.

    Every field's help states its unit and, where Zhang 2025 §6.2 (docs/theory.md) recommends a value, that value.
    Batch arithmetic, as in TRL 1.12: the rollout holds `per_device_train_batch_size × gradient_accumulation_steps ×
    world size` responses, to 1 / `num_generations` as many prompts. A mini-batch is rollout / `num_mini_batches`, and
    a rollout is learned from in `num_ppo_epochs × num_mini_batches` optimizer steps. `logging_steps`, `eval_steps`,
    `save_steps` and `max_steps` count those.

    Raises:
        ValueError: for an option outside its range, two names of one option set differently, or an option of GRPO set
            that means nothing in PPO. "Set" means different from the default.
    """

    ALGORITHM: ClassVar[str] = "PPO"
    STATE_BY_PROCESS: ClassVar[bool] = True

    def __post_init__(self):
        check_startable(self)
        self._take_grpo_names()
        check_ranges(self)
        self.kl_band = [float(end) for end in self.kl_band]
        check_options(self)
        check_saving(self)
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = BEST_METRIC  # the Trainer would take the held-out loss, which PPO lacks
        if getattr(self, "bf16", None) is None:
            self.bf16: bool | None = not self.fp16 and computes_in_bf16(self.use_cpu)
        self._run_parent_post_init()
        check_sampling(self)
        unread = self.of_optimizer | self.of_scheduler
        check_own_sections(self.deepspeed_plugin, optimizer=unread, scheduler=self.of_scheduler)
        check_engine(self)
        check_passes_of_a_step(self.deepspeed_plugin, self.micro_batch_tokens)
        require_device(self)

    def _take_grpo_names(self) -> None:
        """Let GRPO's name set an option that is at its default; raise `ValueError` for two different values."""
        for name, grpo_name in GRPO_NAMES.items():
            value, grpo_value = getattr(self, name), getattr(self, grpo_name)
            if grpo_value is None or grpo_value == value:
                setattr(self, grpo_name, None)
                continue
            if value != default_of(type(self), name):
                raise ValueError(
                    f"`{name}={value}` and `{grpo_name}={grpo_value}` are two names of one option, set differently. "
                    f"Keep `{name}` and remove `{grpo_name}`."
                )
            setattr(self, name, grpo_value)
            setattr(self, grpo_name, None)

    # ---- What GRPO and the Trainer read ----

    def _run_parent_post_init(self) -> None:
        """
        Run GRPO's checks, and DeepSpeed's `auto`, on the derived values, then restore the written ones.

        GRPO refuses groups of one. Groups of two over twice the micro-batches pass its checks at every batch size.
        """
        derived = self._derived_values()
        counting = f"{self.local_batch_size} responses of a rollout in `num_mini_batches={self.num_mini_batches}`"
        of_groups = ("generation_batch_size", "num_generations", "num_generations_eval")
        written = {name: getattr(self, name) for name in (*derived, *of_groups)}
        for name, value in derived.items():
            setattr(self, name, value)
        self.num_generations, self.num_generations_eval = 2, 1
        self.steps_per_generation = 2 * derived["steps_per_generation"]
        try:
            super().__post_init__()
            check_batch_fields(self, counting)
        finally:
            for name, value in written.items():
                setattr(self, name, value)

    def _derived_values(self) -> dict[str, Any]:
        """Return the fields that GRPO and the Trainer's loop read."""
        micro_batch = self._local_micro_batch
        micro_batches = self.local_batch_size // micro_batch
        derived = {grpo_name: getattr(self, name) for name, grpo_name in GRPO_NAMES.items()}
        return derived | {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": micro_batches // self.num_mini_batches,
            "steps_per_generation": micro_batches,
        }

    def to_dict(self) -> dict[str, Any]:
        hidden = super().to_dict()
        # The parent hides every field whose name ends in "_token", set or not; `stop_token` is no secret.
        unset = {name: None for name in hidden if name.endswith("_token") and getattr(self, name) is None}
        if self.lam_alpha is not None:
            del hidden["lam"]  # nobody has written it; read from a file, it would count as written
        return hidden | unset | {"stop_token": self.stop_token}

    # ---- TRL 1.12's computed fields ----

    @property
    def local_batch_size(self) -> int:
        """Responses per rollout on one rank."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Responses per rollout on all ranks."""
        return self.local_batch_size * self.world_size

    @property
    def num_prompts(self) -> int:
        """Prompts per rollout on all ranks."""
        return self.batch_size // self.num_generations

    @property
    def of_optimizer(self) -> dict[str, Any]:
        """Options of the critic that the optimizer's parameter groups follow, by name; None: unset."""
        options = {name: getattr(self, name) for name in ("critic_learning_rate", "critic_weight_decay")}
        if self.deepspeed_plugin is not None:  # which steps what has no gradient
            options |= {"critic_steps": self.critic_steps if self.critic_steps > 1 else None}
            options |= {"critic_warmup_steps": self.critic_warmup_steps or None}
            options |= {"critic_warmup_until": self.critic_warmup_until}
        return options

    @property
    def of_scheduler(self) -> dict[str, Any]:
        """The same of the learning rate's schedule."""
        return {"critic_lr_scheduler_type": self.critic_lr_scheduler_type}

    @property
    def reads_old_policy(self) -> bool:
        """Return whether the run reads the log-probabilities under the policy at the start of a rollout."""
        in_reward = self.needs_reference and self.kl_placement == "reward"
        return in_reward or self.old_kl_coef != 0 or self.target_kl is not None

    @property
    def shares_prompts(self) -> bool:
        """Return whether several responses to a prompt are scored or learned from together."""
        return max(self.num_generations, self.num_generations_eval) > 1

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward and backward pass on all ranks; with `micro_batch_tokens` those of a mini-batch."""
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
    def warms_up_critic(self) -> bool:
        """Return whether the run begins with steps in which only the critic learns."""
        return self.critic_warmup_steps > 0 or self.critic_warmup_until is not None

    @property
    def needs_reference(self) -> bool:
        """Return whether the run reads KL(π_θ ‖ π_ref)."""
        return self.kl_coef != 0

    @property
    def _local_micro_batch(self) -> int:
        """
        Sequences per forward and backward pass on one rank: the largest number that divides a mini-batch, and keeps
        the responses to a prompt together if it can. With `micro_batch_tokens` the whole mini-batch, which is cut
        later.
        """
        if self.local_batch_size % self.num_mini_batches:
            raise ValueError(
                f"A rollout holds {self.local_batch_size} responses per rank (`per_device_train_batch_size` × "
                f"`gradient_accumulation_steps`), which `num_mini_batches={self.num_mini_batches}` does not divide. "
                f"Set `num_mini_batches` to {_or(divisors(self.local_batch_size))}, or change one of the other two."
            )
        n, mini_batch = self.num_generations, self.local_mini_batch_size
        if mini_batch % n:
            able = divisors(mini_batch)
            nearest = [max(e for e in able if e < n), *[e for e in able if e > n][:1]]
            raise ValueError(
                f"`num_generations={n}` does not divide a rank's mini-batch of {mini_batch} responses, in which those "
                f"to a prompt stay together. The nearest that do: {', '.join(map(str, nearest))}; or change "
                "`per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`."
            )
        if self.micro_batch_tokens is not None:
            return mini_batch
        return size_of_parts(self.per_device_train_batch_size, mini_batch, n)


def divisors(number: int) -> list[int]:
    """Return the numbers that divide a number, from 1 to itself."""
    return [each for each in range(1, number + 1) if number % each == 0]


def _or(numbers: list[int]) -> str:
    """Return the first five numbers in words: "1, 2 or 4"."""
    *some, last = [str(number) for number in numbers[:5]]
    return f"{', '.join(some)} or {last}" if some else last


class PPOLoopConfig(PPOConfigX):
    """
    The values that GRPO and the Trainer's loop read, derived from the written options: GRPO's names, `max_steps`, and
    `gradient_accumulation_steps` as the Trainer means it (micro-batches per optimizer step). GRPO's `beta` is 0,
    because the trainer holds the reference model itself. Its `to_dict()` is that of the written options.
    """

    def __init__(self, written: PPOConfigX):
        self.__dict__.update(written.__dict__)
        self.written = written
        for name, value in written._derived_values().items():
            setattr(self, name, value)
        self.generation_batch_size = written.batch_size
        if written.total_episodes is not None:
            rollouts = math.ceil(written.total_episodes / written.batch_size)
            self.max_steps = rollouts * written.optimizer_steps_per_rollout
        self.kl_estimator = written.kl_estimator or ("k2" if written.kl_placement == "loss" else "k1")
        self.beta = 0.0
        if written.warms_up_critic or written.critic_steps > 1:
            self.ddp_find_unused_parameters = True  # DDP would wait for the actor's gradients

    def to_dict(self) -> dict[str, Any]:
        return self.written.to_dict()

    @property
    def local_batch_size(self) -> int:
        return self.written.local_batch_size

    @property
    def _local_micro_batch(self) -> int:
        return self.written._local_micro_batch
