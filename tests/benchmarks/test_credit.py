"""`experiments/credit.py`: the enumerated credit of four tokens is right, and the picture shows it."""

import re
import statistics
from itertools import product

import pytest
import torch

from commands import ROOT, script


@pytest.fixture(scope="module")
def credit():
    return script("credit")


def random_policy(credit):
    """Probabilities that depend on the whole beginning."""
    width = len(credit.VOCABULARY)

    def policy(beginnings):
        rows = []
        for one in beginnings:
            seed = sum((token + 1) * (width + 1) ** place for place, token in enumerate(one))
            rows.append(torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2)
        return torch.stack(rows) / torch.stack(rows).sum(1, keepdim=True)

    return policy


def path_sum(credit, policy, beginning):
    """V of a beginning: over all ways to fill four places, chance times score; what follows an end token is chosen by
    nobody and is skipped."""
    total = 0.0
    for rest in product(range(len(credit.VOCABULARY)), repeat=credit.LENGTH - len(beginning)):
        answer, chance = tuple(beginning), 1.0
        for token in rest:
            if credit.EOS in answer:
                chance *= token == 0  # one of the ways stands for all
                continue
            chance *= policy([answer])[0, token].item()
            answer = (*answer, token)
        total += chance * credit.score(answer)
    return total


def test_enumeration_equals_the_sum_over_all_paths(credit):
    policy = random_policy(credit)
    values = credit.enumerate_values(policy)
    for beginning in ((3, 6), (4,), (6, 3, 5), (3, 5, 1), (3, 1)):
        assert values[beginning] == pytest.approx(path_sum(credit, policy, beginning), abs=1e-9)
    assert values[3, 1] == 0


def test_enumeration_equals_the_closed_form_of_an_indifferent_policy(credit):
    """Of V tokens each equally likely: four first digits have one partner, and one of V tokens repeats the first."""
    width = len(credit.VOCABULARY)
    values = credit.enumerate_values(lambda beginnings: torch.full((len(beginnings), width), 1 / width))
    goes_on = 1 - 1 / width  # no end token at the third place
    of_sum = goes_on * (0.5 + 0.5 / width)
    assert values[3, 6] == pytest.approx(of_sum)
    assert values[()] == pytest.approx(4 / width * 1 / width * of_sum)
    assert credit.exact_credit(values, (3, 6, 4, 3)) == pytest.approx(
        [of_sum / width - values[()], of_sum - of_sum / width, 0.5 + 0.5 / width - of_sum, 0.5 - 0.5 / width]
    )


def test_credit_adds_up_to_what_the_score_exceeds_the_expected_by(credit):
    values = credit.enumerate_values(random_policy(credit))
    for answer in ((3, 6, 5, 3), (3, 6, 5, 4), (3, 4, 1)):
        total = sum(credit.exact_credit(values, answer))
        assert total == pytest.approx(credit.score(answer) - values[()])


def rows_of(text):
    """The table's numbers by the name of their row."""
    rows = re.findall(r"^\| (.+?) \| ([\d.-]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    return {name: (float(correlation), float(error)) for name, correlation, error in rows}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_table_and_picture_show_the_enumerated_credit_of_what_was_sampled(credit, tmp_path):
    actor = credit.imitating_actor(steps=50)
    values = credit.enumerate_values(credit.policy_of(actor))
    rollout = credit.train_critic(actor, 2, str(tmp_path))
    advantages = credit.advantages_of(rollout, values)
    exact, estimated = [], []
    for row, ids in enumerate(rollout.response_ids.tolist()):
        answer = ids[: int(rollout.attended[row].sum())]
        exact += credit.exact_credit(values, answer)
        estimated += (rollout.scores[row] - rollout.scores.mean()).repeat(len(answer)).tolist()
    error = statistics.mean(abs(a - b) for a, b in zip(exact, estimated, strict=True))
    shown = rows_of(credit.table(advantages, rollout.mask))["no critic"]
    assert shown == pytest.approx((statistics.correlation(exact, estimated), error), abs=6e-4)
    drawn = credit.draw_credit(credit.shown_answers(rollout, advantages), {"enumerated": "enumerated"})
    texts = [text.get_text() for text in drawn.axes[0].texts]
    ids = [[credit.VOCABULARY.index(digit) for digit in texts[row : row + 8 : 2]] for row in range(0, len(texts), 8)]
    assert len(ids) == 4
    assert [float(text) for text in texts[1::2]] == pytest.approx(
        [number for answer in ids for number in credit.exact_credit(values, answer)], abs=6e-3
    )


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_critic_finds_the_enumerated_credit(credit, tmp_path, capsys):
    """At the size of the page."""
    credit.main(["--output", str(tmp_path / "credit.png")])
    found = rows_of(capsys.readouterr().out)
    page = (ROOT / "docs" / "critic.md").read_text(encoding="utf-8")
    page = rows_of(page.split("## Credit, token by token")[1].split("\n## ")[0])
    assert list(found) == list(page)
    for name, (correlation, error) in page.items():
        assert found[name] == pytest.approx((correlation, error), abs=0.03), name
    assert found["critic, λ = 0"][0] > 0.95 > 0.75 > found["critic, λ = 1"][0] > found["no critic"][0]
    assert (tmp_path / "credit.png").stat().st_size > 10_000


def one_late(credit):
    """The credit of every token at the one behind it."""
    return lambda values, answer: [0.0, *credit(values, answer)[:-1]]


def test_control_credit_at_the_next_token_is_noticed(credit, monkeypatch):
    monkeypatch.setattr(credit, "exact_credit", one_late(credit.exact_credit))
    with pytest.raises(AssertionError):
        test_enumeration_equals_the_closed_form_of_an_indifferent_policy(credit)
