"""The tests of the mathematics can fail: each entry is a mistake that one of them notices."""

import dataclasses
import itertools
import math
import operator
from pathlib import Path

import pytest
import torch

import oracles
from mistakes import assert_noticed, doubled, given, instead, negated, swapped, to
from trl_ext.masked import identity
from trl_ext.ppo.advantages import _gae


def on_one_rank(function):
    """A collective that is passed is not called."""

    def alone(*args, all_reduce=None, **kwargs):
        return function(*(arg for arg in args if not callable(arg)), **kwargs)

    return alone


def with_bessels_correction(moments):
    def corrected(values, mask, all_reduce=identity):
        count, mean, variance = moments(values, mask, all_reduce)
        return count, mean, variance * count / (count - 1)

    return corrected


def in_one_pass(values, mask, all_reduce=identity):
    return mask.sum(), values.mean(), values.square().mean() - values.mean().square()


def beginning_anew(update):
    def forgetful(self, *args, **kwargs):
        self.__init__()
        update(self, *args, **kwargs)

    return forgetful


def without_a_bound(self, kl, episodes):
    self.coef *= 1 + (kl / self.target - 1) * episodes / self.horizon


def kl_with_a_reference_that_learns(hidden, lm_head, ref_hidden, ref_lm_head, chunk_size):
    logps, ref_logps = lm_head(hidden).log_softmax(-1), ref_lm_head(ref_hidden).log_softmax(-1)
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def inverse(factor):
    return lambda *args: 1 / factor(*args)


def masked_late(logps, old_logps, advantages, cliprange, cliprange_high):
    """The mask of SAO after the exponential, which has overflowed by then."""
    ratio = (logps - old_logps).exp()
    return (ratio * advantages).masked_fill((ratio < 1 - cliprange) | (ratio > 1 + cliprange_high), 0)


def always_clipped(ratio, advantages, cliprange, *_):
    return ratio.clamp(1 - cliprange, 1 + cliprange) * advantages


def with_kl_for_value(of):
    return lambda self, term: of(dataclasses.replace(self, kl=self.vf, vf=self.kl), term)


def exchanged(measure):
    """Two measurements under each other's names."""
    return lambda *args: dict(zip(measured := measure(*args), reversed(measured.values()), strict=True))


def by_its_own_responses(draw):
    """Each micro-batch knows the tokens of its own good responses alone."""

    def drawn(rollout, args, *others, **kwargs):
        steps = draw(rollout, args, *others, **kwargs)
        for part in itertools.chain.from_iterable(steps):
            own = part.rows[rollout.at_least(args.positive_min_score)[part.rows]]
            part.num_positive = rollout.mask[own].sum().item()
        return steps

    return drawn


def at_first_tokens(place):
    return lambda turns, mask, *names: place(turns[::-1], mask[::-1], *names)[::-1]


def over_its_own_tokens(terms):
    return lambda **given: terms(**(given | {"num_tokens": given["mask"].sum()}))


def with_a_graph(terms):
    return lambda **given: dataclasses.replace(terms(**given), entropy=given["entropy"].mean())


UNMASKED = instead(lambda values, mask: values)
DISCOUNTED = {"gamma": 0.9, "lam": 0.7}
CHUNKS = {"chunk_size": 3}
REINFORCE = {"estimator": "reinforce", "oracle": lambda rewards, values: oracles.rewards_to_go(rewards, 0.9)}
CUT = {"cut": 1}
TOO_SHORT = {"alpha": 0.2, "warns": True}
LONG_ENOUGH = {"alpha": 0.6, "warns": False}
TOO_LARGE = {"measured": 6.6, "factor": 1.01}
FAR_TOO_LARGE = {"measured": 60.0, "factor": 1.02}

# (function, the mistake, test that must notice, its parameters)
MISTAKES = [
    ("masked:zero_masked", UNMASKED, "sum_and_mean_count_only_the_mask", {}),
    ("masked:zero_masked", UNMASKED, "padding_changes_no_result", {"garbage": math.nan}),
    ("masked:masked_mean", instead(lambda values, mask: values.mean()), "sum_and_mean_count_only_the_mask", {}),
    ("masked:masked_moments", with_bessels_correction, "moments_equal", {}),
    ("masked:masked_moments", instead(in_one_pass), "moments_survive", {}),
    ("masked:masked_moments", on_one_rank, "moments_on_two_ranks", {}),
    ("masked:masked_moments", on_one_rank, "whitening_on_two_ranks", {}),
    ("masked:masked_moments", on_one_rank, "explained_variance_on_two_ranks", {}),
    ("masked:masked_whiten", doubled, "whitened_values", {}),
    ("masked:masked_whiten", given(shift_mean=operator.not_), "whitening_can_keep_the_mean", {}),
    ("masked:masked_whiten", lambda whiten: lambda *a, **k: 1 + whiten(*a, **k), "whitening_gives_0", {}),
    ("masked:explained_variance", swapped, "explained_variance_equals", {}),
    ("masked:explained_variance", lambda explained: lambda *args: 1 - explained(*args), "explained_variance_eq", {}),
    ("ppo.advantages:td_error", given(gamma=to(1.0)), "td_error_equals", {}),
    ("ppo.advantages:td_error", given(values=operator.neg), "td_error_equals", {}),
    ("ppo.advantages:_shift_left", given(steps=to(0)), "td_error_equals", {}),
    ("ppo.advantages:_shift_left", given(steps=lambda steps: steps + 1), "td_error_equals", {}),
    ("ppo.advantages:gae", given(lam=to(1.0)), "gae_equals", DISCOUNTED),
    ("ppo.advantages:gae", given(gamma=to(1.0)), "gae_equals", DISCOUNTED),
    ("ppo.advantages:gae", given(lam=to(1.0)), "gae_takes_a_lam", {}),
    ("ppo.advantages:length_adaptive_lam", given(mask=torch.ones_like), "length_adaptive_lam", {}),
    ("ppo.advantages:length_adaptive_lam", given(alpha=lambda alpha: 1 / alpha), "length_adaptive_lam", {}),
    ("ppo.advantages:estimate_advantages", given(critic_lam=to(None)), "returns_may_have", {"critic_lam": 0.4}),
    ("ppo.advantages:_discounted_sums", given(discount=to(0.0)), "gae_with_lam_1", {}),
    ("ppo.advantages:_discounted_sums", given(sequence=lambda deltas: deltas.flip(1)), "gae_by_hand", {}),
    ("ppo.advantages:_without_holes", given(mask=torch.ones_like), "holes_are_stepped_over", {}),
    ("ppo.advantages:_without_holes", given(mask=operator.invert), "rewards_to_go_equal", {"gamma": 0.9}),
    ("ppo.advantages:zero_masked", UNMASKED, "padding_changes", {"estimator": "gae", "garbage": 1e30}),
    ("ppo.advantages:n_step_advantages", given(gamma=to(1.0)), "n_step_equals", {"n": 3}),
    ("ppo.advantages:n_step_advantages", given(n=lambda n: n + 1), "n_step_with_n_1", {}),
    ("ppo.advantages:rewards_to_go", given(gamma=to(0.0)), "rewards_to_go_equal", {"gamma": 1.0}),
    ("ppo.advantages:value_targets", given(old_values=operator.neg), "value_targets", {}),
    ("ppo.advantages:_reinforce", instead(_gae), "estimate_advantages_names", REINFORCE),
    ("ppo.advantages:_reinforce_baseline", instead(_gae), "returns_of_both", {"estimator": "reinforce_baseline"}),
    ("ppo.kl:k1", negated, "k1_and_k3_are_unbiased", {"estimator": "k1"}),
    ("ppo.kl:k2", doubled, "gradient_of_k2", {}),
    ("ppo.kl:k3", swapped, "gradient_of_k3", {}),
    ("ppo.kl:k3", instead(lambda logps, ref: (ref - logps).exp() - 1 - (ref - logps)), "k3_keeps_its_digits", {}),
    ("ppo.kl:old_policy_kl", swapped, "old_policy_kl_is_unbiased", {}),
    ("ppo.kl:estimate_kl", given(mask=to(None)), "a_mask_keeps", {"estimator": "k3", "garbage": -1e30}),
    ("ppo.kl:full_kl", given(hidden=torch.Tensor.detach), "full_kl_and_its", CHUNKS),
    ("ppo.kl:full_kl", lambda kl: lambda h, head, r, ref, **k: kl(r, ref, h, head, **k), "full_kl_and_its", CHUNKS),
    ("ppo.kl:full_kl", instead(kl_with_a_reference_that_learns), "full_kl_never_reaches", {}),
    ("ppo.kl:checkpoint", instead(lambda run, *chunk, use_reentrant: run(*chunk)), "full_kl_keeps_nothing", {}),
    ("ppo.controllers:ProportionalController.update", given(kl=to(5.4)), "proportional_controller_f", TOO_LARGE),
    ("ppo.controllers:ProportionalController.update", given(episodes=to(1)), "proportional_controller_f", TOO_LARGE),
    (
        "ppo.controllers:ProportionalController.update",
        instead(without_a_bound),
        "proportional_controller_f",
        FAR_TOO_LARGE,
    ),
    ("ppo.controllers:_halve_or_double", inverse, "band_controller", {"measured": 2.1, "factor": 2}),
    (
        "ppo.controllers:_halve_or_double",
        given(low=lambda low: 1.01 * low),
        "band_controller",
        {"measured": 0.5, "factor": 1},
    ),
    (
        "ppo.controllers:SchulmanController.update",
        given(kl=lambda kl: 1.2 * kl),
        "schulman_controller",
        {"measured": 0.044, "factor": 1},
    ),
    ("ppo.losses:policy_ratio", swapped, "ratio_is_the_quotient", {}),
    ("ppo.losses:clip_objective", given(cliprange=to(9.0)), "clip_objective_equals", {"ranges": (0.2,)}),
    ("ppo.losses:clip_objective", instead(always_clipped), "clip_objective_equals", {"ranges": (0.2,)}),
    ("ppo.losses:clip_objective", given(cliprange_high=to(None)), "clip_objective_equals", {"ranges": (0.2, 0.5)}),
    ("ppo.losses:clip_objective", given(dual_clip=to(None)), "clip_objective_equals", {"ranges": (0.2, None, 1.3)}),
    ("ppo.losses:clipped_tokens", given(advantages=torch.abs), "clipped_tokens_are", {"ranges": (0.2,)}),
    ("ppo.losses:clipped_tokens", given(dual_clip=to(None)), "clipped_tokens_are", {"ranges": (0.2, None, 1.3)}),
    ("ppo.losses:masked_tokens", given(cliprange_high=to(None)), "mask_objective_is", {"ranges": (0.2, 0.5)}),
    ("ppo.losses:mask_objective", given(advantages=torch.abs), "mask_objective_is", {"ranges": (0.2,)}),
    ("ppo.losses:mask_objective", instead(masked_late), "ratio_that_overflows", {}),
    ("ppo.losses:ppo_terms", given(sampling_logps=to(None)), "mask_takes", {}),
    ("ppo.losses:ppo_terms", given(policy_objective=to("clip")), "mask_takes", {}),
    ("ppo.losses:value_loss", doubled, "value_loss_is_half", {}),
    ("ppo.losses:clipped_value_loss", given(cliprange_value=to(9.0)), "clipped_value_loss_equals", {}),
    ("ppo.losses:_clip_around", given(old_values=torch.zeros_like), "clipped_value_loss_equals", {}),
    ("ppo.losses:clipped_values", lambda clipped: lambda *args: ~clipped(*args), "clipped_values_are", {}),
    ("ppo.terms:PPOCoefficients.of", lambda of: lambda *args: abs(of(*args)), "total_adds", {}),
    ("ppo.terms:PPOCoefficients.of", with_kl_for_value, "total_adds", {}),
    ("ppo.losses:ppo_terms", given(aux_weight=to(1.0)), "micro_batches_add_up", CUT),
    ("ppo.losses:ppo_terms", over_its_own_tokens, "micro_batches_add_up", CUT),
    ("ppo.losses:ppo_terms", given(num_positive=to(1.0)), "positive_nll_is", {}),
    ("ppo.losses:ppo_terms", given(positive=torch.logical_not), "positive_nll_is", {}),
    ("ppo.losses:ppo_terms", given(importance_sampling_ratio=to(None)), "importance_sampling", {"columns": 7}),
    ("ppo.losses:ppo_terms", with_a_graph, "only_the_total", {}),
    ("ppo.losses:masked_sum", instead(lambda values, mask: values.sum()), "terms_equal", {}),
    ("ppo.losses:old_policy_kl", lambda kl: lambda *args: kl(*args).detach(), "old_kl_has", {}),
    ("ppo.losses:zero_masked", UNMASKED, "padding_changes", {"garbage": 1e30}),
    ("ppo.optimizer:norms_by_role", given(loss_scale=to(1.0)), "norms_by_role_are", {}),
    ("ppo.optimizer:norms_by_role", given(critic=lambda critic: torch.nn.Identity()), "norms_by_role_are", {}),
    ("ppo.optimizer:StepsByRole._before_step", instead(lambda *args: None), "actor_is_passed_over", {}),
    ("ppo.optimizer:StepsByRole._after_step", instead(lambda *args: None), "actor_is_passed_over", {}),
    ("ppo.returns:explained_variance", instead(lambda *args: torch.tensor(1.0)), "closed_gate", {"estimator": "gae"}),
    ("ppo.returns:rewards_to_go", given(gamma=to(0.5)), "closed_gate", {"estimator": "gae"}),
    ("ppo.returns:masked_moments", on_one_rank, "gate_of_two_ranks", {"noise": 5.0}),
    ("ppo.returns:explained_variance", on_one_rank, "gate_of_two_ranks", {"noise": 5.0}),
    ("ppo.returns:_errors_by_place", exchanged, "errors_of_the_value", {}),
    ("ppo.returns:_errors_by_place", given(mask=torch.ones_like), "errors_of_the_value", {}),
    ("ppo.returns:_errors_by_place", given(to_go=torch.zeros_like), "errors_of_the_value", {}),
    ("ppo.returns:_errors_by_place", given(all_reduce=to(identity)), "gate_of_two_ranks", {"noise": 0.1}),
    ("ppo.returns:_warn_of_short_horizons", instead(lambda *args: None), "lam_by_length", TOO_SHORT),
    ("ppo.returns:_warn_of_short_horizons", given(lam=torch.zeros_like), "lam_by_length", LONG_ENOUGH),
    ("ppo.micro_batches:draw_micro_batches", given(all_reduce=to(identity)), "counts_are", {}),
    ("ppo.micro_batches:draw_micro_batches", by_its_own_responses, "counts_are", {}),
    ("ppo.micro_batches:Rollout.at_least", instead(lambda made, score: made.scores > score), "counts_are", {}),
    ("ppo.micro_batches:Rollout.at_least", instead(lambda made, score: made.scored), "counts_are", {}),
    ("ppo.roles.turn_rewards:_at_turn_ends", at_first_tokens, "turns_are_paid", {"tools_wrote": True}),
    ("ppo.roles.turn_rewards:_at_turn_ends", given(rewards=lambda t: t[::-1]), "turns_are", {"tools_wrote": True}),
    ("ppo.roles.turn_rewards:_turn_source", given(tool_mask=to(lambda: None)), "turns_are", {"tools_wrote": True}),
    ("ppo.rewards:token_rewards", given(kl_coef=operator.neg), "token_rewards_pay", {}),
    ("ppo.rewards:last_token", instead(lambda mask: mask & (mask.cumsum(1) == 1)), "last_token", {}),
    ("ppo.rewards:last_token", instead(lambda mask: mask.flip(1).cumsum(1).flip(1) == 1), "last_token", {}),
    ("ppo.rewards:zero_masked", UNMASKED, "padding_changes", {"garbage": 1e30}),
    ("ppo.rewards:missing_eos", given(penalty=operator.neg), "missing_eos", {}),
    ("ppo.rewards:missing_eos", given(has_eos=operator.invert), "missing_eos", {}),
    ("ppo.rewards:clip_scores", instead(lambda scores, limit: scores.clamp(max=limit)), "scores_are_clipped", {}),
    (
        "ppo.rewards:normalize_scores",
        instead(lambda scores, all: (scores - all.mean) / all.std),
        "normalized_scores",
        {},
    ),
    ("ppo.rewards:normalize_scores", instead(lambda scores, all: scores / all.variance), "normalized_scores", {}),
    ("ppo.rewards:RunningMoments.update", beginning_anew, "running_moments_equal", {}),
    ("ppo.rewards:RunningMoments.update", on_one_rank, "running_moments_on_two_ranks", {}),
]


@pytest.mark.parametrize("target, mistake, beginning, parameters", MISTAKES)
def test_mistake_is_noticed(monkeypatch, caplog, target, mistake, beginning, parameters):
    *room, file = target.partition(":")[0].split(".")
    beside = Path(__file__).parents[1].joinpath(*room)
    # The means and the total of losses.py have their tests in test_terms.py.
    files = [
        beside / f"test_{name}.py" for name in dict.fromkeys((file, "terms")) if (beside / f"test_{name}.py").exists()
    ]
    path = next(each for each in files if f"def test_{beginning}" in each.read_text())
    assert_noticed(path, beginning, parameters, f"trl_ext.{target}", mistake, monkeypatch, caplog=caplog)
