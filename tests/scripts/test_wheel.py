"""The wheel: that of the sdist is that of the tree, and with the packages that it requires it is all one needs."""

import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tiny


ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.proof
BUILD_SDIST = "import setuptools.build_meta as backend; backend.build_sdist('dist')"


def call(*words, cwd, **environment):
    """What the command printed; its failure is the test's."""
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=1500, env=os.environ | environment
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty virtual environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    return folder / "bin"


def required(requirements, extra):
    """The installed distributions that these requirements ask for, and theirs in turn, by name."""
    found, seen = {}, set()
    asked = [(requirement, extra) for requirement in requirements]
    while asked:
        text, of_extra = asked.pop()
        wanted = Requirement(text)
        if (text, of_extra) in seen or (wanted.marker and not wanted.marker.evaluate({"extra": of_extra})):
            continue
        seen.add((text, of_extra))
        distribution = found[wanted.name] = importlib.metadata.distribution(wanted.name)
        assert wanted.specifier.contains(distribution.version, prereleases=True), f"{text}: run `make setup`"
        asked += [(theirs, each) for theirs in distribution.requires or [] for each in ("", *wanted.extras)]
    return found


def link_installed(distributions, environment):
    """Puts what is installed here into the environment, by links: what pip would download and unpack takes minutes."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call(environment / "python", "-c", code, cwd=environment).strip())
    for distribution in distributions:
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(distribution.locate_file(name))


@pytest.fixture(scope="module")
def built(environment, tmp_path_factory):
    """Wheel of the tree, sdist, wheel of the sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("trl_ext", "configs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (environment / "python", "-m", "pip")
    call(*pip, "wheel", "--quiet", "--no-deps", "-w", "dist", ".", cwd=tree)
    call(*pip, "install", "--quiet", "setuptools>=77", cwd=tree)
    call(environment / "python", "-c", BUILD_SDIST, cwd=tree)
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    call(*pip, "wheel", "--quiet", "--no-deps", "-w", "again", sdist, cwd=tree)
    (again,) = (tree / "again").glob("*.whl")
    return wheel, sdist, again


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_of_the_sdist_is_the_wheel_of_the_tree(built):
    wheel, sdist, again = built
    assert contents(wheel) == contents(again)
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]


def test_wheel_holds_code_recipes_page_and_type_marker(built):
    files = contents(built[0])
    assert "trl_ext/py.typed" in files
    assert "trl_ext/report/page.html" in files
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_ext").rglob("*.py")}
    configs = {f"trl_ext/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.*")}
    texts = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_ext" / "cli" / "shipped").iterdir()}
    assert set(files) == code | configs | texts | {
        "trl_ext/py.typed",
        "trl_ext/report/page.html",
        "trl_ext/report/page.js",
        "trl_ext/planner/counts.json",
    }
    for path in configs:
        assert files[path] == (ROOT / path.removeprefix("trl_ext/")).read_bytes()


def test_wheel_with_what_it_requires_trains_scores_and_reports(built, environment, tmp_path):
    """As a newcomer does it: pip, the demo's reward model, DPO on ten lines of their own, a page about it."""
    call(environment / "python", "-m", "pip", "install", "--quiet", "--no-deps", built[0], cwd=tmp_path)
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    installed = required(requirements, extra="demo")
    assert not installed.keys() & {"pytest", "deepspeed", "bitsandbytes"}
    link_installed(installed.values(), environment)
    lines = [{"prompt": text, "chosen": " good film", "rejected": " bad"} for text in tiny.tiny_prompts(10)["prompt"]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trl_ext = environment / "trl-ext"
    own = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PATH": f"{environment}:{os.environ['PATH']}"}
    assert call(trl_ext, "--version", cwd=tmp_path, **own).startswith("trl-ext ")
    where = call(environment / "python", "-c", "import trl_ext; print(trl_ext.__file__)", cwd=tmp_path, **own)
    assert str(environment.parent) in where
    short = ("--max_steps", "1", "--train_size", "16", "--test_size", "4", "--per_device_train_batch_size", "2")
    said = call(trl_ext, "reward", *short, cwd=tmp_path, **own)
    assert "Everything is in outputs/reward-demo" in said
    run = ("--dataset_name", "pairs.jsonl", "--output_dir", "out", "--max_steps", "2", "--report_to", "none")
    said = call(trl_ext, "dpo", *run, "--per_device_train_batch_size", "2", cwd=tmp_path, **own)
    assert "  look    open out/report.html" in said
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    score = ("--model", "out", "--dataset_name", "pairs.jsonl", "--ref_model")
    base = call(
        *(environment / "python", "-c", "from trl_ext.data import demo; print(demo.smollm2())"), cwd=tmp_path, **own
    ).split()[-1]
    assert "Pairs in the right order" in call(trl_ext, "score", *score, base, cwd=tmp_path, **own)
    assert call(trl_ext, "report", "out", cwd=tmp_path, **own)
