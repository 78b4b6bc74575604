"""`SampleCallback`: show how the model completes fixed prompts as it learns, beside the reference."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, logging

from ..models.generation import complete
from ..report.credit import FOLDER, NUMBERS, Credit, prompt_text, terminal_text
from ..report.tables import score_text
from ..runs.tables import show_table
from .tables import ModelTable, Row, table_path, text_of, tokenizer_of, write_credit


logger = logging.get_logger(__name__)

Prompt = str | list[dict[str, Any]]


class SampleCallback(TrainerCallback):
    """
    Completes the same prompts every `every` steps and at the end, and shows them beside the reference's completions: a
    table on the terminal, and `samples/step_<step>.jsonl` in the run's folder, which the report shows. Decoding is
    greedy, so only the model changes and no random number is drawn. The reference is the model as it is when training
    starts, so no second model is held in memory. For any trainer of a causal language model; those here also show
    completions of held-out prompts (`generate_during_eval`, `log_completions`).

    With `PPOTrainerX` and `DPOTrainerX` it also shows a few answers of the last batch by token, coloured by a number
    of theirs, `credit_by`, and writes them to `credit/step_<step>.jsonl`.

    Args:
        prompts: texts, or conversations, which the tokenizer's chat template renders.
        every: optimizer steps.
        max_new_tokens: length of a completion, at most.
        reference: another model to compare with.
        credit: answers, or pairs, that are shown by token. 0: none.
        credit_by: the number that colours the tokens on the terminal: "advantage", "value", "log_ratio" (to the
            reference) or "reward" of PPO, "implicit_reward" of DPO. Unset: advantage or implicit reward.

    Raises:
        ValueError: for no prompts, `every` below 1, `credit` below 0, or an unknown `credit_by`.
    """

    read_credit: Callable[[], list[Row]] | None = None  # a trainer's, who has one

    def __init__(
        self,
        prompts: Sequence[Prompt],
        every: int = 100,
        max_new_tokens: int = 64,
        reference: Any = None,
        credit: int = 2,
        credit_by: str | None = None,
    ):
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"`prompts` is {prompts!r}; give a list of at least one text or conversation.")
        for name, value in (("every", every), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if credit < 0:
            raise ValueError(f"`credit` is {credit}; it must be 0, for no answers by token, or more.")
        self.prompts, self.every, self.max_new_tokens = list(prompts), every, max_new_tokens
        if credit_by is not None and credit_by not in NUMBERS:
            raise ValueError(f"`credit_by` is {credit_by!r}; it must be one of {tuple(NUMBERS)}, or unset.")
        self.credit, self.credit_by = credit, credit_by
        self._table = ModelTable(
            folder="samples",
            title="fixed prompts, actor and reference",
            shown=("prompt", "actor", "reference"),
            ask=self._complete,
            rows=self._rows,
            recall=self._recall,
            reference=reference,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._table.begin(args, state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._again(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._again(args, state, **kwargs)

    def _again(self, args: Any, state: Any, **kwargs: Any) -> None:
        if self._table.again(args, state, **kwargs) and self.read_credit is not None:
            answers = self.read_credit()
            write_credit(table_path(args.output_dir, FOLDER, state.global_step), state.global_step, answers)
            self._show_credit(Credit(state.global_step, answers))

    def _show_credit(self, credit: Credit) -> None:
        if not credit.numbers:
            return
        name = self.credit_by or credit.numbers[0]
        if name not in credit.numbers:
            logger.warning_once(f"`credit_by={name!r}` is not known in this run, which has {credit.numbers}.")
            name = credit.numbers[0]
        end = credit.end_of_scale(name)
        title = f"Step {credit.step}: tokens by {NUMBERS[name][0]}, −{end:.3g} orange, +{end:.3g} blue"
        columns = ("prompt", "", "score", "answer")
        rows = [
            (prompt_text(answer), answer["kind"], score_text(answer["score"]), terminal_text(answer, name, end))
            for answer in credit.answers
        ]
        show_table(title, columns, rows)

    def _rows(self, args: Any, actor: list[str], reference: list[str]) -> list[Row]:
        return [
            {"prompt": text_of(prompt), "actor": mine, "reference": other}
            for prompt, mine, other in zip(self.prompts, actor, reference, strict=True)
        ]

    def _recall(self, rows: list[Row]) -> list[str] | None:
        are_these = [row["prompt"] for row in rows] == [text_of(prompt) for prompt in self.prompts]
        return [row["reference"] for row in rows] if are_these else None

    def _complete(self, model: Any, processing_class: Any) -> list[str]:
        tokenizer = tokenizer_of(processing_class)
        texts = [
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in self.prompts
        ]
        device = next(model.parameters()).device
        return complete(model, tokenizer, tokenizer(texts)["input_ids"], self.max_new_tokens, device)
