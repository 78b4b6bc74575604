"""The tests of DPO's mathematics, metrics and forward can fail: each entry is a mistake that one of them notices."""

import dataclasses
import math
import operator
from pathlib import Path

import pytest
import torch

from mistakes import assert_noticed, doubled, given, instead, negated, swapped, to


def of_pairs(change, *names):
    """The mistake of other columns."""
    return given(pairs=lambda pairs: pairs | {name: change(pairs[name]) for name in names})


def keeping_its_pairs(pop):
    def kept(self):
        batches, sources = self._batches, self._sources
        line = pop(self)
        self._batches, self._sources = batches, sources
        return line

    return kept


def forgetting_earlier_pairs(add):
    def forgetful(self, *args):
        self.__init__()
        add(self, *args)

    return forgetful


def one_token_off(pack):
    def late(*args):
        rows = pack(*args)
        return dataclasses.replace(rows, packed_index=rows.packed_index.roll(-1, 1))

    return late


def unstable_loss(chosen, rejected, label_smoothing=0.0):
    return torch.log1p(torch.exp(rejected - chosen))


def overall_gap(probabilities):
    """Too sure here makes up for too unsure there."""
    confidence = torch.maximum(probabilities, 1 - probabilities)
    return (confidence - (probabilities > 0.5).float()).mean().abs().item()


def with_a_correlation(metrics):
    return lambda *args: {"preference/length_correlation": 0.0} | metrics(*args)


def unbounded_score(logratios, name, alpha):
    return torch.expm1((alpha - 1) * logratios) / (alpha - 1)


FORWARD_KL, JS, ALPHA = ({"name": name, "alpha": 0.5} for name in ("forward_kl", "js_divergence", "alpha_divergence"))
FORTY, LARGE = {"size": 40}, {"size": 1000}
REWARD = {"rows": "text", "batch_size": 4}
SIDES = ("chosen", "rejected")

# (function, the mistake, test that must notice, its parameters)
MISTAKES = [
    ("dpo.losses:implicit_reward", swapped, "implicit_reward_is_beta", {}),
    ("dpo.losses:implicit_reward", given(beta=to(1.0)), "implicit_reward_is_beta", {}),
    ("dpo.losses:preference_probability", swapped, "preference_probability_is", {}),
    ("dpo.losses:dpo_loss", negated, "dpo_loss_is_the", {"label_smoothing": 0.0}),
    ("dpo.losses:dpo_loss", swapped, "dpo_loss_of_both", {}),
    ("dpo.losses:dpo_loss", instead(unstable_loss), "dpo_loss_and_weight_stay", {}),
    ("dpo.losses:smoothing_term", negated, "dpo_loss_is_the", {"label_smoothing": 0.1}),
    ("dpo.losses:gradient_weight", swapped, "gradient_weight_is_minus", {"label_smoothing": 0.0}),
    (
        "dpo.losses:gradient_weight",
        given(label_smoothing=to(0.0)),
        "gradient_weight_is_minus",
        {"label_smoothing": 0.1},
    ),
    ("dpo.losses:divergence_score", given(logratios=operator.neg), "divergence_score_is_the", FORWARD_KL),
    ("dpo.losses:divergence_score", lambda f: lambda *args: f(*args) - math.log(2), "divergence_score_has", JS),
    ("dpo.losses:divergence_score", given(alpha=lambda alpha: alpha + 1), "divergence_score_is_the", ALPHA),
    ("dpo.losses:divergence_score", doubled, "divergence_score_is_the", ALPHA),
    ("dpo.losses:divergence_score", instead(unbounded_score), "divergence_score_stays", {}),
    ("dpo.metrics:preference_metrics", of_pairs(lambda x: x + 1e-6, "chosen_rewards"), "margin_of_0", {}),
    (
        "dpo.metrics:preference_metrics",
        of_pairs(operator.neg, *(f"{s}_rewards" for s in SIDES)),
        "metrics_equal",
        FORTY,
    ),
    ("dpo.metrics:preference_metrics", of_pairs(operator.neg, "chosen_logratios"), "metrics_equal", FORTY),
    ("dpo.metrics:preference_metrics", of_pairs(operator.neg, "chosen_logps"), "metrics_equal", FORTY),
    ("dpo.metrics:preference_metrics", of_pairs(torch.zeros_like, "rejected_lengths"), "metrics_equal", FORTY),
    ("dpo.metrics:gradient_weight", swapped, "metrics_equal", {"size": 7}),
    ("dpo.metrics:preference_metrics", with_a_correlation, "metrics_leave_out", {}),
    ("dpo.metrics:preference_metrics", given(sources=lambda names: names[1:] + names[:1]), "accuracy_of_each", {}),
    ("dpo.metrics:calibration_error", given(probabilities=lambda p: 1 - p), "calibration_error_by", {}),
    ("dpo.metrics:calibration_error", doubled, "calibration_error_equals", LARGE),
    ("dpo.metrics:calibration_error", instead(overall_gap), "calibration_error_equals", LARGE),
    ("dpo.metrics:PreferenceLedger.pop", keeping_its_pairs, "ledger_speaks", {}),
    ("dpo.metrics:PreferenceLedger.add", forgetting_earlier_pairs, "ledger_speaks", {}),
    *(
        ("dpo.implicit_reward:_logps_of_batch", given(rows=change), "reward_equals", REWARD)
        for change in (
            lambda rows: [(ids, start + 1) for ids, start in rows],
            lambda rows: [(ids, start - 1) for ids, start in rows],
            lambda rows: [([*ids, 0], start) for ids, start in rows],  # padding counts
        )
    ),
    (
        "dpo.implicit_reward:use_adapter",
        lambda use: lambda model, name: use(model, None),
        "reward_of_an",
        {"adapter": "ref"},
    ),
    ("dpo.implicit_reward:ImplicitReward.rank", lambda f: lambda *args: f(*args)[::-1], "ranking_is_by", {}),
    ("packing.segments:pack", one_token_off, "shared_rows_give_way", {}),
]
FILES = {"dpo.losses": "dpo_losses", "dpo.metrics": "dpo_metrics", "packing.segments": "pair_forward"}


@pytest.mark.parametrize("target, mistake, beginning, parameters", MISTAKES)
def test_mistake_is_noticed(monkeypatch, target, mistake, beginning, parameters):
    file = FILES.get(target.partition(":")[0], "implicit_reward")
    path = Path(__file__).parent / f"test_{file}.py"
    assert_noticed(path, beginning, parameters, f"trl_ext.{target}", mistake, monkeypatch)
