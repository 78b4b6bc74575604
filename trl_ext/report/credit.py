"""Answers by token, coloured by where the credit went: on the page, on the terminal and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ..runs.folder import is_of_this_run, newest
from ..runs.tables import read_rows
from .drawing import COLOURS, STYLE, figure, matplotlib


FOLDER = "credit"
# Number of a token -> its name on the page, and what it says; the first that an answer has is shown first.
NUMBERS = {
    "advantage": ("advantage", "how much better the token was than expected, as the loss reads it"),
    "value": ("value", "the score that the critic expected before the token"),
    "log_ratio": (
        "log-ratio",
        "log π_old − log π_ref, nats: positive where the actor likes it more than the reference",
    ),
    "reward": ("reward", "what was paid at the token"),
    "implicit_reward": ("implicit reward", "β · (log π_θ − log π_ref), of which the completion's reward is the sum"),
}
# Blue and orange are told apart with every common kind of colour blindness.
ABOVE_0, BELOW_0 = (0, 105, 180), (205, 100, 0)
STRONGEST = 0.6  # the share of the colour at the end of the scale, so that dark text on it can be read
PAPER = (254, 254, 254)
END_OF_PROMPT = 300  # letters of a prompt that are shown


@dataclass(frozen=True)
class Credit:
    """A few answers at a step, as [`trl_ext.runs.credit.answer_with_credit`] wrote them."""

    step: int
    answers: Sequence[Mapping[str, Any]]

    @property
    def numbers(self) -> list[str]:
        """Return the names of what is known of the tokens, in the order of `NUMBERS`."""
        pieces = [piece for answer in self.answers for piece in answer["pieces"]]
        return [name for name in NUMBERS if any(piece.get(name) for piece in pieces)]

    def end_of_scale(self, name: str) -> float:
        """Return the largest size of a number, which has the full colour."""
        means = (mean_of(piece, name) for answer in self.answers for piece in answer["pieces"])
        return max((abs(mean) for mean in means if mean is not None), default=0.0)


def read_credit(folder: str | Path) -> Credit | None:
    """Return what the callbacks wrote last; `None` if nothing, or in an earlier run only."""
    folder = Path(folder)
    files = newest([path for path in folder.glob(f"{FOLDER}/*.jsonl") if is_of_this_run(path, folder)])
    answers = read_rows(files[0]) if files else []
    return Credit(answers[0]["step"], answers) if answers else None


def mean_of(piece: Mapping[str, Any], name: str) -> float | None:
    """Return the mean over those tokens of a piece that count; `None` without one."""
    known = [value for value in piece.get(name) or () if value is not None]
    return sum(known) / len(known) if known else None


def shade(piece: Mapping[str, Any], name: str, end: float) -> float:
    """Return where a piece stands on the scale, −1 to 1; 0 has no colour."""
    return (mean_of(piece, name) or 0.0) / end if end else 0.0


def prompt_text(answer: Mapping[str, Any]) -> str:
    """Return the end of an answer's prompt."""
    prompt = str(answer["prompt"])
    return prompt if len(prompt) <= END_OF_PROMPT else f"… {prompt[-END_OF_PROMPT:]}"


def shown_text(piece: Mapping[str, Any]) -> str:
    """Return the text of a piece, with a sign where a line ends, which would be seen nowhere."""
    return str(piece["text"]).replace("\n", "⏎\n")


def tokens(credit: Credit, answer: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return an answer's pieces as the page shows them: text, class, the place on every scale, the numbers."""
    ends = {name: credit.end_of_scale(name) for name in credit.numbers}
    shown = []
    for piece in answer["pieces"]:
        known = {name: [value for value in piece.get(name) or () if value is not None] for name in ends}
        said = [
            f"{NUMBERS[name][0]} {', '.join(f'{value:+.3g}' for value in values)}"
            for name, values in known.items()
            if values
        ]
        kinds = ("token", "special" * bool(piece["special"]), "idle" * (not said))
        shown.append(
            {
                "text": shown_text(piece),
                "kinds": " ".join(filter(None, kinds)),
                "style": "; ".join(f"--{name}: {shade(piece, name, end):.3f}" for name, end in ends.items()),
                "title": "\n".join(said) or "does not count",
            }
        )
    return shown


def mixed(place: float) -> str:
    """Return the colour of a place on the scale on a light page, `#rrggbb`."""
    share = STRONGEST * abs(place)
    ends = zip(PAPER, ABOVE_0 if place > 0 else BELOW_0, strict=True)
    return "#" + "".join(f"{round((1 - share) * paper + share * end):02x}" for paper, end in ends)


def terminal_text(answer: Mapping[str, Any], name: str, end: float) -> Text:
    """Return an answer for the terminal, each token on its colour; what does not count is dim."""
    text = Text()
    for piece in answer["pieces"]:
        is_idle = mean_of(piece, name) is None
        style = "dim" if is_idle else f"{COLOURS['ink']} on {mixed(shade(piece, name, end))}"
        text.append(shown_text(piece), style=style)
    return text


def draw_credit(answers: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """
    Return a figure of short answers, a row for each; every number in `names`, by its heading, has a part of its own,
    and all have one scale.
    """
    end = max(Credit(0, answers).end_of_scale(name) for name in names)
    longest = max(len(answer["pieces"]) for answer in answers)
    with matplotlib().rc_context(STYLE):
        drawn = figure(0.9 + 0.62 * longest * len(names), 0.9 + 0.52 * len(answers))
        parts = drawn.subplots(1, len(names), squeeze=False, gridspec_kw={"wspace": 0.08})[0]
        drawn.subplots_adjust(left=0.01, right=0.99, bottom=0.16, top=0.88)
        for axis, (name, heading) in zip(parts, names.items(), strict=True):
            axis.set(xlim=(-0.1, longest), ylim=(len(answers), 0))
            axis.axis("off")
            axis.set_title(heading, fontsize=10)
            for row, answer in enumerate(answers):
                for column, piece in enumerate(answer["pieces"]):
                    box = matplotlib().patches.Rectangle(
                        (column, row + 0.05), 0.94, 0.86, facecolor=mixed(shade(piece, name, end))
                    )
                    axis.add_patch(box)
                    middle = {"ha": "center", "va": "center"}
                    axis.text(
                        column + 0.47, row + 0.32, shown_text(piece).strip(), fontsize=12, parse_math=False, **middle
                    )
                    mean = mean_of(piece, name)
                    number = "" if mean is None else f"{mean:+.2f}"
                    axis.text(column + 0.47, row + 0.7, number, fontsize=8, **middle)
        drawn.text(0.5, 0.04, f"orange −{end:.2f}, no colour 0, blue +{end:.2f}", ha="center", fontsize=9)
    return drawn
