"""Names, links, navigation and public docstrings are right; every formula has its function and test."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from layers import PUBLIC_MODULES


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]


def read(path):
    return path.read_text(encoding="utf-8")


def relative(path):
    return str(path.relative_to(ROOT))


def without_code(markdown):
    return re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)


# --- names: `trl_ext/ppo/losses.py::ppo_terms`, `tests/docs/test_docs.py::test_...`


def named(markdown):
    """(file, name) of every reference in code, wherever a line was broken."""
    return re.findall(r"`((?:trl_ext|tests|scripts|benchmarks|experiments)/[\w/]+\.py)::(\w+)`", markdown)


def defined(path):
    """Names of functions and classes at the top of a file."""
    return {node.name for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


A_FILE = r"`((?:trl_ext|tests|scripts|benchmarks|experiments|configs|docs)/[\w/.]+\.(?:py|md|yaml|json|ipynb))`"


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_files_functions_and_tests_that_a_page_names_exist(path):
    for file in re.findall(A_FILE, read(path)):
        assert (ROOT / file).is_file(), f"{relative(path)} names {file}"
    for file, name in named(read(path)):
        assert (ROOT / file).is_file(), f"{relative(path)} names {file}"
        assert name in defined(ROOT / file), f"{relative(path)} names {file}::{name}"


def formulas(markdown):
    """Each displayed formula, with the text up to the next one."""
    parts = re.split(r"^\$\$\n(.*?)^\$\$\n", markdown, flags=re.MULTILINE | re.DOTALL)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_every_formula_of_the_theory_stands_beside_its_function_and_its_test():
    found = formulas(read(ROOT / "docs" / "theory.md"))
    assert len(found) >= 20
    for formula, text in found:
        code = re.search(r"^- Code:(.*?)^- Test:(.*?)(?:\n\n|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert code, f"no `- Code:` and `- Test:` after\n{formula}"
        tests = named(code.group(2))
        assert tests, f"no test beside\n{formula}"
        assert all(file.startswith("tests/") for file, _ in tests)


def test_control_a_name_that_does_not_exist_is_noticed():
    page = "See `trl_ext/ppo/losses.py::ppo_terms` and `trl_ext/ppo/losses.py::no_such_term`, `tests/none.py::test_x`."
    assert named(page)[1:] == [("trl_ext/ppo/losses.py", "no_such_term"), ("tests/none.py", "test_x")]
    names = defined(ROOT / "trl_ext" / "ppo" / "losses.py")
    assert "ppo_terms" in names
    assert "no_such_term" not in names


# --- sources


OWN_WORDS = r"\bS[0-4](?:'s)?(?: §|[,;:)]| writes| says| computes)|[Ss]ource documents?|[Tt]he documents'"
PUBLIC = ("trl_ext", "docs", "configs", "scripts", "experiments", "benchmarks")


def test_sources_have_names_that_a_reader_can_look_up():
    """Only the theory page calls its articles S0 to S4."""
    files = [path for room in PUBLIC for path in (ROOT / room).rglob("*") if path.suffix in {".py", ".md", ".yaml"}]
    found = {relative(path) for path in [*files, ROOT / "README.md"] if re.search(OWN_WORDS, read(path))}
    assert found == {"docs/theory.md"}


# --- links and navigation


def anchors(markdown):
    """The anchors that GitHub, and MyST like it, give to a page's headings."""
    found = []
    for heading in re.findall(r"^#{1,6} (.+)$", without_code(markdown), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(slug)
    return {f"{slug}-{i}" if i else slug for slug, count in Counter(found).items() for i in range(count)}


def dead_links(path, text):
    """Relative links of a page whose file or heading is not there."""
    dead = []
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", without_code(text)):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(read(there))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_links_lead_somewhere(path):
    assert dead_links(path, read(path)) == []


def test_control_a_dead_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('# Title\n\n## What "is", and when not\n')
    text = (
        "[a](page.md) [b](#title) [c](page.md#what-is-and-when-not) [d](none.md) [e](page.md#none) [f](https://x.org)"
    )
    assert dead_links(page, text) == ["none.md", "page.md#none"]


def test_every_page_is_in_the_navigation_once_and_linked_from_the_index():
    index = read(ROOT / "docs" / "index.md")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, flags=re.MULTILINE | re.DOTALL)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    entries = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
    pages = {path.stem for path in PAGES} - {"index"}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert sorted(entries) == sorted(pages | notebooks)
    linked = re.findall(r"\]\(([\w/]+)\.(?:md|ipynb)(?:#[\w-]+)?\)", index)
    assert pages | notebooks <= set(linked)


# --- the API


def public_definitions(path):
    """Functions and classes at the top of a module, and the methods of its classes, that have no underscore."""
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (child for child in node.body if isinstance(child, ast.FunctionDef))
                yield from ((f"{node.name}.{m.name}", m) for m in methods if not m.name.startswith("_"))


def module_path(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("module", sorted(PUBLIC_MODULES))
def test_public_module_is_on_an_api_page_and_all_in_it_is_documented(module):
    pages = "".join(read(path) for path in (ROOT / "docs" / "api").glob("*.md"))
    assert pages.count(f".. automodule:: {module}\n") == 1
    bare = [name for name, node in public_definitions(module_path(module)) if not ast.get_docstring(node)]
    assert not bare, f"{module} has public names without a docstring: {bare}"


@pytest.mark.proof
def test_site_builds_without_a_warning(tmp_path):
    """What `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs")]
    build = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-4000:]
    for notebook in ("dpo", "ppo"):
        shown = read(tmp_path / "notebooks" / f"{notebook}.html")
        assert shown.count('class="cell_output') >= 3
        assert "<table" in shown
        assert re.search(r'<img [^>]*src="\.\./_images/', shown)
    # The buttons that copy a command work without a network.
    landing = read(tmp_path / "index.html")
    assert re.findall(r'<script src="([^"]*copybutton[^"]*|[^"]*clipboard[^"]*)"', landing)
    assert not re.findall(r'<(?:script|link)[^>]* (?:src|href)="https?://', landing)
    names = {"trainers": "PPOTrainerX", "ppo": "ppo.losses.ppo_terms", "dpo": "dpo.losses.dpo_loss"}
    for page, name in names.items():
        assert f'id="trl_ext.{name}"' in read(tmp_path / "api" / f"{page}.html")
    assert "<math " in read(tmp_path / "theory.html")
