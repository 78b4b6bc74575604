"""The table of terms.py, and what losses.py makes of it: terms against an oracle, their total, the reduction."""

import math
from dataclasses import fields

import pytest
import torch

import oracles
from trl_ext.ppo import kl, losses
from trl_ext.ppo.losses import PPOTerms, ppo_terms
from trl_ext.ppo.terms import TERMS, PPOCoefficients, total_in_words


CLIPRANGE, CLIPRANGE_VALUE = 0.2, 0.3

COEF = PPOCoefficients(kl=0.05, vf=0.7, entropy=0.01, old_kl=0.3, aux=0.02, positive_nll=0.4)
POSITIVE = torch.tensor([True, False, True, True, False, True])

LEAVES = ("logps", "values", "entropy")

ADDITIVE = tuple(field.name for field in fields(PPOTerms) if field.name != "ratio_max")


def terms_of(b, rows=slice(None), num_tokens=None, coef=COEF, **changes):
    """`ppo_terms` of some rows of a batch, with a k2 KL."""
    names = ("logps", "old_logps", "advantages", "mask", "entropy", "values", "old_values", "returns")
    arguments = {name: getattr(b, name)[rows] for name in names}
    arguments["kl"] = kl.estimate_kl("k2", b.logps[rows], b.ref_logps[rows], b.mask[rows])
    settings = {"coef": coef, "cliprange": CLIPRANGE, "cliprange_value": CLIPRANGE_VALUE}
    settings |= {"positive": POSITIVE[rows], "num_positive": int(b.mask[POSITIVE].sum())}
    return ppo_terms(num_tokens=num_tokens or int(b.mask.sum()), **(arguments | settings | changes))


def with_leaves(b):
    for name in LEAVES:
        getattr(b, name).requires_grad_()
    return b


def gradients(b, parts):
    """The gradients that the leaves of a batch collect from several totals."""
    for part in parts:
        part.total.backward()
    collected = [getattr(b, name).grad for name in LEAVES]
    for name in LEAVES:
        getattr(b, name).grad = None
    return collected


def test_terms_equal_the_sums_token_by_token():
    b = oracles.batch()
    terms = terms_of(b, num_tokens=50)
    leash = kl.k2(b.logps, b.ref_logps)
    for name, expected in oracles.ppo_terms(b, 50, CLIPRANGE, CLIPRANGE_VALUE, leash).items():
        assert getattr(terms, name).item() == pytest.approx(expected), name
    assert 0 < terms.clip_fraction < 1
    assert 0 < terms.value_clip_fraction < 1


def test_mask_takes_the_ratio_to_what_was_sampled():
    """KL[π_old ‖ π_θ] and the ratio of the other objective stay with π_old."""
    b = oracles.batch()
    sampling = b.old_logps + 0.1 * torch.randn(b.old_logps.shape, generator=torch.Generator().manual_seed(1))
    masked = terms_of(b, policy_objective="mask", sampling_logps=sampling)
    ratios = oracles.counted((b.logps - sampling).exp(), b.mask)
    inside = [0.8 <= ratio <= 1.2 for ratio in ratios]
    gained = [r * a for r, a, i in zip(ratios, oracles.counted(b.advantages, b.mask), inside, strict=True) if i]
    assert 0 < sum(inside) < len(inside)
    assert masked.clip_objective.item() == pytest.approx(sum(gained) / len(ratios))
    assert masked.clip_fraction.item() == pytest.approx(1 - sum(inside) / len(inside))
    assert masked.ratio_mean.item() == pytest.approx(sum(ratios) / len(ratios))
    assert masked.old_kl == terms_of(b).old_kl


def test_positive_nll_is_a_mean_over_the_tokens_of_good_responses():
    b = oracles.batch()
    nlls = oracles.counted(-b.logps[POSITIVE], b.mask[POSITIVE])
    assert terms_of(b).positive_nll.item() == pytest.approx(sum(nlls) / len(nlls))
    assert terms_of(b, positive=torch.zeros_like(POSITIVE), num_positive=0).positive_nll == 0


def test_total_adds_the_terms_with_their_signs():
    terms = terms_of(oracles.batch(), aux_loss=torch.tensor(1.7), aux_weight=0.25)
    total = (
        -terms.clip_objective
        + 0.05 * terms.kl
        + 0.7 * terms.value_loss
        - 0.01 * terms.entropy
        + 0.3 * terms.old_kl
        + 0.02 * terms.aux_loss
        + 0.4 * terms.positive_nll
    )
    torch.testing.assert_close(terms.total, total, **oracles.FLOAT64)
    assert terms.aux_loss.item() == pytest.approx(1.7 / 4)


@pytest.mark.parametrize(
    ("leaf", "raise_it", "coef"),
    [
        ("logps", True, PPOCoefficients(vf=0)),
        ("entropy", True, PPOCoefficients(vf=0, entropy=1)),
        ("values", False, PPOCoefficients(vf=1)),
        ("old_kl", False, PPOCoefficients(vf=0, old_kl=1)),
        ("kl", False, PPOCoefficients(vf=0, kl=1)),
    ],
)
def test_a_descent_step_moves_each_term_the_right_way(leaf, raise_it, coef):
    """Minimising the total raises the log-probs of good tokens and the entropy, and lowers errors and divergences."""
    b = with_leaves(oracles.batch())
    name = {"logps": "clip_objective", "values": "value_loss"}.get(leaf, leaf)
    b.advantages = b.advantages.abs() if leaf == "logps" else 0 * b.advantages
    before = terms_of(b, coef=coef, cliprange=10.0, cliprange_value=None)
    before.total.backward()
    for part in LEAVES:
        tensor = getattr(b, part)
        setattr(b, part, tensor.detach() - 0.01 * (0 if tensor.grad is None else tensor.grad))
    after = terms_of(b, coef=coef, cliprange=10.0, cliprange_value=None)
    change = getattr(after, name) - getattr(before, name)
    assert change > 0 if raise_it else change < 0


def test_only_the_total_keeps_its_graph():
    terms = terms_of(with_leaves(oracles.batch()), aux_loss=torch.tensor(1.0, requires_grad=True))
    assert terms.total.requires_grad
    assert not [name for name in ADDITIVE[1:] if getattr(terms, name).requires_grad]
    assert not terms.ratio_max.requires_grad


def test_terms_left_out_are_none_and_leave_the_rest_as_it_is():
    b = oracles.batch()
    nothing = {"kl": torch.zeros_like(b.logps), "aux_loss": torch.tensor(0.0), "positive": torch.zeros_like(POSITIVE)}
    without, zero = terms_of(b, kl=None, positive=None), terms_of(b, **nothing)
    assert without.kl is without.aux_loss is without.positive_nll is None
    torch.testing.assert_close(without.total, zero.total, **oracles.FLOAT64)


def test_without_a_value_range_the_plain_loss_is_used():
    b = oracles.batch()
    plain = sum(oracles.counted((b.values - b.returns) ** 2 / 2, b.mask)) / int(b.mask.sum())
    terms = terms_of(b, cliprange_value=None)
    assert terms.value_loss.item() == pytest.approx(plain)
    assert terms.value_clip_fraction == 0


@pytest.mark.parametrize("columns", [1, 7])
def test_importance_sampling_ratio_multiplies_the_objective_alone(columns):
    b = oracles.batch()
    weights = torch.rand(6, columns, dtype=torch.float64)
    corrected, plain = terms_of(b, importance_sampling_ratio=weights), terms_of(b)
    weighted = losses.clip_objective(losses.policy_ratio(b.logps, b.old_logps), b.advantages, CLIPRANGE) * weights
    expected = sum(oracles.counted(weighted, b.mask)) / int(b.mask.sum())
    assert corrected.clip_objective.item() == pytest.approx(expected)
    unchanged = [name for name in ADDITIVE if name not in ("total", "clip_objective", "aux_loss")]
    assert all(torch.equal(getattr(corrected, name), getattr(plain, name)) for name in unchanged)


def test_old_kl_has_a_gradient_only_through_its_coefficient():
    """At advantage 0 nothing else moves the policy; d/dlogp of (ratio − 1) − log ratio is ratio − 1."""
    b = with_leaves(oracles.batch())
    b.advantages = torch.zeros_like(b.advantages)
    for weight in (0.0, 0.3):
        terms = terms_of(b, coef=PPOCoefficients(old_kl=weight), kl=None)
        (result,) = torch.autograd.grad(terms.total, b.logps)
        slope = weight * (b.logps.exp() / b.old_logps.exp() - 1).masked_fill(~b.mask, 0) / int(b.mask.sum())
        torch.testing.assert_close(result, slope.detach(), **oracles.FLOAT64)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_micro_batches_add_up_to_the_batch(cut):
    b = with_leaves(oracles.batch())
    count, aux = int(b.mask.sum()), torch.tensor([2.0, 5.0])
    whole = terms_of(b, aux_loss=(cut * aux[0] + (6 - cut) * aux[1]) / 6)
    shares = ((slice(0, cut), aux[0], cut / 6), (slice(cut, 6), aux[1], 1 - cut / 6))
    parts = [terms_of(b, rows, count, aux_loss=loss, aux_weight=share) for rows, loss, share in shares]
    for name in ADDITIVE:
        added = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(added, getattr(whole, name), check_dtype=False, **oracles.FLOAT32)
    assert max(part.ratio_max for part in parts) == whole.ratio_max
    for one, several in zip(gradients(b, [whole]), gradients(b, parts), strict=True):
        torch.testing.assert_close(one, several, **oracles.FLOAT64)


@pytest.mark.parametrize("garbage", oracles.GARBAGE)
def test_padding_changes_no_term_and_no_gradient(garbage):
    def run(filler):
        b = oracles.batch()
        for name in vars(b).keys() - {"mask"}:
            setattr(b, name, oracles.with_garbage(getattr(b, name), b.mask, filler))
        weights = oracles.with_garbage(torch.ones_like(b.logps), b.mask, filler)
        terms = terms_of(b, importance_sampling_ratio=weights)
        terms.total.backward()
        return b, terms

    (clean, clean_terms), (dirty, dirty_terms) = run(0.0), run(garbage)
    for name in (*ADDITIVE, "ratio_max"):
        if name != "aux_loss":
            assert torch.equal(getattr(clean_terms, name), getattr(dirty_terms, name)), name
    for name in (*LEAVES, "old_logps", "advantages", "returns", "old_values"):
        result = getattr(dirty, name).grad
        assert torch.equal(result, getattr(clean, name).grad), name
        assert not result[~dirty.mask].any(), name


def test_a_batch_without_tokens_gives_zeros_and_no_gradient():
    b = with_leaves(oracles.batch())
    b.mask = torch.zeros_like(b.mask)
    terms = terms_of(b, num_tokens=torch.tensor(0))
    assert terms.total == 0
    assert terms.ratio_max == -math.inf
    assert not any(gradient.any() for gradient in gradients(b, [terms]))


def test_a_shape_that_would_broadcast_is_refused():
    b = oracles.batch()
    b.advantages = b.advantages[:, :1]
    with pytest.raises(ValueError, match=r"advantages has shape \(6, 1\) and mask has shape \(6, 7\)"):
        terms_of(b)


def test_table_names_every_field_once():
    weighted = [term for term in TERMS if term.coefficient]
    assert {term.coefficient for term in weighted} == {field.name for field in fields(PPOCoefficients)}
    assert {term.name for term in TERMS} <= {field.name for field in fields(PPOTerms)}
    assert [term.name for term in TERMS if term not in weighted] == ["clip_objective"]


def test_total_is_written_as_readme_and_theory_write_it():
    total = "−clip_objective + kl_coef·kl + vf_coef·value_loss − ent_coef·entropy + old_kl_coef·old_kl"
    written = ("clip_objective", "kl", "value_loss", "entropy", "old_kl")
    assert total_in_words([term for term in TERMS if term.name in written]) == total
    assert " + router_aux_loss_coef·aux_loss" in total_in_words()
