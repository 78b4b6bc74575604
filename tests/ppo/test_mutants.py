"""The tests of the mathematics can fail: each entry is a mistake that one of them catches."""

import importlib
from pathlib import Path

import pytest

import mutants
import oracles


REINFORCE = {"estimator": "reinforce", "oracle": lambda rewards, values: oracles.rewards_to_go(rewards, 0.9)}

# (module, text in its source, what a mistake would have written, test that must notice, its parameters)
MUTANTS = [
    # masked.py
    ("masked", "torch.where(mask, values, 0)", "values", "sum_and_mean_count_only_the_mask", {}),
    ("masked", "mask.sum(dim=dim).clamp(min=1)", "mask.numel()", "sum_and_mean_count_only_the_mask", {}),
    ("masked", "squares / divisor", "squares / (divisor - 1)", "moments_equal", {}),
    (
        "masked",
        "(values - mean).square(), mask))",
        "values.square(), mask)) - count * mean.square()",
        "moments_survive",
        {},
    ),
    ("masked", "squares = all_reduce(", "squares = identity(", "moments_on_two_ranks", {}),
    (
        "masked",
        "masked_moments(values, mask, all_reduce)",
        "masked_moments(values, mask)",
        "whitening_on_two_ranks",
        {},
    ),
    ("masked", "torch.rsqrt(variance", "torch.reciprocal(variance", "whitened_values", {}),
    ("masked", "whitened if shift_mean else", "whitened if not shift_mean else", "whitening_can_keep_the_mean", {}),
    ("masked", "zero_masked(whitened if shift_mean else whitened + mean, mask)", "whitened", "whitening_gives_0", {}),
    ("masked", "    values = zero_masked(values, mask)\n", "", "padding_changes_no_result", {"garbage": float("nan")}),
    ("masked", "1 - residual / spread", "residual / spread", "explained_variance_equals", {}),
    ("masked", "masked_moments(returns - values,", "masked_moments(values,", "explained_variance_equals", {}),
    # advantages.py
    ("advantages", "r + gamma * _shift_left(v, 1) - v", "r + _shift_left(v, 1) - v", "td_error_equals", {}),
    ("advantages", "_shift_left(v, 1) - v", "_shift_left(v, 1) + v", "td_error_equals", {}),
    ("advantages", "_shift_left(v, 1) - v", "_shift_left(v, 0) - v", "td_error_equals", {}),
    ("advantages", "_shift_left(v, 1) - v", "_shift_left(v, 2) - v", "td_error_equals", {}),
    ("advantages", "gamma * lam)", "gamma)", "gae_equals", {"gamma": 0.9, "lam": 0.7}),
    ("advantages", "gamma * lam)", "lam)", "gae_equals", {"gamma": 0.9, "lam": 0.7}),
    ("advantages", "_discounted_sums(delta, gamma * lam)", "delta", "gae_with_lam_1", {}),
    ("advantages", "sequence[:, t] + discount * running", "running + discount * sequence[:, t]", "gae_by_hand", {}),
    ("advantages", "in reversed(range(sequence.shape[1]))", "in range(sequence.shape[1])", "gae_by_hand", {}),
    ("advantages", "(~mask).int()", "torch.zeros_like(mask).int()", "holes_are_stepped_over", {}),
    ("advantages", "(~mask).int()", "mask.int()", "rewards_to_go_equal", {"gamma": 0.9}),
    (
        "advantages",
        "zero_masked(tensor, mask).gather",
        "tensor.gather",
        "padding_changes",
        {"estimator": "gae", "garbage": 1e30},
    ),
    ("advantages", "gamma**k * _shift", "_shift", "n_step_equals", {"n": 3}),
    ("advantages", "range(min(n, mask", "range(min(n + 1, mask", "n_step_with_n_1", {}),
    ("advantages", "lam=1.0)", "lam=0.0)", "rewards_to_go_equal", {"gamma": 1.0}),
    ("advantages", "return advantages + old_values", "return advantages - old_values", "value_targets", {}),
    ("advantages", "return to_go, to_go", "return to_go - values, to_go", "estimate_advantages_names", REINFORCE),
    (
        "advantages",
        "_gae(rewards, values, mask, gamma, lam=1.0)",
        "_gae(rewards, values, mask, gamma, lam)",
        "returns_of_both",
        {"estimator": "reinforce_baseline"},
    ),
    # kl.py
    ("kl", "return logps - ref_logps", "return ref_logps - logps", "k1_and_k3_are_unbiased", {"estimator": "k1"}),
    ("kl", "0.5 * (logps", "(logps", "gradient_of_k2", {}),
    ("kl", "torch.expm1(ref_logps - logps)", "torch.expm1(logps - ref_logps)", "gradient_of_k3", {}),
    ("kl", "- (ref_logps - logps)", "+ (ref_logps - logps)", "k1_and_k3_are_unbiased", {"estimator": "k3"}),
    ("kl", "torch.expm1(ref_logps - logps)", "((ref_logps - logps).exp() - 1)", "k3_keeps_its_digits", {}),
    ("kl", "k3(old_logps, logps)", "k3(logps, old_logps)", "old_policy_kl_is_unbiased", {}),
    ("kl", "if mask is not None:", "if False:", "a_mask_keeps", {"estimator": "k3", "garbage": -1e30}),
    ("kl", "logps.exp() * (logps", "ref_logps.exp() * (logps", "full_kl_and_its", {"chunk_size": 3}),
    ("kl", "logps.exp() * (logps", "logps.exp().detach() * (logps", "full_kl_and_its", {"chunk_size": 3}),
    ("kl", "with torch.no_grad():", "if True:", "full_kl_never_reaches", {}),
    ("kl", "checkpoint(chunk_kl, *chunk, use_reentrant=False)", "chunk_kl(*chunk)", "full_kl_keeps_nothing", {}),
    # controllers.py
    (
        "controllers",
        "kl / self.target - 1",
        "1 - kl / self.target",
        "proportional_controller_follows",
        {"measured": 6.6, "factor": 1.01},
    ),
    (
        "controllers",
        "- 1, -0.2), 0.2)",
        "- 1, -0.2), 9.9)",
        "proportional_controller_follows",
        {"measured": 60.0, "factor": 1.02},
    ),
    (
        "controllers",
        "error * episodes / self",
        "error / self",
        "proportional_controller_follows",
        {"measured": 6.6, "factor": 1.01},
    ),
    (
        "controllers",
        "0.5 if kl < low else 2.0",
        "2.0 if kl < low else 0.5",
        "band_controller",
        {"measured": 2.1, "factor": 2},
    ),
    ("controllers", "0.5 if kl < low", "0.5 if kl <= low", "band_controller", {"measured": 0.5, "factor": 1}),
    ("controllers", "self.target / 1.5", "self.target / 2", "schulman_controller", {"measured": 0.019, "factor": 0.5}),
    ("controllers", "self.target * 1.5", "self.target", "schulman_controller", {"measured": 0.044, "factor": 1}),
    # losses.py
    ("losses", "(logps - old_logps).exp()", "(old_logps - logps).exp()", "ratio_is_the_quotient", {}),
    ("losses", "torch.minimum(ratio", "torch.maximum(ratio", "clip_objective_equals", {}),
    (
        "losses",
        "ratio.clamp(1 - cliprange, 1 + cliprange)",
        "ratio.clamp(max=1 + cliprange)",
        "clip_objective_equals",
        {},
    ),
    (
        "losses",
        "ratio.clamp(1 - cliprange, 1 + cliprange)",
        "ratio.clamp(min=1 - cliprange)",
        "clip_objective_equals",
        {},
    ),
    ("losses", "(advantages > 0) & (ratio", "(ratio", "clipped_tokens_are", {}),
    ("losses", "0.5 * (values - returns)", "(values - returns)", "value_loss_is_half", {}),
    ("losses", "torch.maximum(value_loss", "torch.minimum(value_loss", "clipped_value_loss_equals", {}),
    ("losses", "old_values - cliprange_value,", "old_values,", "clipped_value_loss_equals", {}),
    ("losses", "> value_loss(values, returns)", "< value_loss(values, returns)", "clipped_values_are", {}),
    # terms.py
    ("terms", "coef.of(term) * mean for", "abs(coef.of(term)) * mean for", "total_adds", {}),
    ("terms", '"ent_coef", maximised=True', '"ent_coef"', "total_adds", {}),
    ("terms", '"vf", "vf_coef"', '"kl", "vf_coef"', "total_adds", {}),
    ("terms", '"kl", "kl_coef"', '"kl", "kl_coef", True', "total_adds", {}),
    ("terms", "aux_loss * aux_weight", "aux_loss", "micro_batches_add_up", {"cut": 1}),
    (
        "terms",
        "masked_sum(term, mask) / divisor",
        "masked_sum(term, mask) / mask.sum()",
        "micro_batches_add_up",
        {"cut": 1},
    ),
    ("terms", "masked_sum(term, mask) / divisor", "term.sum() / divisor", "terms_equal", {}),
    ("terms", '"old_kl": mean(', '"old_kl": mean(ratio).detach() + 0 * mean(', "old_kl_has", {}),
    ("terms", "zero_masked(tensor, mask) for", "tensor for", "padding_changes", {"garbage": 1e30}),
    ("terms", "else term.detach()", "else term", "only_the_total", {}),
    ("terms", "objective = objective * zero", "objective = objective + zero", "importance_sampling", {"columns": 7}),
    # rewards.py
    ("rewards", "rewards - kl_coef", "rewards + kl_coef", "token_rewards_pay", {}),
    ("rewards", "counted_from_here == 1", "mask.cumsum(1) == 1", "last_token", {}),
    ("rewards", "return mask & (", "return (", "last_token", {}),
    ("rewards", "zero_masked(kl, mask)", "kl", "padding_changes", {"garbage": 1e30}),
    ("rewards", "scores, scores - penalty", "scores, scores + penalty", "missing_eos", {}),
    ("rewards", "torch.where(has_eos,", "torch.where(~has_eos,", "missing_eos", {}),
    ("rewards", "scores.clamp(-limit, limit)", "scores.clamp(max=limit)", "scores_are_clipped", {}),
    ("rewards", "scores / moments.std", "(scores - moments.mean) / moments.std", "normalized_scores", {}),
    ("rewards", "scores / moments.std", "scores / moments.variance", "normalized_scores", {}),
    ("rewards", "delta**2 * self.count * count / total", "0", "running_moments_equal", {}),
    ("rewards", "delta * count / total", "delta / total", "running_moments_equal", {}),
    ("rewards", "(scores, scored, all_reduce)", "(scores, scored)", "running_moments_on_two_ranks", {}),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=mutants.name)
def test_mutant_is_caught(mutant, monkeypatch):
    module_name, text, mistake, beginning, parameters = mutant
    here = Path(__file__).parent
    shared = module_name == "masked"
    module = importlib.import_module("trl_ext.masked" if shared else f"trl_ext.ppo.{module_name}")
    test, tests = mutants.find_test((here.parent if shared else here) / f"test_{module_name}.py", beginning)
    mutants.assert_caught(module, text, mistake, test, tests, parameters, monkeypatch)
