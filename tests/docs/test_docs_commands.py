"""Every fenced command and Python block of the walked pages runs, in the order of the page and in one folder.

The model is a narrow one with the tests' tokenizer, the ratings are made up, and every run is cut short by flags that
follow its own.
"""

import gc
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

import commands
import tiny
from run_logs import PPO_LOG, png_size, run_folder
from trl_ext.data import demo
from trl_ext.ppo.config import PPOLoopConfig


# The Trainer collects garbage when training starts, which would go through every object of every library each time.
gc.collect()
gc.freeze()

# Of TRL, transformers and torch themselves, on the way through whole scripts.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]

# What is not run here, and why not.
ELSEWHERE = {
    "make demo": "tests/scripts/test_proof_demo.py runs what it runs, in full",
    "make test": "runs this test",
    "pip install .": "the tests run on an installed package",
    'pip install ".[demo]"': "tests/scripts/test_wheel.py installs the wheel in an empty environment",
    "trl-ext dpo --nproc 2 --model my-sft --dataset_name pairs.jsonl --output_dir out/two": (
        "tests/cli/test_launch.py starts two processes"
    ),
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' --logprobs-mode '
    "processed_logprobs": "needs vLLM and a GPU; tests/ppo/test_vllm.py has a server of its own",
}
# Pages of measurements, whose commands take minutes to hours: where each of them runs, in full or cut short.
MEASURED = {
    "docs/demo.md": {
        "trl-ext reward --test_size 250": "tests/scripts/test_proof_demo.py",
        "trl-ext ppo --test_size 288": "tests/scripts/test_proof_demo.py",
        "trl-ext ppo --test_size 288 --critic head --critic_learning_rate 1e-3 --output_dir outputs/ppo-head": (
            "tests/scripts/test_proof_demo.py"
        ),
        "trl-ext dpo": "tests/scripts/test_proof_demo.py",
    },
    "docs/kl_estimators.md": {"python experiments/kl_estimators.py": "tests/benchmarks/test_equivalence.py"},
    "docs/measurements.md": {
        "python benchmarks/bench_ppo.py": "tests/benchmarks/test_bench_ppo.py",
        "python benchmarks/bench_dpo.py": "tests/benchmarks/test_bench_dpo.py",
        "python benchmarks/measure_memory.py": "tests/benchmarks/test_planner_measuring.py",
        "python benchmarks/measure_gpu.py": "tests/benchmarks/test_planner_measuring.py",
    },
}
A_COMMAND = re.compile(rf"^(?:\$ )?(?:\w+=\S+ )*(?:trl-ext|{commands.A_SCRIPT}|pip|make|vllm)(?: |$|\w)", re.MULTILINE)

# What cuts a run short, by script.
BATCH = "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --report_to none"
SHORT = {
    "reward": f"--max_steps 2 {BATCH} --train_size 8 --test_size 4",
    "dpo": f"--max_steps 2 --warmup_steps 0 {BATCH} --train_size 8 --test_size 4",
    "ppo": f"--total_episodes 4 --gradient_accumulation_steps 1 --num_ppo_epochs 1 {BATCH} --response_length 3 "
    "--test_size 4",
    "score": "--test_size 4",
    "equivalence": "--steps 20",
    "plan": "",
}
SHORTER_PYTHON = {
    "total_episodes=128": "total_episodes=4",
    "total_episodes=10_000": "total_episodes=4",
    "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    "train_size=64, test_size=32": "train_size=8, test_size=4",
}
SHORTER_NOTEBOOKS = {
    "train_size=640, test_size=256": "train_size=8, test_size=4",
    "train_size=192, test_size=128": "train_size=8, test_size=4",
    "test_size=192": "test_size=4",
    "total_episodes=896": "total_episodes=8",
    "gradient_accumulation_steps=4": "gradient_accumulation_steps=1",
    "response_length=12": "response_length=3",
}


def steps(page):
    """(language, text) of every fenced command and Python block, in order."""
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        if language == "python":
            yield language, block
        else:
            lines = (line.split("#")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            yield from (("bash", line) for line in lines if line)


def made_up_ratings():
    """600 different sentences of 4 to 11 words of the tests' vocabulary."""
    rng = random.Random(0)
    texts = {" ".join(rng.choices(tiny.WORDS[:50], k=rng.randint(4, 11))) for _ in range(600)}
    return Dataset.from_list(
        [{"text": text, "rating": rng.uniform(-4, 4), "source": f"row/{i}"} for i, text in enumerate(sorted(texts))]
    )


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder like a checkout, with the files that the pages call theirs, as current directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "benchmarks", "experiments"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for folder in ("configs", "scripts", "benchmarks", "experiments"):
        Path(folder).symlink_to(ROOT / folder)
    Path("docs/images").mkdir(parents=True)
    paths = tiny.save_tiny(tmp_path)
    # NF4 on CPU needs such widths.
    tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained("my-sft")
    tiny.tiny_tokenizer().save_pretrained("my-sft")
    tiny.tiny_reward_model().save_pretrained("my-reward")
    tiny.tiny_tokenizer().save_pretrained("my-reward")
    rows = [{"prompt": text} for text in tiny.tiny_prompts(40)["prompt"]]
    write_lines("prompts.jsonl", rows)
    write_lines("pairs.jsonl", [row | {"chosen": " good film", "rejected": " bad film"} for row in rows])
    monkeypatch.setattr(demo, "smollm2", lambda: paths["actor"])
    monkeypatch.setattr(demo, "movie_reviews", made_up_ratings)
    return tmp_path


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_command(line):
    """`trl-ext x …` or `python scripts/x.py …`, cut short."""
    commands.run(line, *SHORT[commands.name_in(line)].split())


def run_python(code, names):
    for long, short in (SHORTER_PYTHON | SHORTER_NOTEBOOKS).items():
        code = code.replace(long, short)
    exec(compile(code, "block", "exec"), names)


def walk(page, python=True):
    """Runs a page from top to bottom; returns the names that its Python has left."""
    names: dict = {}
    for language, text in steps(page):
        if language == "python" and python:
            run_python(text, names)
        elif language == "bash" and text not in ELSEWHERE:
            run_command(text)
    return names


@pytest.mark.usefixtures("undrawn")
def test_quick_start_runs_from_top_to_bottom(workplace):
    trainer = walk("docs/quickstart.md")["trainer"]
    assert trainer.state.global_step > 0
    folders = ("outputs/dpo-demo", "outputs/reward-demo", "outputs/ppo-demo", "outputs/ppo-head", "out/dpo", "out/ppo")
    for folder in folders:
        assert (workplace / folder / "metrics.json").is_file(), folder
    assert (workplace / "outputs/ppo-head/critic").is_dir()
    assert len((workplace / "out/scores.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("undrawn")
def test_tutorial_runs_from_top_to_bottom(workplace):
    names = walk("docs/tutorial.md")
    for folder in ("reward", "dpo", "ppo", "dpo-then-ppo"):
        assert (workplace / "outputs" / folder / "metrics.json").is_file(), folder
    assert names["trainer"].state.global_step > 0
    ratings = {row["text"]: row["rating"] for row in made_up_ratings()}
    gaps = [ratings[row["chosen"]] - ratings[row["rejected"]] for row in names["pairs"]]
    assert min(gaps) > 1
    assert len(gaps) > 50
    assert [row["source"] for row in names["pairs"]] == ["gap above 2" if g > 2 else "gap 1 to 2" for g in gaps]
    # A prompt opens no sentence of the pairs.
    texts = [row[side] for row in names["pairs"] for side in ("chosen", "rejected")]
    openings = [prompt.removeprefix(demo.CUE) for prompt in names["prompts"]["prompt"]]
    assert len(openings) > 50
    assert not [opening for opening in openings if any(text.startswith(f"{opening} ") for text in texts)]
    # The source of a pair reaches the table of the DPO run.
    assert "| accuracy, gap above 2 |" in (workplace / "outputs/dpo/table.md").read_text()


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_notebook_runs_from_top_to_bottom(workplace, monkeypatch, name):
    """All cells, as they stand but shorter; what would be shown in the notebook is only made."""
    shown = []
    display = SimpleNamespace(Image=lambda path: shown.append(Path(path).stat().st_size), Markdown=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(re.fullmatch(r"[\w-]+", cell["id"]) for cell in notebook["cells"])
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # measured figures are on the demo's page
            run_python("".join(cell["source"]), names)
    table, picture = shown
    assert picture > 10_000
    assert len(table.splitlines()) > 4
    assert names["trainer"].state.global_step > 0
    if name == "dpo":
        assert names["after"]["eval_preference/pairs"] == 4
    else:
        assert math.isfinite(names["after"]["eval_reward/rise"])


def test_migration_page_makes_a_config_like_trl112(workplace):
    args = walk("docs/migration.md")["args"]
    assert (args.kl_placement, args.vf_coef, args.ent_coef, args.temperature) == ("reward", 0.1, 0.0, 0.7)
    assert PPOLoopConfig(args).kl_estimator == "k1"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("page", ["README.md", "docs/command_line.md", "docs/dpo.md", "docs/ppo.md", "docs/theory.md"])
def test_commands_of_the_page_run(workplace, page):
    """Its Python examples, where it has some, are those of tests/docs/test_examples.py."""
    assert any(commands.LINE.fullmatch(text) for _, text in steps(page))
    walk(page, python=False)


def test_report_page_draws_one_run_then_two_then_one_until_it_is_done(tmp_path, monkeypatch, capsys):
    """Its Python example is that of tests/runs/test_card.py."""
    monkeypatch.chdir(tmp_path)
    demo, head = (
        run_folder(tmp_path / "outputs" / name, PPO_LOG[:4], max_steps=3) for name in ("ppo-demo", "ppo-head")
    )
    one, two, watched = [text for language, text in steps("docs/report.md") if language == "bash"]

    commands.run(one)
    assert png_size(demo / "report.png")
    assert not Path("report.html").exists()
    commands.run(two)
    assert all(name in Path("report.html").read_text(encoding="utf-8") for name in ("ppo-demo", "ppo-head"))
    assert not (head / "report.html").exists()

    waits = []

    def sleep(seconds):
        waits.append((seconds, 'http-equiv="refresh"' in (demo / "report.html").read_text(encoding="utf-8")))
        run_folder(demo, PPO_LOG, global_step=3, max_steps=3)

    monkeypatch.setattr("time.sleep", sleep)
    capsys.readouterr()
    commands.run(watched)
    assert waits == [(60, True)]
    assert capsys.readouterr().out.count("ppo-demo: step ") == 2
    assert 'http-equiv="refresh"' not in (demo / "report.html").read_text(encoding="utf-8")


def test_walked_pages_are_all_that_have_commands():
    walked = {"README.md", "docs/dpo.md", "docs/migration.md", "docs/ppo.md", "docs/quickstart.md", "docs/theory.md"}
    walked |= {"docs/command_line.md", "docs/report.md", "docs/tutorial.md"}
    # tests/docs/test_planner_docs.py, tests/scale/test_proof_launch_page.py
    walked |= {"docs/scale.md", "docs/launch.md"}
    found = {page for page in pages() if any(language == "bash" for language, _ in steps(page))}
    assert found == walked | MEASURED.keys()
    assert [page for page in pages() if commands_outside_bash((ROOT / page).read_text())] == []


def pages():
    return ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def commands_outside_bash(text):
    """Lines that look like commands in a fence of another language, or of none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [match[0] for language, block in blocks if language != "bash" for match in A_COMMAND.finditer(block)]


@pytest.mark.parametrize(
    "line",
    [
        "trl-ext dpo --model m",
        "python scripts/x.py",
        "pip install x",
        "make test",
        "A=1 vllm serve m",
        "$ trl-ext x",
    ],
)
def test_command_in_a_bare_fence_is_found(line):
    assert commands_outside_bash(f"text\n\n```\n{line}\n```\n")
    assert commands_outside_bash(f"```text\nfirst\n{line}\n```\n")
    assert not commands_outside_bash(f"```bash\n{line}\n```\n\nmake it so\n\n```\nloss = makeshift · pip\n```\n")


@pytest.mark.parametrize("page", MEASURED)
def test_commands_of_a_page_of_measurements_run_elsewhere(page):
    assert [text for language, text in steps(page) if language == "bash"] == list(MEASURED[page])
    for line, test in MEASURED[page].items():
        text = (ROOT / test).read_text()
        assert re.search(rf"\b{commands.name_in(line)}\b", text), f"{test} does not run {line}"


def test_every_shortening_is_used():
    code = "".join(text for path in (ROOT / "docs").glob("*.md") for _, text in steps(f"docs/{path.name}"))
    cells = "".join(path.read_text() for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert [long for long in SHORTER_PYTHON if long not in code] == []
    assert [long for long in SHORTER_NOTEBOOKS if long not in cells] == []
