"""The head for CPUs equals a log-softmax over the whole vocabulary, in values and gradients, however it is tiled."""

import pytest
import torch
from torch import Tensor

import tiny
from trl_ext import _trl
from trl_ext.models import cpu_head
from trl_ext.ppo.roles.forward import ActorCriticForward


# (tokens, vocabulary, width of the trunk, 1 / temperature)
SHAPES = [(7, 50, 8, 1.0), (33, 1000, 16, 1 / 0.7), (1, 3, 4, 2.0)]


OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def dense(states: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    logits = states @ weight.t() * scale
    logps = torch.log_softmax(logits, dim=-1)
    return (
        logps.gather(1, targets.unsqueeze(1)).squeeze(1),
        -(logps.exp() * logps).sum(-1),
        logps.exp().square().sum(-1).log(),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )


def case(size: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    states, weight, *upstream = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((size, hidden), (vocabulary, hidden), (size,), (size,))
    )
    targets = torch.randint(vocabulary, (size,), generator=generator)
    targets[0] = (states[0] @ weight.t()).argmax()  # one that is the most likely token
    return states.requires_grad_(), weight.requires_grad_(), targets, upstream


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)], ids=["log_probs", "entropy", "both"])
@pytest.mark.parametrize("tile, kept", [(2**21, 2**28), (64, 2**28), (64, 0)])
@pytest.mark.parametrize("size, vocabulary, hidden, scale", SHAPES)
def test_head_equals_dense_log_softmax(monkeypatch, size, vocabulary, hidden, scale, tile, kept, read):
    monkeypatch.setattr(cpu_head, "TILE", tile)
    monkeypatch.setattr(cpu_head, "KEPT", kept)
    states, weight, targets, upstream = case(size, vocabulary, hidden)
    expected = dense(states, weight, targets, scale)
    got = cpu_head.TokenLogProbs.apply(states, weight, targets, scale, OUTPUTS, True)
    assert expected[4].any()
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    both = [
        torch.autograd.grad([values[i] for i in read], (states, weight), [upstream[i] for i in read])
        for values in (got, expected)
    ]
    for actual, wanted in zip(*both, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_head_computes_the_requested_outputs():
    states, weight, targets, _ = case(5, 20, 4)
    for name in OUTPUTS:
        _, *extras = cpu_head.TokenLogProbs.apply(states, weight, targets, 1.0, (name,), False)
        assert [extra is not None for extra in extras] == [other == name for other in OUTPUTS]


@pytest.mark.parametrize("tile", [2**21, 15])
def test_of_equal_logits_the_first_is_the_top(monkeypatch, tile):
    """As argmax has it, within a tile and across tiles."""
    monkeypatch.setattr(cpu_head, "TILE", tile)
    states, weight = torch.ones(3, 2), torch.ones(10, 2)
    *_, is_top1 = cpu_head.TokenLogProbs.apply(states, weight, torch.tensor([0, 1, 7]), 1.0, OUTPUTS, False)
    assert is_top1.tolist() == [True, False, False]


def test_head_with_a_frozen_weight_gives_the_states_their_gradient():
    states, weight, targets, upstream = case(5, 20, 4)
    weight.requires_grad_(False)
    (expected,) = torch.autograd.grad(dense(states, weight, targets, 1.0)[:2], states, upstream)
    got = cpu_head.TokenLogProbs.apply(states, weight, targets, 1.0, OUTPUTS, True)[:2]
    torch.testing.assert_close(torch.autograd.grad(got, states, upstream)[0], expected)


def test_head_computes_again_when_backward_runs_twice():
    states, weight, targets, upstream = case(5, 20, 4)
    got = cpu_head.TokenLogProbs.apply(states, weight, targets, 1.0, OUTPUTS, True)[:2]
    first = torch.autograd.grad(got, (states, weight), upstream, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(got, (states, weight), upstream), strict=True):
        torch.testing.assert_close(once, again)


def test_forward_uses_the_head_on_cpu_and_trls_for_what_it_cannot_do(monkeypatch):
    used = []
    apply = cpu_head.TokenLogProbs.apply
    monkeypatch.setattr(cpu_head.TokenLogProbs, "apply", lambda *args: used.append(1) or apply(*args))
    ids = torch.randint(7, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    for dtype, times in ((torch.float32, 1), (torch.bfloat16, 0)):
        model = tiny.tiny_actor().to(dtype)
        _trl.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        ActorCriticForward(model).settle()
        used.clear()
        output = model(input_ids=ids, labels=ids, ppo_outputs=("log_probs", "entropy"))
        assert len(used) == times
        logps = torch.log_softmax(model(input_ids=ids).logits.float()[:, :-1], dim=-1)
        expected = logps.gather(2, ids[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(output.log_probs, expected, **({} if times else {"atol": 0.05, "rtol": 0.05}))


def test_the_head_that_scores_is_one_class_for_every_call():
    """Another one each time would have torch.compile compile anew each time."""
    heads = []
    for _ in range(2):
        with _trl.scoring_head(cpu_head.TokenLogProbs):
            heads.append(_trl.trl_utils._ChunkedLogProbFunction)
    assert heads[0] is heads[1] is not _trl.trl_utils._ChunkedLogProbFunction
