"""The rows of the rollouts to come, by a second reading of the data: the Trainer has not handed them out yet."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
from transformers.trainer_utils import has_length


Rows = list[dict[str, Any]]


def rows_ahead(loader: Any, epoch: int, skipped: int, begun: int, every: int) -> Iterator[Rows]:
    """
    Yield this process's rows of each rollout that the Trainer has not begun, over all epochs to come.

    Args:
        loader: a data loader for this reading alone. It is not iterated itself: an iterator of accelerate's tells the
            Trainer where the data ends, and one of torch's draws a random number.
        epoch: the Trainer's, from 0.
        skipped: batches of this epoch that it has passed over.
        begun: batches that it has had of the rollout that is being learned from; 0 between two rollouts.
        every: batches in which it hands out the rows of a rollout, each with all of them.
    """
    first = islice(_batches(loader, epoch), skipped, None)
    batches = chain(first, chain.from_iterable(_later_epochs(loader, epoch + 1)))
    for read in islice(batches, -begun % every, None, every):
        yield read()


def _later_epochs(loader: Any, first: int) -> Iterator[Iterator[Callable[[], Rows]]]:
    for epoch in count(first):
        batches = _batches(loader, epoch)
        one = next(batches, None)
        if one is None:
            return
        yield chain([one], batches)


def _batches(loader: Any, epoch: int) -> Iterator[Callable[[], Rows]]:
    """Yield, for each batch of an epoch, what reads its rows."""
    loader.set_epoch(epoch)
    if has_length(loader.dataset):
        for indices in loader.batch_sampler:
            yield partial(_read, loader, indices)
        return
    stream = iter(loader.dataset)
    while len(rows := list(islice(stream, loader.batch_size))) == loader.batch_size:
        yield partial(loader.collate_fn, rows)


def _read(loader: Any, indices: list[int]) -> Rows:
    return loader.collate_fn([loader.dataset[index] for index in indices])


def next_rows(rows: Iterator[Rows]) -> Rows | None:
    """Return the rows of the next rollout, `None` after the last; what a dataset draws changes no random number."""
    with torch.random.fork_rng(devices=[]):
        return next(rows, None)
