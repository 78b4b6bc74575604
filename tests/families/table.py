"""The page `docs/families.md` from the results of a proof."""

import re
from collections import defaultdict
from collections.abc import Iterable

import transformers
import trl

from .prove_one import Result


COLUMNS = [("dpo", "float32"), ("dpo", "bf16"), ("ppo", "head"), ("ppo", "model"), ("ppo", "bf16")]
HEADINGS = ["DPO", "DPO, bf16", "PPO, head", "PPO, model", "PPO, bf16"]
BAD = {"wrong", "crashed"}

INTRODUCTION = """\
# Families of models

Every causal language model family of transformers {transformers}, as a tiny random model, through `DPOTrainerX` and
`PPOTrainerX` on TRL {trl}. `make families` proves them and writes this page.

- **exact**: the numbers of the model's own forward, one sequence at a time, without padding. For DPO they are loss,
  log-probabilities and gradient, and in float32 also loss, gradient and metrics of `trl.DPOTrainer`, to 2e-5. For PPO
  they are log-probabilities, reference, entropy, values and score of a rollout, and the gradient of the whole loss
  from slow loops. Under bf16 autocast, within three times what rounding does to the plain forward.
- For DPO, exact is **shared rows**, where a pair's common beginning is computed once, or **TRL's rows**.
- **refused**: a `ValueError` before the first step that names what is not understood (below).
- **fails**: transformers' or TRL's own code fails with the family; there is nothing to compare with.
- **–**: transformers has no sequence classification model of the family for a critic.

Configs have windows, chunks, blocks and top-k shorter than the rows, prompts of 1 to 19 tokens side by side, dropout
and router jitter that training has to switch off, and scales and caps after the head that are not 1. The critic is a
head on the actor's trunk or a copy of a reward model of the same family; bf16 is with the latter where there is one.
"""


def page(results: Iterable[Result]) -> str:
    """Markdown; the same results give the same page."""
    results = sorted(results, key=lambda result: result["family"])
    built = [result for result in results if "not built" not in result]
    parts = [INTRODUCTION.format(transformers=transformers.__version__, trl=trl.__version__), _counts(built)]
    parts += [_table(built), _reasons("Refused", _of_outcome(built, "refused"))]
    parts += [_reasons("TRL's rows, and why", _not_shared(built))]
    parts += [_reasons("Where transformers or TRL fails", _of_outcome(built, "transformers fails", "TRL fails"))]
    parts += [
        _reasons("Not built", {result["family"]: result["not built"] for result in results if result not in built})
    ]
    return "\n".join(part for part in parts if part)


def cell(result: Result, trainer: str, variant: str) -> str:
    """What the table says of a verdict."""
    verdict = result[trainer].get(variant)
    if verdict is None:
        return "–"
    if verdict["outcome"] == "exact":
        return verdict["rows"] or "exact"
    return {"transformers fails": "fails", "TRL fails": "fails"}.get(verdict["outcome"], verdict["outcome"])


def _counts(built: list[Result]) -> str:
    lines = []
    for trainer, variant, title in (("dpo", "float32", "DPO"), ("ppo", "head", "PPO")):
        cells = [cell(result, trainer, variant) for result in built]
        kinds = sorted(set(cells), key=lambda kind: -cells.count(kind))
        lines.append(f"{title}: " + ", ".join(f"{cells.count(kind)} {kind}" for kind in kinds) + f", of {len(cells)}.")
    return "  \n".join(lines) + "\n"


def _table(built: list[Result]) -> str:
    rows = [["family", *HEADINGS], ["---"] * (1 + len(HEADINGS))]
    rows += [[f"`{result['family']}`", *(cell(result, *column) for column in COLUMNS)] for result in built]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _of_outcome(built: list[Result], *outcomes: str) -> dict[str, str]:
    """The reason by family and what was run; runs that have the same one together."""
    reasons: dict[str, str] = {}
    for result in built:
        runs = defaultdict(list)
        for (trainer, variant), heading in zip(COLUMNS, HEADINGS, strict=True):
            verdict = result[trainer].get(variant)
            if verdict is not None and verdict["outcome"] in outcomes:
                runs[verdict["reason"].replace(result["model"], "The model")].append(heading)
        for reason, headings in runs.items():
            reasons[f"{result['family']} ({'; '.join(headings)})"] = reason
    return reasons


def _not_shared(built: list[Result]) -> dict[str, str]:
    return {
        result["family"]: verdict["reason"].replace(result["model"], "The model")
        for result in built
        if (verdict := result["dpo"]["float32"])["rows"] == "TRL's rows" and verdict["outcome"] == "exact"
    }


def _reasons(title: str, reasons: dict[str, str]) -> str:
    """A section; families with the same reason share a line."""
    if not reasons:
        return ""
    together = defaultdict(list)
    for name, reason in reasons.items():
        together[_in_short(reason)].append(f"`{name.split(' ')[0]}`{name[len(name.split(' ')[0]) :]}")
    lines = [f"- {', '.join(names)}: {reason}\n" for reason, names in together.items()]
    return f"## {title}\n\n" + "".join(lines)


def _in_short(reason: str) -> str:
    """What speaks against shared rows where that is in it, without the role; safe in Markdown."""
    parts = [part for part in re.split(r"; (?=[A-Z])", reason) if part.startswith("Rows ")] or [reason]
    short = re.sub(r"^(Rows are padded for the \w+, not packed|ValueError): ", "", parts[0])
    texts = short.split("`")  # every second one is code
    texts[::2] = [re.sub(r"([<>|\[\]])", r"\\\1", text) for text in texts[::2]]
    return "`".join(texts)
