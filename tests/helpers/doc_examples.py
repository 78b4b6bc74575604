"""The Python examples of README and docs, run in a folder that has what they read."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run(example: str, placeholders: dict[str, str], known: dict | None = None) -> dict:
    for placeholder, actual in placeholders.items():
        example = example.replace(placeholder, actual)
    names = dict(known or {})
    exec(compile(example, "example", "exec"), names)
    return names
