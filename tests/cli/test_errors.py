"""Ordinary mistakes: each is told in one line what to change, and docs/errors.md shows it."""

import pytest

from trl_ext.cli.errors import DEBUG
from wrong_lines import PAGE, escaped, lines, page, said_to, workplace


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    workplace(folder)
    return folder


@pytest.mark.parametrize("line", [line for _, line in lines()])
def test_mistake_is_told_in_one_line_as_on_the_page(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv(DEBUG, raising=False)
    said = said_to(line)
    assert said.startswith("error: ")
    assert f"`trl-ext {line}`\n\n> {escaped(said)}\n" in PAGE.read_text(encoding="utf-8")


def test_page_has_these_mistakes_alone():
    text = PAGE.read_text(encoding="utf-8")
    told = {line: f"{{{i}}}" for i, (_, line) in enumerate(lines())}
    of_page = [line for line in text.splitlines() if not line.startswith("> ")]
    assert of_page == [line for line in page(told).splitlines() if not line.startswith("> ")]
    assert len(told) >= 60
