"""What the ledger says of pairs, against slow loops over lists."""

import random

import pytest
import torch

import oracles
from trl_ext.dpo import metrics


def rows(size=40, seed=0):
    """Random pairs, as eight numbers each."""
    rng = random.Random(seed)
    return [
        (
            *(rng.gauss(0.2, 1) for _ in range(2)),
            *(rng.gauss(0.5, 2) for _ in range(2)),
            *(rng.gauss(-40, 9) for _ in range(2)),
            *rng.choices(range(1, 30), k=2),
        )
        for _ in range(size)
    ]


def columns(rows):
    tensor = torch.tensor(rows)
    return dict(zip(metrics.COLUMNS, tensor.unbind(1), strict=True))


@pytest.mark.parametrize("size", [1, 2, 7, 40, 500])
def test_metrics_equal_the_slow_loops(size):
    expected = oracles.preference_metrics(rows(size))
    assert metrics.preference_metrics(columns(rows(size))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_metrics_leave_out_a_correlation_where_nothing_varies():
    same_lengths = [(*row[:6], 5, 5) for row in rows(10)]
    assert "preference/length_correlation" not in metrics.preference_metrics(columns(same_lengths))
    one = metrics.preference_metrics(columns(rows(1)))
    assert "preference/length_correlation" not in one


def test_margin_of_0_is_not_right():
    """As in TRL's rewards/accuracies: before training the accuracy is 0, not a half."""
    pairs = columns([(0.3, 0.3, 3.0, 3.0, -9.0, -8.0, 4, 5)] * 4)
    assert metrics.preference_metrics(pairs)["preference/accuracy"] == 0


def test_as_many_sources_as_pairs_take_one_pass():
    """A column of ids: a pass over all pairs for each of them would take hours."""
    count, compared = 20_000, []

    class Name(str):
        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = [Name(i) for i in range(count)]
    got = metrics.preference_metrics(columns(rows(50) * (count // 50)), names)
    assert sum(key.startswith("preference/accuracy/") for key in got) == count
    assert len(compared) < 100 * count


def test_accuracy_of_each_source():
    pairs = rows(30)
    names = [("a", "b b", "c")[i % 3] for i in range(30)]
    got = metrics.preference_metrics(columns(pairs), names)
    for name in ("a", "b b", "c"):
        own = [good > bad for (good, bad, *_), source in zip(pairs, names, strict=True) if source == name]
        assert got[f"preference/accuracy/{name}"] == pytest.approx(sum(own) / len(own))
        assert got[f"preference/pairs/{name}"] == len(own) == 10


@pytest.mark.parametrize("size", [1, 13, 1000])
def test_calibration_error_equals_the_slow_loop(size):
    """Of a policy that is right in three of four pairs, however sure it is: less often than it says, or more often."""
    rng = random.Random(size)
    confidences = [rng.uniform(0.5, 1) for _ in range(size)]
    probabilities = [c if rng.random() < 0.75 else 1 - c for c in confidences]
    got = metrics.calibration_error(torch.tensor(probabilities))
    assert got == pytest.approx(oracles.calibration_error(probabilities), abs=1e-6)


def test_calibration_error_by_hand():
    """Sure and right: 0. Sure and wrong: 1. Nine of ten right at 0.9: 0. Undecided: it was not right, and 0.5 sure."""
    assert metrics.calibration_error(torch.tensor([1.0, 1.0])) == pytest.approx(0)
    assert metrics.calibration_error(torch.tensor([0.0, 0.0])) == pytest.approx(1)
    assert metrics.calibration_error(torch.tensor([0.92] * 23 + [0.08] * 2)) == pytest.approx(0, abs=1e-6)
    assert metrics.calibration_error(torch.tensor([0.92] * 5 + [0.08] * 5)) == pytest.approx(0.42)
    assert metrics.calibration_error(torch.tensor([0.5] * 3)) == pytest.approx(0.5)


def test_ledger_speaks_of_all_batches_together_and_forgets_them():
    """A mean of batches of different sizes would be another number."""
    pairs, names = rows(11), [str(i % 2) for i in range(11)]
    ledger = metrics.PreferenceLedger()
    for part in (slice(0, 8), slice(8, 11)):
        ledger.add(torch.tensor(pairs[part]), names[part])
    got = ledger.pop()
    expected = oracles.preference_metrics(pairs)
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert {"preference/accuracy/0", "preference/accuracy/1"} <= got.keys()
    assert ledger.pop() == {}
