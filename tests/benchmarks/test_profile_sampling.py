"""The profile of one sampled token: every operator is in one part, and the parts add up."""

import re

import pytest

from commands import script


@pytest.mark.parametrize(
    "operator, shapes, part",
    [
        ("aten::mm", [[16, 896], [896, 500]], "head"),
        ("aten::mm", [[16, 896], [896, 4864]], "layers and all else"),
        ("aten::exponential_", [[16, 500]], "noise of the draw"),
        ("aten::_softmax", [[16, 500], []], "softmax and choice"),
        ("aten::_softmax", [[16, 64], []], "layers and all else"),
    ],
)
def test_an_operator_belongs_to_one_part(operator, shapes, part):
    assert script("profile_sampling").part_of(operator, shapes, vocabulary=500) == part


@pytest.mark.filterwarnings("ignore")
def test_parts_add_up(capsys):
    script("profile_sampling").main(["--batch", "2", "--prompt", "4", "--tokens", "3", "--vocabulary", "300"])
    rows = [re.findall(r"-?\d+\.\d", line) for line in capsys.readouterr().out.splitlines()[-5:]]
    *parts, total = [[float(number) for number in row] for row in rows]
    assert [sum(side) for side in zip(*parts, strict=True)] == pytest.approx(total, abs=0.3)
