"""Batches of pairs scored over shared rows and as TRL scores them."""

import torch

import dpo_runs
from trl_ext._trl import add_fused_lm_head
from trl_ext.dpo.forward import PairForward
from trl_ext.packing.forward import PackedForward
from trl_ext.packing.segments import PackedRows


FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def scored(model, batch, checkpointing=None):
    """What TRL reads of a batch, and the gradient of a loss of log-probabilities and entropies."""
    model.zero_grad()
    output = model(**batch, use_cache=False, fused_lm_head=True)
    weights = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(2))
    ((output.log_probs * weights).sum() + (output.entropy * weights.roll(1, 0)).sum()).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, tolerance=1e-5):
    (output, gradients), (wanted, wanted_gradients) = got, expected
    for name in FIELDS:
        mine, theirs = getattr(output, name).float(), getattr(wanted, name).float()
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= tolerance * theirs.norm(), name
    assert (output.label_mask == wanted.label_mask).all()
    assert dpo_runs.gradient_difference(gradients, wanted_gradients) < tolerance


def both(name, **overrides):
    """The same model twice: with TRL's forward, and scored by a `PairForward`."""
    theirs, ours = dpo_runs.tiny_model(name, **overrides), dpo_runs.tiny_model(name, **overrides)
    for model in (theirs, ours):
        add_fused_lm_head(model, outputs=FIELDS)
    return theirs, ours, PairForward(ours)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


def tails_come_late(monkeypatch):
    """A mistake behind the probe's back: what follows a common beginning stands one position late."""
    right = PackedRows.position_ids.func

    def late(rows):
        positions = right(rows)
        for row, segments in zip(positions, rows.rows, strict=True):
            behind = [segment.parent is not None for segment in segments for _ in range(segment.size)]
            row[: len(behind)] += torch.tensor(behind)
        return positions

    monkeypatch.setattr(PackedRows, "position_ids", property(late))
    monkeypatch.setattr(PackedForward, "_differs", lambda *args: None)
