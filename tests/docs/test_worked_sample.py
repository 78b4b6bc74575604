"""The worked sample of DPO: the numbers of docs/dpo.md, by hand from its four log-probabilities."""

import math
import re

import pytest
import torch

from commands import ROOT, script


BETA = 0.1
NAMES = """
    policy_w policy_l reference_w reference_l ratio_w ratio_l reward_w reward_l margin probability loss weight
""".split()


def documented():
    """The page's table: a dictionary for each column, "at the start" and "after one step"."""
    text = (ROOT / "docs" / "dpo.md").read_text(encoding="utf-8")
    table = re.search(r"^\| quantity \|.*\n\| ---.*\n((?:\|.*\n)+)", text, flags=re.MULTILINE).group(1)
    rows = [[float(cell) for cell in row.split("|")[2:4]] for row in table.splitlines()]
    assert len(rows) == len(NAMES)
    return [dict(zip(NAMES, column, strict=True)) for column in zip(*rows, strict=True)]


def by_hand(policy_w, policy_l, reference_w, reference_l, **_):
    """Steps two and three of the sample."""
    reward_w, reward_l = BETA * (policy_w - reference_w), BETA * (policy_l - reference_l)
    margin = reward_w - reward_l
    probability = 1 / (1 + math.exp(-margin))
    return {
        "ratio_w": policy_w - reference_w,
        "ratio_l": policy_l - reference_l,
        "reward_w": reward_w,
        "reward_l": reward_l,
        "margin": margin,
        "probability": probability,
        "loss": -math.log(probability),
        "weight": 1 - probability,
    }


@pytest.mark.parametrize("column", [0, 1], ids=["start", "after"])
def test_every_value_of_the_page_follows_from_its_log_probabilities(column):
    page = documented()[column]
    for name, value in by_hand(**page).items():
        # A log-probability stands there with four decimals, what follows from it with six.
        assert page[name] == pytest.approx(value, abs=5e-5 if name.startswith("ratio") else 1e-6), name


def test_the_script_derives_what_the_page_shows():
    module = script("worked_sample")
    assert (module.PROMPT, module.BETA) == ("请介绍一下长城", BETA)
    columns = {}
    for heading, page in zip(("at the start", "after one step"), documented(), strict=True):
        pairs = ([page[f"{model}_{side}"] for side in "wl"] for model in ("policy", "reference"))
        columns[heading] = module.derive(*map(torch.tensor, pairs))
    assert module.table(columns) in (ROOT / "docs" / "dpo.md").read_text(encoding="utf-8")


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # of transformers, loading the model
def test_smollm2_gives_the_log_probabilities_of_the_page():
    module = script("worked_sample")
    pair = module.Pair(str(module.demo.smollm2()))
    sizes = [[len(ids) for ids in pair.tokens(answer)] for answer in (module.CHOSEN, module.REJECTED)]
    assert sizes == [[14, 42], [14, 18]]
    # AdamW's first step has the sign of each gradient: where one is next to nothing, rounding decides.
    for measured, page, tolerance in zip(module.measure().values(), documented(), (1e-3, 2e-2), strict=True):
        for value, name in zip(measured.values(), NAMES, strict=True):
            assert value == pytest.approx(page[name], abs=tolerance), name
