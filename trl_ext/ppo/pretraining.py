"""
`CriticTrainerX`: pretrain the critic of a PPO run on responses of the policy that the run will start from.

VC-PPO (arXiv:2503.01491) finds that a critic which starts from a reward model misjudges early tokens, that the actor
learns from these errors before the critic has unlearned them, and that this makes PPO fail on long answers. So the
critic learns first, from the returns of a fixed policy (λ = 1), until the log shows that it knows them. Where this
differs: VC-PPO goes on sampling; here the policy samples once, and the critic reads its responses several times. So
responses can be held out, which say when to stop, and kept, for another critic.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging
from trl import GRPOTrainer

from .._trl import get_config_model_id
from ..masked import explained_variance, identity, masked_moments
from ..models.fingerprint import save_base_fingerprint
from ..models.loading import adapter_config
from ..models.sharding import is_fsdp, is_stage3
from ..models.trainable import take_back
from ..ranges import COUNT, default_of
from ..runs.card import card_name
from ..runs.folder import without_place
from .checkpoint import known_length
from .config import PPOConfigX
from .display import pretraining_plan, steps_of_pass
from .guards import require_finite_gradient, require_finite_scores, require_room
from .losses import value_loss
from .returns import estimate_returns
from .rewards import RunningMoments
from .roles.critic import POLICY, split_state_dict
from .roles.inputs import Given, resolve
from .roles.load import load_tokenizer, own_tokenizer
from .rollout import MicroBatch, Rollout
from .saved_rollouts import COLUMNS, FOLDER, facts_of, read, require_same, rollout_of, rows_of, write
from .trainer import PPOTrainerX


# Options of PPO's that say how the actor learns, or that the trainer sets: a recipe may have them, they are not read.
NOT_READ = (
    *("ref_model_quantization", "ref_adapter_name", "kl_controller", "kl_target", "kl_horizon", "kl_band"),
    *("old_kl_coef", "old_kl_target", "target_kl", "positive_nll_coef", "positive_min_score"),
    *("lam", "lam_alpha", "critic_lam", "critic_gate", "critic_warmup_steps", "critic_warmup_until"),
    *("policy_objective", "critic_steps", "rollout_lag", "max_steps", "num_sample_generations", "log_completions"),
    *("load_best_model_at_end", "metric_for_best_model", "eval_strategy", "eval_on_start", "save_on_signal"),
)
# Options of the critic beside the actor's -> what they are without an actor.
OWN = {
    "critic_learning_rate": "learning_rate",
    "critic_weight_decay": "weight_decay",
    "critic_lr_scheduler_type": "lr_scheduler_type",
    "critic_max_grad_norm": "max_grad_norm",
}
# What makes the returns those of the score alone, rewards-to-go without a KL, and the loss the plain value loss.
MONTE_CARLO = {
    "advantage_estimator": "reinforce_baseline",
    "whiten_advantages": False,
    "kl_coef": 0.0,
    "num_ppo_epochs": 1,
}
MONTE_CARLO |= {"vf_coef": 1.0, "cliprange_value": None}


@dataclass
class CriticConfigX(PPOConfigX):
    """
    Options of [`CriticTrainerX`]: those of [`PPOConfigX`], so that a recipe of PPO serves for both, and how long to
    train. What concerns the actor's learning is not read. `total_episodes` responses are sampled (unset: one pass over
    the prompts), `per_device_train_batch_size × gradient_accumulation_steps × world size` at a time, and so many, in
    `num_mini_batches` optimizer steps, are learned from at a time.

    Raises:
        ValueError: as [`PPOConfigX`]; for `whiten_rewards`, and for a checkpoint to resume from.
    """

    TOPIC: ClassVar[str] = "Value pretraining"

    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Folder of responses to learn from, `rollouts` in the output folder of an earlier run of the same "
            "policy, tokenizer, rewards and sampling options. Unset: sample them."
        },
    )
    max_passes: Annotated[int, COUNT] = field(
        default=10, metadata={"help": "Passes over the responses, at most. Integer >= 1."}
    )
    patience: Annotated[int, COUNT] = field(
        default=2,
        metadata={
            "help": "Passes without a rise of the explained variance on held-out responses that end the training "
            "(VC-PPO, arXiv:2503.01491, trains until it is high enough). Integer >= 1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whiten_rewards:
            raise ValueError(
                "`whiten_rewards` divides rewards by the deviation of their own rollout, so that a response has no "
                "return of its own to learn. Leave it out here and in PPO, or use PPO's `critic_warmup_steps`."
            )
        if self.resume_from_checkpoint:
            raise ValueError(
                "The critic's pretraining writes no checkpoints to resume from. Its responses are kept: give the "
                f"folder {FOLDER!r} of the output folder as `rollouts`."
            )


class CriticTrainerX(PPOTrainerX):
    """
    Trainer for PPO's critic alone, on rewards-to-go of responses that the fixed policy gave.

    `train()` samples with [`PPOTrainerX`]'s own code and options, scores, keeps the responses in the folder `rollouts`
    of the output folder (or reads them from `args.rollouts`), and trains until the explained variance of the critic on
    the held-out responses no longer rises. The critic then has the weights of its best pass, and `save_model` writes a
    folder that PPO's `value_model` takes.

    Args:
        args ([`CriticConfigX`]): configuration.
        train_dataset, eval_dataset: prompts to learn from and held-out prompts; not read with `args.rollouts`.
        given: the other arguments of [`PPOTrainerX`], by name. There is no reference.

    Raises:
        ValueError: as [`PPOTrainerX`]; for ZeRO-3 and FSDP, for responses of another policy, tokenizer, reward or
            other sampling options, and for responses whose returns are all equal.
        FloatingPointError: for a score, a value or a gradient that is not finite.
    """

    _tag_names: ClassVar = ["trl", "ppo", "critic", "trl-ext"]
    _warms_up = True  # the actor never learns
    control: Any  # the Trainer's

    def __init__(self, args: CriticConfigX, train_dataset: Any = None, eval_dataset: Any = None, **given: Any):
        if not isinstance(args, CriticConfigX):
            raise TypeError(f"`args` is a {type(args).__name__}; CriticTrainerX needs a `CriticConfigX`.")
        if is_stage3(args.deepspeed_plugin) or is_fsdp(args.fsdp):
            raise ValueError(
                "The critic is not pretrained under ZeRO-3 or FSDP, which partition the weights that it keeps of its "
                "best pass. Use ZeRO-2 or DDP, or PPO's `critic_warmup_until`."
            )
        named = {field.name for field in fields(Given)}
        of_base, known = resolve(args, **{"reward_funcs": None} | {k: v for k, v in given.items() if k in named})
        take_back(known.model)
        if known.model is not None:  # else PPO says so
            own = own_tokenizer(given.get("processing_class"), known, of_base)
            tokenizer = load_tokenizer(own, known.model, of_base)
            self._facts = facts_of(of_base, known, tokenizer, given.get("rollout_func"))
            if args.rollouts is not None:
                require_same(args.rollouts, self._facts)
        if args.rollouts is not None:
            sizes = (args.num_generations, args.num_generations_eval)
            train_dataset, eval_dataset = (
                rows.select(range(0, len(rows), n))
                .select_columns("prompt_ids")
                .rename_column("prompt_ids", "input_ids")
                for rows, n in zip(read(args.rollouts).values(), sizes, strict=True)
            )
        if not isinstance(eval_dataset, Dataset) or len(eval_dataset) == 0:
            raise ValueError(
                "There are no held-out prompts in `eval_dataset`, and responses to them say when the critic has "
                "learned enough. Pass a dataset of them; on the command line, a split `test` or `test_size`."
            )
        super().__init__(_of_critic(args), train_dataset=train_dataset, eval_dataset=eval_dataset, **given)
        of_critic = {id(parameter) for parameter in self.critic.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in of_critic:
                parameter.requires_grad_(False)
        self.prompts = self.train_dataset
        self.kept: dict[str, Dataset] = {}  # the responses, by split
        self._losses: list[Tensor] = []  # of the micro-batches of this optimizer step
        self._best: dict[str, Tensor] = {}  # the critic's weights at its best
        self.explained: list[float] = []  # of held-out returns: before the first pass, and after each

    # ---- The responses ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Sample, or read what was sampled, and train; a run cannot be resumed, but its responses be read again."""
        self._start_run()
        folder = self.args.rollouts or str(Path(self.args.output_dir) / FOLDER)
        if self.args.rollouts is None:
            # With PPO's own random numbers its first responses would be those that the critic has learned from.
            set_seed(self.args.seed + 1, device_specific=True)
            splits = {"train": self._sample_to_learn(), "held_out": self._sample_held_out()}
            if self.is_world_process_zero():
                write(folder, splits, self._facts)
            self.accelerator.wait_for_everyone()
            self._start_run()  # drops what sampling has logged
        self.kept = read(folder)
        of_train = self.kept["train"]
        self._moments = _FixedMoments(of_train["score"])
        for split in self.kept:
            self._require_spread(split)
        groups = range(0, len(of_train) - self.num_generations + 1, self.num_generations)
        self.train_dataset = Dataset.from_dict({"row": list(groups)})
        self.explained, self._best = [], {}
        args, steps = self.args, steps_of_pass(self.args, len(of_train))
        args.max_steps, args.eval_steps, args.eval_strategy = steps * args.max_passes, steps, IntervalStrategy.STEPS
        args.eval_on_start = True
        self.accelerator.print(pretraining_plan(args, *map(len, self.kept.values())))
        set_seed(args.seed)  # the same steps, whether the responses were sampled or read
        output = GRPOTrainer.train(self, **kwargs)
        for name, parameter in self.critic.named_parameters():
            if name in self._best:
                parameter.data.copy_(self._best[name])
        return output

    def _sample_to_learn(self) -> Dataset:
        """Return responses to the prompts to learn from, of all ranks."""
        args, self.train_dataset = self.args, self.prompts
        count = responses_to_sample(args, known_length(self.prompts)) // args.batch_size
        self.model.train()
        # GRPO's loader gives each batch once for every micro-batch.
        loader = chain.from_iterable(repeat(self.get_train_dataloader()))
        batches = islice(loader, 0, count * args.steps_per_generation, args.steps_per_generation)
        return self._sample(batches, count, "Sampling")

    def _sample_held_out(self) -> Dataset:
        """Return responses to the held-out prompts, of all ranks."""
        self.model.eval()
        loader = self.get_eval_dataloader()
        rows = self._sample(loader, len(loader), "Sampling, held out")
        return rows.select(range(min(len(rows), len(self.eval_dataset) * self.args.num_generations_eval)))

    def _sample(self, batches: Iterator[list[dict[str, Any]]] | Any, count: int, what: str) -> Dataset:
        parts = []
        silent = self.args.disable_tqdm or not self.is_world_process_zero()
        for prompts in logging.tqdm(batches, desc=what, total=count, disable=silent):
            rollout = self._generate_and_score_completions(prompts)
            require_room(rollout, self.args, self._tokenizer)
            parts.append(Dataset.from_list(gather_object(rows_of(rollout)), COLUMNS))
        return concatenate_datasets(parts)

    def _require_spread(self, split: str) -> None:
        """Raise `ValueError` if all returns of a split are equal: nothing is left to explain."""
        lowest, highest = math.inf, -math.inf
        for rollout in self._parts(split, 1):
            returns = torch.masked_select(*_returns(rollout))
            if len(returns):
                lowest, highest = min(lowest, returns.min().item()), max(highest, returns.max().item())
        if not highest > lowest:
            what = f"are all {lowest:g}" if highest == lowest else "have no score at all"
            raise ValueError(
                f"The returns of the {len(self.kept[split])} {split.replace('_', '-')} responses {what}: a constant "
                "explains them, and the critic has nothing to learn. Sample more responses, or look at the reward."
            )

    def _rollout(self, split: str, rows: list[int]) -> Rollout:
        """Return kept responses with their returns."""
        rollout = rollout_of(self.kept[split][rows], self._tokenizer.pad_token_id, self.accelerator.device)
        rollout.old_values = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
        estimate_returns(rollout, self.args, 0.0, self._moments, identity)
        return rollout

    def _parts(self, split: str, world: int) -> Iterator[Rollout]:
        """Yield this rank's share of a split, as many parts on every rank; what fills up the last counts nowhere."""
        count, size = len(self.kept[split]), self.args.per_device_eval_batch_size
        per_rank = math.ceil(count / world)
        own = [row * world + self.accelerator.process_index % world for row in range(per_rank)]
        for start in range(0, per_rank, size):
            rows = own[start : start + size]
            rollout = self._rollout(split, [min(row, count - 1) for row in rows])
            rollout.mask[[i for i, row in enumerate(rows) if row >= count]] = False
            yield rollout

    # ---- Learn ----

    def _collect_rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        n = self.num_generations
        return self._rollout("train", [row["row"] + k for row in rows[::n] for k in range(n)])

    def _compute_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        loss = self._critic_loss(model, inputs.sequences(), inputs)
        self._losses.append(loss.detach())
        return loss

    def _close_optimizer_step(self) -> None:
        loss = self._sum_over_ranks(torch.stack(self._losses).sum()).item() / self.accelerator.num_processes
        self._losses.clear()
        # In a log line it takes the place of the Trainer's mean.
        self._metrics["train"]["loss"].append(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm, which is the critic's; PPO's own method also notes that of the actor."""
        if self._leaves_out:
            return None
        grad_norm = GRPOTrainer._get_grad_norm(self, model, grad_norm)
        if not self.args.fp16:
            parameters, applied = self.critic.named_parameters(), self.is_deepspeed_enabled
            require_finite_gradient(grad_norm, parameters, self.state.global_step, applied)
        return grad_norm

    # ---- Measure ----

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return how much of the held-out returns the critic explains; keep its weights when that is the most yet."""
        self.model.eval()
        values, returns = [], []
        with self.phases.during("evaluate"):
            for rollout in self._parts("held_out", self.accelerator.num_processes):
                read: Any = self._read(self.model, rollout, ("state_values",)).state_values
                rollout.old_values = read
                require_finite_scores(rollout, self.state.global_step)
                values.append(torch.masked_select(read, rollout.mask).float())
                returns.append(torch.masked_select(*_returns(rollout)))
        value, goal = torch.cat(values), torch.cat(returns)
        counts = torch.ones_like(goal, dtype=torch.bool)
        explained = explained_variance(value, goal, counts, self._sum_over_ranks).item()
        loss = masked_moments(value_loss(value, goal), counts, self._sum_over_ranks)[1].item()
        metrics = {"eval_loss": loss, "eval_value/explained_variance_mc": explained}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._judge(explained)
        return metrics

    def _judge(self, explained: float) -> None:
        """Keep the critic if it is the best yet; end the training if it has long been no better."""
        if not self.explained or explained > max(self.explained):
            trained = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
        self.explained.append(explained)
        if len(self.explained) - 1 - self.best_pass >= self.args.patience:
            self.control.should_training_stop = True

    @property
    def best_pass(self) -> int:
        """The pass after which the critic explained most, 0 for none."""
        return self.explained.index(max(self.explained))

    # ---- Say and save ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the critic, with the tokenizer and what the policy is known by, for `value_model`."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:
            return
        of_all = self.model.state_dict() if state_dict is None else state_dict
        self.critic.save_pretrained(folder, split_state_dict(self.model, self.critic, of_all)[1])
        self._tokenizer.save_pretrained(folder)
        (folder / POLICY).write_text(json.dumps(self._facts["policy"], indent=2) + "\n", encoding="utf-8")
        if adapter_config(str(folder)) is not None:
            base: Any = self.model.config
            save_base_fingerprint([folder], get_config_model_id(base), getattr(base, "_commit_hash", None))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write what the critic was trained on, how well it knows it, and how PPO takes it."""
        if not self.is_world_process_zero():
            return
        rows = {
            "policy": without_place(self._facts["policy"]["name"]),
            "rewards": ", ".join(self.reward_func_names),
            "prompts": dataset_name and without_place(dataset_name),
            "critic": self.args.critic,
            "responses learned from, held out": ", ".join(str(len(rows)) for rows in self.kept.values()),
            "optimizer steps": self.state.global_step,
        }
        if self.explained:
            rows["explained variance of held-out returns"] = (
                f"{max(self.explained):.3f} after {self.best_pass} passes, {self.explained[0]:.3f} before"
            )
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
        text = CARD.format(name=model_name or card_name(self), table=table)
        (Path(self.args.output_dir) / "README.md").write_text(text, encoding="utf-8")


def _returns(rollout: Any) -> tuple[Tensor, Tensor]:
    """Return the returns and where they count, (B, T) each."""
    return rollout.returns, rollout.mask


def responses_to_sample(args: PPOConfigX, num_prompts: int | None) -> int:
    """Return how many responses are learned from; a stream has no `num_prompts`."""
    if args.total_episodes is not None:
        return math.ceil(args.total_episodes / args.batch_size) * args.batch_size
    if num_prompts is None:
        raise ValueError("The prompts are a stream, which has no length: set `total_episodes`.")
    return num_prompts // args.num_prompts * args.batch_size


class _FixedMoments(RunningMoments):
    """The moments of all scores at once, which those of a part do not move."""

    def __init__(self, scores: list[float | None]):
        super().__init__()
        known = torch.tensor([score for score in scores if score is not None])
        super().update(known)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are there."""


CARD = """\
---
library_name: transformers
tags: [trl, ppo, critic, trl-ext]
---

# {name}

A critic for PPO, pretrained by `trl_ext.CriticTrainerX` on rewards-to-go of responses that a fixed policy gave
([VC-PPO](https://huggingface.co/papers/2503.01491)).

| | |
|---|---|
{table}

A PPO run that starts from this policy takes the folder as `value_model`.
"""


def _of_critic(args: CriticConfigX) -> CriticConfigX:
    """Return the options with everything at its default that concerns the actor's learning, or that is set here."""
    changed: dict[str, Any] = {name: default_of(CriticConfigX, name) for name in NOT_READ}
    for name, usual in OWN.items():
        if getattr(args, name) is not None:
            changed |= {usual: getattr(args, name), name: None}
    return replace(args, **changed | MONTE_CARLO | {"save_strategy": "no"})
