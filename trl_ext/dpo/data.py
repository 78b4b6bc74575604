"""Pairs: those that are dropped, the check that some are left, and the `source` column's way into a batch."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any

from datasets import Dataset, IterableDataset
from trl import maybe_extract_prompt

from ..data.formats import LOOKED_AT, column_names
from ..data.pairs import NEEDED
from ..models.loading import check_known


logger = logging.getLogger(__name__)

COLUMNS = ("prompt", *NEEDED)
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
SOURCE = "source"


def warn_of_user_turns(dataset: Any, name: str) -> None:
    """Warn of answers with turns of the user, or of a tool: DPO scores them as if the model had said them."""
    for row in islice(iter(dataset.select_columns([c for c in COLUMNS if c in column_names(dataset)])), LOOKED_AT):
        pair: Any = maybe_extract_prompt(row)
        roles = {message["role"] for side in NEEDED if isinstance(pair.get(side), list) for message in pair[side]}
        others = sorted(roles - {"assistant"})
        if others:
            logger.warning(
                "Answers of the %s dataset go on over turns of the role %s, whose words are learnt like the model's "
                "own. If only the model's words are to count, end both answers before the first of these turns.",
                name,
                " and ".join(others),
            )
            return


def drop_equal_pairs(dataset: Any, name: str) -> Any:
    """Return the dataset without rows whose completions are equal, and say how many: there is nothing to prefer."""
    kept = dataset.filter(_differs, input_columns=list(NEEDED))  # images stay undecoded
    if isinstance(dataset, IterableDataset):
        logger.info("Rows of the %s dataset whose `chosen` equals `rejected` are dropped as they come.", name)
    else:
        dropped = len(dataset) - len(kept)
        if len(kept) == 0:
            raise ValueError(f"In all {dropped} rows of the {name} dataset `chosen` equals `rejected`.")
        if dropped:
            logger.warning(
                "Dropped %d of %d rows of the %s dataset: `chosen` equals `rejected`.", dropped, len(dataset), name
            )
    return kept


def _differs(chosen: Any, rejected: Any) -> bool:
    return chosen != rejected


def check_rows_known(dataset: Any, name: str, tokenizer: Any, known: int | None) -> Any:
    """Return the tokenised dataset; `ValueError` for an id, or a pad token, beyond the policy's `known` ones."""
    check_known([tokenizer.pad_token_id], known, tokenizer, "The policy", "the pad token")

    def check(*ids: list[int]) -> bool:
        check_known(chain(*ids), known, tokenizer, "The policy", f"a row of the {name} dataset")
        return True

    if isinstance(dataset, IterableDataset):
        return dataset.filter(check, input_columns=IDS)
    for row in zip(*(dataset[column] for column in IDS), strict=True):
        check(*row)
    return dataset


def drop_equal_tokens(dataset: Any, name: str, max_length: int | None, truncation_mode: str) -> Any:
    """Return the tokenised dataset without rows whose completions are equal as the model sees them."""
    keep = partial(_differs_cut, max_length=max_length, from_end=truncation_mode == "keep_end")
    kept = dataset.filter(keep, input_columns=IDS)
    dropped = len(dataset) - len(kept) if isinstance(dataset, Dataset) else 0
    what = f"`chosen` and `rejected` have the same tokens within `max_length={max_length}`"
    if dropped and len(kept) == 0:
        raise ValueError(f"In all {dropped} rows of the {name} dataset {what}. Raise `max_length`.")
    if dropped:
        logger.warning("Dropped %d of %d rows of the %s dataset: %s.", dropped, len(dataset), name, what)
    return kept


def _differs_cut(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int | None, from_end: bool
) -> bool:
    if max_length is None:
        return chosen != rejected
    if from_end:
        return (prompt + chosen)[-max_length:] != (prompt + rejected)[-max_length:]
    return chosen[: max_length - len(prompt)] != rejected[: max_length - len(prompt)]


def check_tokenised(
    dataset: Any, name: str, rows_before: int | None, max_length: int | None, context: int | None
) -> None:
    """
    Raise `ValueError` for completions of no tokens, sequences beyond the model's `context`, or no rows left of a
    tokenised dataset, of which TRL drops those whose prompt fills `max_length`; nothing is known of a stream.
    """
    if not isinstance(dataset, Dataset) or rows_before is None:
        return
    dropped = rows_before - len(dataset)
    if len(dataset) == 0:
        raise ValueError(
            f"The prompts of all {dropped} rows of the {name} dataset have at least `max_length={max_length}` tokens, "
            "so that no completion is left. Raise `max_length` or shorten the prompts."
        )
    if dropped:
        what = f"their prompts fill `max_length={max_length}`"
        logger.warning("Dropped %d of %d rows of the %s dataset: %s.", dropped, rows_before, name, what)
    lengths = list(zip(*([len(ids) for ids in dataset[column]] for column in IDS), strict=True))
    empty = [i for i, (_, chosen, rejected) in enumerate(lengths) if chosen == 0 or rejected == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(dataset)} rows of the {name} dataset have a completion of no tokens, the first is "
            f"row {empty[0]}. Drop them, or write out the completion."
        )
    limit = max_length or float("inf")
    if context is not None and context < limit:
        long = sum(prompt + max(chosen, rejected) > context for prompt, chosen, rejected in lengths)
        if long:
            raise ValueError(
                f"{long} of {len(dataset)} rows of the {name} dataset are longer than the model's context of "
                f"{context} tokens. Set `max_length` to at most {context}; it is {max_length}. A model that reads "
                "more than its config says needs that in its config (`rope_parameters`, `max_position_embeddings`)."
            )


class SourceCollator:
    """Collate as `collator` does, and add the rows' `source` as a list of names."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if SOURCE in rows[0]:
            batch[SOURCE] = [str(row[SOURCE]) for row in rows]
        return batch
