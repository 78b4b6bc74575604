"""micro_batches.py: what a micro-batch knows of the whole optimizer batch, on one rank and on two."""

import itertools

import torch

import oracles
from trl_ext import PPOConfigX
from trl_ext.ppo.micro_batches import draw_micro_batches
from trl_ext.ppo.rollout import Rollout


ARGS = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_mini_batches": 2,
    "positive_nll_coef": 1.0,
    "positive_min_score": 0.5,
}


def rollout(seed):
    """Eight responses of 1 to 9 tokens with holes; the scores of some are exactly `positive_min_score`."""
    draw = torch.Generator().manual_seed(seed)
    attended = torch.arange(9) < torch.randint(1, 10, (8, 1), generator=draw)
    ids = torch.zeros(8, 1, dtype=torch.long)
    made = Rollout.from_ids(ids, ids == 0, torch.zeros(8, 9, dtype=torch.long), attended)
    made.mask = attended & (torch.rand(8, 9, generator=draw) < 0.8)
    made.scores = torch.randint(0, 3, (8,), generator=draw) / 2
    made.scored = torch.ones(8, dtype=torch.bool)
    return made


def counted(part):
    """Tokens that count in one micro-batch, of all responses and of good ones, one by one."""
    counts = [[sum(part.rollout.mask[row].tolist()), part.rollout.scores[row].item()] for row in part.rows.tolist()]
    return sum(count for count, _ in counts), sum(count for count, score in counts if score >= 0.5)


def test_counts_are_of_the_whole_optimizer_batch():
    """Of all its micro-batches and of both ranks, which draw other responses."""
    args = PPOConfigX("out", **ARGS)
    ranks = oracles.on_ranks(
        lambda made, all_reduce: draw_micro_batches(made, args, all_reduce, torch.max, 2, packs=True),
        *((rollout(seed),) for seed in (1, 2)),
    )
    good = set()
    for begin in (0, 2):  # two mini-batches of two micro-batches
        parts = [part for steps in ranks for part in itertools.chain(*steps[begin : begin + 2])]
        tokens, positive = (sum(counts) for counts in zip(*map(counted, parts), strict=True))
        assert 0 < positive < tokens
        good.add(positive)
        for part in parts:
            assert (part.num_tokens, part.num_positive, part.share) == (tokens, positive, 1 / 4)
    assert len(good) == 2
