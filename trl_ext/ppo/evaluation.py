"""Evaluation: held-out prompts are answered; their scores, the rise since the first evaluation, and the KL."""

import copy
import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from zlib import crc32

import torch
from datasets import IterableDataset
from torch import Tensor, nn

from ..models.rounding import warn_of_casting
from ..runs.best_metric import evaluated
from ..runs.requirements import require_full_batch
from ..runs.trackio_run import go_on_logging
from .config import PPOConfigX
from .data import WholeStream, rows_of
from .display import print_samples
from .guards import require_room
from .metrics import held_out_responses, held_out_score, means_of_batches, scores_by_prompt
from .returns import sequence_kl
from .rollout import Rollout


def samples_are_due(args: PPOConfigX, global_step: int, max_steps: int) -> bool:
    """Return whether to print samples before the next rollout, as is done `num_sample_generations` times in a run."""
    if args.num_sample_generations == 0:
        return False
    rollouts = math.ceil(max_steps / args.optimizer_steps_per_rollout)
    every = max(1, rollouts // args.num_sample_generations)
    return global_step // args.optimizer_steps_per_rollout % every == 0


def named_after_set(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """
    Return the metrics under keys of their held-out set, if there are several; GRPO's log puts "eval_" before them.

    `prefix` is the Trainer's, such as "eval_news", or "eval" for a single set.
    """
    name = prefix.removeprefix("eval").removeprefix("_")
    return {f"{name}_{key}" if name else key: value for key, value in metrics.items()}


def lengths_and_ends(
    ids: list[list[int]], tool_mask: list[list[int]] | None, end_ids: Container[int], device: torch.device
) -> dict[str, Tensor]:
    """
    Return two columns (b,) of b responses: `length`, the number of tokens that the model wrote, and `ended`, 1 if it
    ended with an end token. `tool_mask` is 0 at tokens that a tool wrote.
    """
    lengths = [len(row) for row in ids] if tool_mask is None else [sum(row) for row in tool_mask]
    columns = {"length": lengths, "ended": [row[-1] in end_ids for row in ids]}
    return {name: torch.tensor(column, dtype=torch.float32, device=device) for name, column in columns.items()}


def of_sampling(batch: dict[str, Any]) -> dict[str, Tensor]:
    """
    Return columns (b,) of the differences between vLLM's probabilities and the trainer's, counted as GRPO does:
    log-probabilities where vLLM gave one, the correction everywhere. No columns without that correction.
    """
    if "importance_sampling_ratio" not in batch:
        return {}
    counts = batch["completion_mask"].bool() & batch.get("tool_mask", batch["completion_mask"]).bool()
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
    ratio = batch["importance_sampling_ratio"]
    of_tokens = ratio.shape == counts.shape  # or of whole responses
    corrected = counts if of_tokens else torch.ones_like(ratio, dtype=torch.bool)
    columns = {}
    for name, values, mask in (
        ("sampling_logp_difference", difference, counts & ~difference.isnan()),
        ("importance_sampling_ratio", ratio, corrected),
    ):
        columns[f"sampling/{name}/sum"] = values.masked_fill(~mask, 0).sum(1)
        columns[f"sampling/{name}/count"] = mask.sum(1).float()
        columns[f"sampling/{name}/min"] = values.masked_fill(~mask, torch.inf).amin(1)
        columns[f"sampling/{name}/max"] = values.masked_fill(~mask, -torch.inf).amax(1)
    return columns


class HeldOut:
    """
    The evaluations of a run: each collects its batches, and is compared with the first one of the same prompts.

    Args:
        num_generations: responses to each prompt, one after the other.
    """

    def __init__(self, num_generations: int = 1):
        self._num_generations = num_generations
        self._first_scores: dict[tuple[str, int], Tensor] = {}

    def start(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Begin an evaluation; `gather` makes of this rank's (b,) those of all ranks."""
        self._gather = gather
        self._scores: list[Tensor] = []
        self._kls: list[Tensor] = []
        self._prompts: list[str] = []
        self._responses: list[dict[str, Tensor]] = []
        self._said: list[dict[str, float]] = []
        self._sizes: list[int] = []

    def state_dict(self) -> dict[tuple[str, int], Tensor]:
        """Return the first scores of every set of prompts, for a checkpoint."""
        return self._first_scores

    def load_state_dict(self, state: dict[tuple[str, int], Tensor]) -> None:
        self._first_scores = dict(state)

    @property
    def num_batches(self) -> int:
        """Number of batches that this rank has answered in this evaluation."""
        return len(self._scores)

    def add(
        self, rollout: Rollout, rows: list[dict[str, Any]], responses: dict[str, Tensor], said: dict[str, float]
    ) -> None:
        """
        Add a batch, with its KL if the reference has scored it.

        Args:
            responses: columns (b,) for `held_out_responses`, of this rank.
            said: GRPO's other metrics of the batch, over all ranks.
        """
        self._said.append(said)
        self._sizes.append(len(rows))
        self._scores.append(self._gather(rollout.scores.masked_fill(~rollout.scored, torch.nan)))
        self._responses.append({name: self._gather(column) for name, column in responses.items()})
        self._prompts += [str(row.get("prompt", row.get("input_ids"))) for row in rows]
        if rollout.old_logps is not None and rollout.ref_logps is not None:
            self._kls.append(self._gather(sequence_kl(rollout.old_logps, rollout.ref_logps, rollout.mask)))

    def metrics(self, prefix: str, num_rows: int | None = None) -> dict[str, list[float]]:
        """
        Return the log entries of this evaluation, as GRPO keeps them.

        Args:
            prefix: tells held-out sets apart.
            num_rows: responses to the prompts of the set; those behind them only fill up the last batch. `None`: none
                do.
        """

        def of_all_batches(batches: list[Tensor]) -> Tensor:
            rows = torch.cat(batches)[:num_rows]
            return rows[: len(rows) - len(rows) % self._num_generations]  # `dataloader_drop_last` may cut a group

        # A checksum, so that a resumed run recognises the prompts.
        of_responses, same_prompts = of_all_batches(self._scores), (prefix, crc32(repr(self._prompts).encode()))
        scores = of_responses.view(-1, self._num_generations).nanmean(1)
        line = held_out_score(scores, self._first_scores.get(same_prompts))
        self._first_scores.setdefault(same_prompts, scores)
        if self._num_generations > 1:
            best = scores_by_prompt(of_responses, self._num_generations)["best_of_n"]
            known = best[~best.isnan()]
            if len(known):
                line["best_of_n"] = known.mean().item()
        metrics = {f"reward/{key}": [value] for key, value in line.items()}
        columns = {name: of_all_batches([batch[name] for batch in self._responses]) for name in self._responses[0]}
        said = means_of_batches(self._said, self._sizes) | held_out_responses(columns)
        metrics |= {key: [value] for key, value in said.items()}
        if self._kls:
            kls = of_all_batches(self._kls)
            known = kls[~kls.isnan()]
            if len(known):
                metrics["kl/ref"] = [known.mean().item()]
        return metrics


class AnswersHeldOut:
    """A trainer of PPO whose evaluation answers held-out prompts and scores them. Name it before TRL's trainer."""

    args: Any
    state: Any
    accelerator: Any
    model: Any
    run_state: Any
    phases: Any
    eval_dataset: Any
    num_generations_eval: int
    _tokenizer: Any
    _metrics: Any
    _responses: Any
    _prepare_inputs: Any
    _generate_and_score_completions: Any
    _score_with_models: Any

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Answer and score held-out prompts; PPO has no held-out loss."""
        self._prepare_inputs(inputs)
        return None, None, None

    def _collect_held_out(self, rows: list[dict[str, Any]]) -> Rollout:
        # Every evaluation draws the same random numbers, so that two of them differ only by the policy.
        batch = self.run_state.held_out.num_batches * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(self.args.seed + batch)
        metrics = self._metrics["eval"]
        before = {name: len(values) for name, values in metrics.items()}
        rollout = self._generate_and_score_completions(rows)
        if self.args.needs_reference:
            require_room(rollout, self.args, self._tokenizer, ["score_batch_tokens"])
            self._score_with_models(rollout)
        said = {name: values[-1] for name, values in metrics.items() if len(values) > before.get(name, 0)}
        self.run_state.held_out.add(rollout, rows, self._responses, said)
        return rollout

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        evaluate: Any = super()._evaluate  # type: ignore[misc]
        return evaluated(evaluate, self.args.metric_for_best_model, *args, **kwargs)

    @contextmanager
    def _several_responses(self) -> Iterator[None]:
        """Within the context, the samplers of held-out prompts repeat each as often as it is answered."""
        self.num_generations_eval = self.args.num_generations_eval
        try:
            yield
        finally:
            self.num_generations_eval = 1

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        stream = WholeStream(dataset) if isinstance(dataset, IterableDataset) else dataset
        return super()._get_dataloader(stream, *args, **kwargs)  # type: ignore[misc]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._several_responses():
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        if isinstance(test_dataset, IterableDataset):  # GRPO would not repeat the prompts of a stream
            return self.get_eval_dataloader(test_dataset)
        with self._several_responses():
            return super().get_test_dataloader(test_dataset)  # type: ignore[misc]

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        warn_of_casting(self)
        go_on_logging(self)
        held_out = self.run_state.held_out
        held_out.start(self.accelerator.gather)
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # training draws as without
            with self.phases.during("evaluate"):
                output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        prefix, num_rows = kwargs.get("metric_key_prefix", "eval"), rows_of(dataloader.dataset, self.args)
        if not held_out.num_batches:
            require_full_batch(num_rows or 0, "the held-out set", self.args)
        metrics = self._metrics["eval"] | held_out.metrics(prefix, num_rows)
        self._metrics["eval"].clear()
        self._metrics["eval"] |= named_after_set(metrics, prefix)
        return output

    def generate_completions(self, sampling: bool = False) -> None:
        """
        Print responses to the prompts of `eval_dataset` with their scores, as TRL 1.12 did.

        Args:
            sampling: only the first batch.
        """
        if self.eval_dataset is None:
            return
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        was_training, logged = self.model.training, copy.deepcopy(self._metrics["eval"])
        self.model.eval()
        try:
            for dataset in datasets.values():
                for rows in islice(self.get_eval_dataloader(dataset), 1 if sampling else None):
                    rollout = self._generate_and_score_completions(rows)
                    print_samples(rollout, self._tokenizer, self.accelerator, self.state.global_step)
        finally:
            self.model.train(was_training)
            self._metrics["eval"] = logged
