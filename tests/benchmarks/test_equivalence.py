"""`experiments/equivalence.py`: PPO, a reward model with PPO, and DPO end at one policy, as the page shows."""

import math
import re
import sys
from itertools import combinations

import pytest

from commands import ROOT, script


REWARDS = [-0.6, -0.3, 0.0, 0.2, 0.4, 0.6, 0.9, 1.2]
REFERENCE = [0.18, 0.22, 0.20, 0.14, 0.10, 0.08, 0.05, 0.03]
WAYS = ("PPO on the reward", "reward model, then PPO", "DPO")


@pytest.fixture(scope="module")
def equivalence():
    return script("equivalence")


def closed_form(rewards, reference, beta):
    weights = [p * math.exp(r / beta) for p, r in zip(reference, rewards, strict=True)]
    return [weight / sum(weights) for weight in weights]


def kl(logps, probabilities):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(logps.exp().tolist(), probabilities, strict=True))


def test_preferences_are_bradley_terrys(equivalence):
    shares = [1 / (1 + math.exp(REWARDS[b] - REWARDS[a])) for a, b in combinations(range(8), 2)]
    assert equivalence.preferences(None).tolist() == pytest.approx(shares)
    drawn = equivalence.preferences(4000)
    assert drawn.tolist() == pytest.approx(shares, abs=0.04)  # five standard deviations
    assert drawn.tolist() != pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_ppo_and_dpo_end_at_the_closed_form(equivalence, beta):
    histories = equivalence.train(equivalence.preferences(None), beta, steps=300)
    optimum = closed_form(REWARDS, REFERENCE, beta)
    for name in WAYS:
        assert kl(histories[name][0], REFERENCE) < 1e-12, name  # they start at the reference
        assert kl(histories[name][-1], optimum) < 1e-6, name
    assert kl(histories["DPO"][0], optimum) > 0.05
    # On the way they are apart: the losses are not the same.
    assert kl(histories["DPO"][3], histories["PPO on the reward"][3].exp().tolist()) > 1e-3


def test_control_s2s_model_knows_neither_reference_nor_beta(equivalence):
    end = equivalence.train(equivalence.preferences(None), beta=0.5, steps=300)["S2's preference model"][-1]
    assert kl(end, closed_form(REWARDS, [1 / 8] * 8, 1.0)) < 1e-6
    assert kl(end, closed_form(REWARDS, REFERENCE, 0.5)) > 0.02


def test_from_a_sample_both_ways_end_at_one_policy_that_misses_the_optimum(equivalence):
    histories = equivalence.train(equivalence.preferences(100), beta=0.5, steps=300)
    ends = {name: history[-1] for name, history in histories.items()}
    assert kl(ends["DPO"], ends["reward model, then PPO"].exp().tolist()) < 1e-6
    assert kl(ends["DPO"], closed_form(REWARDS, REFERENCE, 0.5)) > 1e-3
    assert kl(ends["PPO on the reward"], closed_form(REWARDS, REFERENCE, 0.5)) < 1e-6  # it sees no sample


@pytest.mark.integration
def test_tables_of_the_page_are_those_of_the_script(equivalence, tmp_path, capsys):
    equivalence.main(["--output", str(tmp_path / "equivalence.png")])
    tables = re.findall(r"(?:^\|.*\|\n?)+", capsys.readouterr().out, flags=re.MULTILINE)
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert len(tables) == 2
    assert all(table.strip() in page for table in tables)
    assert (tmp_path / "equivalence.png").stat().st_size > 10_000


def test_estimators_script_still_ends_where_its_page_says(equivalence, tmp_path, capsys, monkeypatch):
    """The estimators on the same bandit: k2 at the optimum, k3 at that of the reverse KL, k1 at neither."""
    import kl_estimators

    monkeypatch.setattr(sys, "argv", ["kl_estimators.py", "--steps", "200", "--output", str(tmp_path / "kl.png")])
    kl_estimators.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    distance = {row[0].strip(): [float(cell) for cell in row[1:3]] for row in rows[1:]}
    assert distance["k2"][0] < 1e-6 < 0.1 < distance["k3"][0]
    assert distance["k3"][1] < 1e-3 < 0.1 < distance["k2"][1]
    assert min(distance["k1"]) > 0.1
