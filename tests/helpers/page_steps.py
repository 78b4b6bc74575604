"""What a page of the documentation tells its reader to run."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[2]


def steps(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced command and Python block, or of every cell, in order."""
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        yield from (("python", "".join(cell["source"])) for cell in cells)
        return
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            yield language, block
        else:
            lines = (line.split("#")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            yield from (("bash", line) for line in lines if line)


def digest(cells: list[str]) -> str:
    """The digest of the source of all code cells of a notebook."""
    return hashlib.sha256("\n\n".join(cells).encode()).hexdigest()
