"""Every command of docs/scale.md runs as it stands, and its tables say what the planner says."""

import re
import shlex
from pathlib import Path

import pytest

from commands import command


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def plan_script():
    return command("plan")


def run(script, line: str, capsys) -> str:
    program, name, *flags = shlex.split(line)
    assert (program, name) == ("trl-ext", "plan")
    script.main(flags)
    return capsys.readouterr().out


def test_commands_of_the_readme_are_among_those_of_the_page():
    of_readme = re.findall(r"^trl-ext plan[^#\n]*", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert of_readme
    assert {line.strip() for line in of_readme} <= set(COMMANDS)


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_command_of_the_page_runs(plan_script, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    line = line.replace("docs/images/scale.png", str(tmp_path / "scale.png"))
    text = run(plan_script, line, capsys)
    assert "tokens/s" in text
    if "--picture" in line:
        assert (tmp_path / "scale.png").stat().st_size > 30_000


def rows(trainer: str) -> list[list[str]]:
    table = re.search(rf"\| {trainer}, 33B .*?\n\n", PAGE, flags=re.DOTALL).group()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[3:]]


@pytest.mark.parametrize("trainer", ["PPO", "DPO"])
def test_figures_of_the_tables_are_the_planners(plan_script, trainer, capsys):
    """The commands below the tables are the tables' lines, in their order, but for the first, which is loading."""
    lines = [c for c in COMMANDS if "33b" in c and "--scale" not in c and c != COMMANDS[2]]
    lines = [c for c in lines if ("--trainer dpo" in c) == (trainer == "DPO")]
    assert len(lines) == len(rows(trainer))
    for line, (_, gpus, each, host, fits) in zip(lines, rows(trainer), strict=True):
        text = run(plan_script, line, capsys)
        assert f": {each} of 80.0 GiB on each GPU" in text
        assert int(re.search(r"on (\d+) GPU", text).group(1)) == int(gpus)
        assert ("It fits: " in text) == (not fits.startswith("no"))
        assert (f"Host memory of a node: {host} of" in text) == bool(host)


def test_loading_33b_takes_what_the_page_says(plan_script):
    assert f"{plan_script.planner.model_shape('33b').parameters * 2 / 2**30:.1f} GiB" in PAGE


def test_script_reads_a_recipe_and_flags_override_it(plan_script, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = run(plan_script, "trl-ext plan --from-config configs/ppo/demo.yaml --gpu cpu", capsys)
    assert "PPO: actor (lora) smollm2-135m-instruct 0.135B" in text
    assert "critic (model)" in text
    text = run(plan_script, "trl-ext plan --from-config configs/ppo/demo.yaml --gpu cpu --critic head", capsys)
    assert "critic (head)" in text
