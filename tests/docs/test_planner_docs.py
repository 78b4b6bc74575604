"""The tables of docs/scale.md say what the planner says."""

import re
from pathlib import Path

import pytest

import commands
from trl_ext.planner import model_shape


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def rows(trainer: str) -> list[list[str]]:
    table = re.search(rf"\| {trainer}, 33B .*?\n\n", PAGE, flags=re.DOTALL).group()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[3:]]


@pytest.mark.parametrize("trainer", ["PPO", "DPO"])
def test_figures_of_the_tables_are_the_planners(trainer, capsys):
    """The commands below the tables are the tables' lines, in their order, but for the first, which is loading."""
    lines = [c for c in COMMANDS if "33b" in c and "--scale" not in c and c != COMMANDS[2]]
    lines = [c for c in lines if ("--trainer dpo" in c) == (trainer == "DPO")]
    assert len(lines) == len(rows(trainer))
    for line, (_, gpus, each, host, fits) in zip(lines, rows(trainer), strict=True):
        commands.run(line)
        text = capsys.readouterr().out
        assert f": {each} of 80.0 GiB on each GPU" in text
        assert int(re.search(r"on (\d+) GPU", text).group(1)) == int(gpus)
        assert ("It fits: " in text) == (not fits.startswith("no"))
        assert f"Host memory of a node: {host or 0} of" in text


def test_loading_33b_takes_what_the_page_says():
    assert f"{model_shape('33b').parameters * 2 / 2**30:.1f} GiB" in PAGE


def test_questions_are_answered_as_the_page_says(capsys):
    """All 25: whether it fits, and every number of the answer."""
    questions = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
    assert len(questions) == 25
    for flags, answer in questions:
        commands.run(f"trl-ext plan {flags}")
        text = capsys.readouterr().out
        assert text.count("It fits: ") == answer.startswith("fits"), flags
        assert text.count("It does not fit: ") == answer.startswith("does not fit"), flags
        assert all(number in text for number in re.findall(r"\d+\.\d|\d{3,}", answer)), (flags, answer)
    assert re.match(r"\| lora +\| head / .* 79\.8 ", text.splitlines()[2])
