"""Tokens in the colour of their credit: on the page, on the terminal, as a picture."""

import html.parser
import json
import os
import re
from functools import partial
from pathlib import Path

import jinja2
import pytest

from mistakes import assert_noticed
from run_logs import PPO_LOG, run_folder
from trl_ext.report import credit as module
from trl_ext.report import read_run, write_report
from trl_ext.report.credit import Credit, draw_credit, mixed, read_credit, shade, terminal_text
from trl_ext.runs.tables import write_rows


HOSTILE = '</script><img src=x onerror="alert(1)"><b>'


def piece(text, special=False, **numbers):
    return {"text": text, "special": special} | numbers


ANSWER = {
    "step": 2,
    "prompt": "why <i>",
    "kind": "response",
    "score": 1.5,
    "pieces": [
        piece("a", advantage=[-2.0], value=[0.5]),
        piece("😀", advantage=[0.5, 1.5], value=[0.25, 0.75]),
        piece(HOSTILE, advantage=[], value=[]),
        piece("[red]\n", advantage=[4.0], value=[0.0]),
        piece("<eos>", True, advantage=[0.0], value=[-1.0]),
    ],
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("trl_ext.report.page.charts_of", lambda runs: [])


class Tokens(html.parser.HTMLParser):
    """The tokens of the answers on a page, in order, and every element."""

    def __init__(self):
        super().__init__()
        self.found, self.elements, self.open, self.text = [], [], None, ""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "span" and "token" in attributes.get("class", "").split() and "title" in attributes:
            self.open = attributes | {"text": ""}
            self.found.append(self.open)

    def handle_data(self, data):
        self.text += data
        if self.open is not None:
            self.open["text"] += data

    def handle_endtag(self, tag):
        self.open = None if tag == "span" else self.open


def page_of(folder, *answers):
    run_folder(folder, PPO_LOG)
    write_rows(folder / "credit" / "step_00002.jsonl", answers or [ANSWER])
    text = write_report([folder], picture=False).read_text(encoding="utf-8")
    parser = Tokens()
    parser.feed(text)
    return text, parser


def switches_of(parser):
    """Those of the numbers; the page has others for its curves."""
    inputs = [attributes for tag, attributes in parser.elements if tag == "input"]
    return [attributes for attributes in inputs if "class" in attributes]


def places(token):
    """By number, where it stands on the scale from −1 to 1."""
    found = re.findall(r"--(\w+): (-?[\d.]+)", token["style"])
    return {name: float(place) for name, place in found}


def test_each_token_has_the_place_of_its_own_number(tmp_path):
    _, parser = page_of(tmp_path)
    texts = [token["text"] for token in parser.found]
    assert texts == ["a", "😀", HOSTILE, "[red]⏎\n", "<eos>"]
    assert [places(token)["advantage"] for token in parser.found] == [-0.5, 0.25, 0.0, 1.0, 0.0]
    assert [places(token)["value"] for token in parser.found] == [0.5, 0.5, 0.0, 0.0, -1.0]
    assert [token["class"] for token in parser.found] == ["token", "token", "token idle", "token", "token special"]
    assert parser.found[1]["title"] == "advantage +0.5, +1.5\nvalue +0.25, +0.75"
    assert parser.found[2]["title"] == "does not count"


def test_what_the_model_wrote_does_not_become_markup(tmp_path):
    text, parser = page_of(tmp_path)
    tags = [tag for tag, _ in parser.elements]
    assert not set(tags) & {"img", "b", "i"}
    assert tags.count("script") == 3  # the page's own
    assert not any("onerror" in attributes for _, attributes in parser.elements)
    assert HOSTILE not in text


def test_every_number_can_be_switched_to_without_a_script(tmp_path):
    text, parser = page_of(tmp_path)
    switches = switches_of(parser)
    assert [switch["class"] for switch in switches] == ["by-advantage", "by-value"]
    assert ["checked" in switch for switch in switches] == [True, False]
    assert len({switch["name"] for switch in switches}) == 1
    labels = [attributes["for"] for tag, attributes in parser.elements if tag == "label" and "for" in attributes]
    assert labels == [switch["id"] for switch in switches]
    for name in ("advantage", "value"):
        assert f".by-{name}:checked ~ .answers .token {{ --x: var(--{name}); }}" in text
    assert re.search(r"of-advantage.*−4.*\+4", text)


def test_runs_on_one_page_are_switched_apart(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        page_of(folder)
    parser = Tokens()
    parser.feed(write_report(folders, tmp_path / "both.html", picture=False).read_text(encoding="utf-8"))
    switches = switches_of(parser)
    assert len({switch["name"] for switch in switches}) == 2
    assert len({switch["id"] for switch in switches}) == 4


def one_off(shown):
    """Every token has the colour of its left neighbour."""

    def mistaken(*args):
        found = shown(*args)
        styles = [token["style"] for token in found]
        return [token | {"style": style} for token, style in zip(found, styles[-1:] + styles[:-1], strict=True)]

    return mistaken


def not_centred(place):
    return lambda piece, name, end: (place(piece, name, end) + 1) / 2


@pytest.mark.parametrize("target, mistake", [("tokens", one_off), ("shade", not_centred)])
def test_control_wrong_colours_are_noticed(target, mistake, tmp_path, monkeypatch):
    assert_noticed(
        Path(__file__),
        "each_token",
        {"tmp_path": tmp_path},
        f"trl_ext.report.credit:{target}",
        mistake,
        monkeypatch,
    )


def test_control_a_page_that_escapes_nothing_is_noticed(tmp_path, monkeypatch):
    unescaped = partial(jinja2.Environment)
    monkeypatch.setattr(jinja2, "Environment", lambda **options: unescaped(**(options | {"autoescape": False})))
    with pytest.raises(AssertionError):
        test_what_the_model_wrote_does_not_become_markup(tmp_path)


def test_scale_ends_at_the_largest_and_has_its_middle_at_0():
    credit = Credit(3, [ANSWER])
    assert credit.numbers == ["advantage", "value"]
    assert (credit.end_of_scale("advantage"), credit.end_of_scale("value")) == (4.0, 1.0)
    assert shade(piece("x", value=[-0.5]), "value", 1.0) == -0.5
    assert shade(piece("x", value=[]), "value", 1.0) == 0.0
    assert shade(piece("x", value=[0.0]), "value", 0.0) == 0.0
    assert credit.end_of_scale("reward") == 0.0


def test_last_table_of_this_run_is_read(tmp_path):
    assert read_credit(tmp_path) is None
    for step, at in ((50, 100), (3, 300)):
        path = tmp_path / "credit" / f"step_{step:05d}.jsonl"
        write_rows(path, [ANSWER | {"step": step, "score": float(step)}])
        os.utime(path, (at, at))
    assert (read_credit(tmp_path).step, read_credit(tmp_path).answers[0]["score"]) == (3, 3.0)
    (tmp_path / "run.json").write_text(json.dumps({"begun": 400.0}))
    assert read_credit(tmp_path) is None
    assert read_run(run_folder(tmp_path / "other", PPO_LOG)).credit is None


def test_of_a_long_prompt_the_end_is_shown(tmp_path):
    _, parser = page_of(tmp_path, ANSWER | {"prompt": "<image>" * 500 + "what is it?"})
    assert "<image>what is it?" in parser.text
    assert parser.text.count("<image>") < 50


# --- the terminal


def test_terminal_shows_markup_as_text_and_colours_token_by_token():
    text = terminal_text(ANSWER, "advantage", 4.0)
    assert text.plain == f"a😀{HOSTILE}[red]⏎\n<eos>"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["a"].endswith(f"on {mixed(-0.5)}")
    assert styles["[red]⏎\n"].endswith(f"on {mixed(1.0)}")
    assert styles[HOSTILE] == "dim"


# --- colours


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def hexadecimal(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def themes(page):
    """Of the light and of the dark page: ground, text, the two colours and the strongest share of them."""
    light, dark = page[: page.index("<script")].split("prefers-color-scheme: dark")

    def last(name, part):
        return re.search(rf"--{name}: ([^;]+);", part)[1]

    for part in (light, dark):
        ground, text = (hexadecimal(last(name, part)) for name in ("page", "ink"))
        ends = [tuple(map(int, last(name, part).split())) for name in ("above", "below")]
        yield ground, text, ends, float(last("strongest", part))


def test_text_can_be_read_on_the_strongest_colours_of_both_themes(tmp_path):
    page, _ = page_of(tmp_path)
    for ground, text, ends, share in themes(page):
        for end in ends:
            under = tuple(share * c + (1 - share) * g for c, g in zip(end, ground, strict=True))
            assert contrast(text, under) > 4.5  # WCAG 2, level AA
    assert contrast(hexadecimal("#1c1e21"), hexadecimal(mixed(1.0))) > 4.5
    assert contrast(hexadecimal("#1c1e21"), hexadecimal(mixed(-1.0))) > 4.5


# Machado 2009, severity 1, on linear light.
SEEN_BY = {
    "protanope": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranope": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


@pytest.mark.parametrize("who", SEEN_BY)
def test_above_and_below_0_are_told_apart_without_red_and_green(who):
    def seen(colour):
        return [sum(m * (c / 255) ** 2.2 for m, c in zip(row, colour, strict=True)) for row in SEEN_BY[who]]

    def apart(one, other):
        return max(abs(a - b) for a, b in zip(seen(one), seen(other), strict=True))

    assert apart(module.ABOVE_0, module.BELOW_0) > 0.3
    assert apart((200, 64, 42), (95, 125, 40)) < 0.15  # the control: a red and a green


# --- the picture


def test_picture_has_the_colours_and_numbers_of_the_tokens():
    answer = {"pieces": [piece("1", exact=[0.5], critic=[0.25]), piece("2", exact=[-1.0], critic=[])]}
    drawn = draw_credit([answer, answer], {"exact": "enumerated", "critic": "the critic's"})
    exact, critic = drawn.axes
    colours = [tuple(round(255 * c) for c in patch.get_facecolor()[:3]) for patch in exact.patches]
    assert colours == [hexadecimal(mixed(0.5)), hexadecimal(mixed(-1.0))] * 2
    assert [text.get_text() for text in exact.texts] == ["1", "+0.50", "2", "-1.00"] * 2
    assert [text.get_text() for text in critic.texts] == ["1", "+0.25", "2", ""] * 2
