"""
Run the notebooks of `docs/notebooks/` and keep what their cells show: `make notebooks`, by hand, when a cell changes.

Of each output the picture is kept, else the Markdown, else the text; progress bars and warnings are not. `sources` in
the metadata is the digest of the cells that were run (`tests/docs/test_pages_run.py` compares it).
"""

import base64
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from page_steps import digest


FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
WIDTH = 1100  # pixels of a picture, as wide as the site shows it


def smaller(picture: str) -> str:
    """A PNG in base64, no wider than `WIDTH` and with 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((WIDTH, 10_000))
    file = io.BytesIO()
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def kept(output: Any) -> Any | None:
    """What the page shows of an output, or `None`."""
    data = output.get("data", {})
    if "image/png" in data:
        data = {"image/png": smaller(data["image/png"])}
    elif "text/markdown" in data:
        data = {"text/markdown": data["text/markdown"]}
    elif "text/plain" in data and "text/html" not in data:
        data = {"text/plain": data["text/plain"]}
    else:
        return None
    return nbformat.from_dict({"output_type": "display_data", "metadata": {}, "data": data})


def record(path: Path) -> None:
    """Run a notebook in an empty folder and store it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(kept, cell.outputs) if output]
            cell.execution_count = None
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "sources": digest([cell.source for cell in notebook.cells if cell.cell_type == "code"]),
        }
    )
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        record(path)
