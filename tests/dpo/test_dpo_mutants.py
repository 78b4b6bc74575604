"""The tests of DPO's mathematics, layout and metrics can fail: each entry is a mistake that one of them catches."""

import importlib
from pathlib import Path

import pytest

import mutants
from pair_forwards import DYNAMIC


FILES = {
    "losses": "dpo/test_dpo_losses",
    "metrics": "dpo/test_dpo_metrics",
    "implicit_reward": "dpo/test_implicit_reward",
    "exactness": "dpo/test_pair_forward",
    "forward": "dpo/test_pair_forward",
}

REWARD = {"rows": None, "batch_size": 4}  # `rows` is filled in from the test's own module

# (module, text in its source, what a mistake would have written, test that must notice, its parameters)
MUTANTS = [
    # losses.py
    ("losses", "beta * (logps - ref_logps)", "beta * (ref_logps - logps)", "implicit_reward_is_beta", {}),
    ("losses", "beta * (logps - ref_logps)", "(logps - ref_logps)", "implicit_reward_is_beta", {}),
    (
        "losses",
        "torch.sigmoid(chosen_rewards - rejected_rewards)",
        "torch.sigmoid(chosen_rewards) - torch.sigmoid(rejected_rewards)",
        "preference_probability_is",
        {},
    ),
    ("losses", "-F.logsigmoid(margins) +", "F.logsigmoid(margins) +", "dpo_loss_is_the", {"label_smoothing": 0.0}),
    ("losses", "-F.logsigmoid(margins) +", "torch.log1p(torch.exp(-margins)) +", "dpo_loss_and_weight_stay", {}),
    (
        "losses",
        "return label_smoothing * margins",
        "return -label_smoothing * margins",
        "dpo_loss_is_the",
        {"label_smoothing": 0.1},
    ),
    (
        "losses",
        "margins = chosen_rewards - rejected_rewards",
        "margins = rejected_rewards - chosen_rewards",
        "dpo_loss_of_both",
        {},
    ),
    (
        "losses",
        "sigmoid(rejected_rewards - chosen_rewards)",
        "sigmoid(chosen_rewards - rejected_rewards)",
        "gradient_weight_is_minus",
        {"label_smoothing": 0.0},
    ),
    ("losses", " - label_smoothing", "", "gradient_weight_is_minus", {"label_smoothing": 0.1}),
    (
        "losses",
        "1 - torch.exp(-logratios)",
        "1 - torch.exp(logratios)",
        "divergence_score_is_the",
        {"name": "forward_kl", "alpha": 0.5},
    ),
    (
        "losses",
        "F.logsigmoid(logratios) + math.log(2)",
        "F.logsigmoid(logratios)",
        "divergence_score_has",
        {"name": "js_divergence", "alpha": 0.5},
    ),
    (
        "losses",
        "((alpha - 1) * logratios)",
        "(alpha * logratios)",
        "divergence_score_is_the",
        {"name": "alpha_divergence", "alpha": 0.5},
    ),
    (
        "losses",
        " / (alpha - 1)",
        "",
        "divergence_score_is_the",
        {"name": "alpha_divergence", "alpha": 0.5},
    ),
    ("losses", ".clamp(max=80)", "", "divergence_score_stays", {}),
    # metrics.py
    ("metrics", "right = margins > 0", "right = margins >= 0", "margin_of_0", {}),
    ("metrics", "margins = chosen - rejected", "margins = rejected - chosen", "metrics_equal", {"size": 40}),
    ("metrics", 'pairs["chosen_logps"] >', 'pairs["chosen_logratios"] >', "metrics_equal", {"size": 40}),
    ("metrics", "(rewards < 0)", "(rewards > 0)", "metrics_equal", {"size": 40}),
    (
        "metrics",
        '[f"{side}_logratios"].mean().item()',
        '[f"{side}_logratios"].mean().neg().item()',
        "metrics_equal",
        {"size": 40},
    ),
    ("metrics", "logratios.square() / 2", "logratios.square()", "metrics_equal", {"size": 40}),
    (
        "metrics",
        "gradient_weight(chosen, rejected)",
        "gradient_weight(rejected, chosen)",
        "metrics_equal",
        {"size": 7},
    ),
    ("metrics", "std(correction=0)", "std()", "metrics_equal", {"size": 7}),
    ("metrics", "x.std() == 0 or y.std() == 0", "False", "metrics_leave_out", {}),
    (
        "metrics",
        'pairs["chosen_lengths"] - pairs["rejected_lengths"]',
        'pairs["chosen_lengths"]',
        "metrics_equal",
        {"size": 40},
    ),
    ("metrics", "append(float(is_right))", "append(1.0 - is_right)", "accuracy_of_each", {}),
    ("metrics", "torch.maximum(probabilities, 1 - probabilities)", "probabilities", "calibration_error_by", {}),
    ("metrics", "(confidence - 0.5) * 2", "confidence", "calibration_error_equals", {"size": 1000}),
    ("metrics", "gaps.abs().sum()", "gaps.sum().abs()", "calibration_error_equals", {"size": 1000}),
    ("metrics", "self._batches, self._sources = [], []", "pass", "ledger_speaks", {}),
    ("metrics", "self._sources += sources or []", "self._sources = sources or []", "ledger_speaks", {}),
    # implicit_reward.py
    ("implicit_reward", "(position >= starts", "(position > starts", "reward_equals", REWARD),
    ("implicit_reward", " & mask[:, first:].bool()", "", "reward_equals", REWARD),
    ("implicit_reward", "logits[:, -kept:-1]", "logits[:, -kept + 1 :]", "reward_equals", REWARD),
    ("implicit_reward", ', len(ids["prompt_ids"])\n', ', len(ids["prompt_ids"]) + 1\n', "reward_equals", REWARD),
    ("implicit_reward", '"ref" if "ref" in adapters else None', "None", "reward_of_an", {"adapter": "ref"}),
    ("implicit_reward", "key=lambda i: -rewards[i]", "key=lambda i: rewards[i]", "ranking_is_by", {}),
    # forward.py, exactness.py
    ("forward", "packed_index[:, :-1][scored]", "packed_index[:, 1:][scored]", "shared_rows_give_way", {}),
    ("exactness", "limits.append(", "print(", "length_limit", {"name": "llama", "overrides": DYNAMIC, "limit": 128}),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=mutants.name)
def test_dpo_mutant_is_caught(mutant, monkeypatch):
    module_name, text, mistake, beginning, parameters = mutant
    room = "packing" if module_name == "exactness" else "dpo"
    module = importlib.import_module(f"trl_ext.{room}.{module_name}")
    test, tests = mutants.find_test(Path(__file__).parents[1] / f"{FILES[module_name]}.py", beginning)
    if "rows" in parameters:
        parameters = parameters | {"rows": tests.texts}
    mutants.assert_caught(module, text, mistake, test, tests, parameters, monkeypatch)
