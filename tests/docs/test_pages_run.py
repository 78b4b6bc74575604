"""
Every fenced command, Python block and notebook of the documentation runs, page by page, from top to bottom, in one
folder, on narrow models and made-up ratings, each run cut short by flags behind its own or by `SHORTER`.
"""

import ast
import base64
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import commands
import dpo_runs
import four_roles
import tiny
from page_steps import ROOT, digest, steps
from ppo_runs import ppo_config
from run_logs import PPO_LOG, png_size, run_folder
from trl_ext.data import demo
from trl_ext.ppo.config import PPOLoopConfig


# Of TRL, transformers and torch themselves, on the way through whole scripts.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

# What is not run here, and why not.
ELSEWHERE = {
    "make demo": "tests/scripts/test_proof_demo.py runs what it runs, in full",
    "make test": "runs this test",
    "pip install .": "the tests run on an installed package",
    "trl-ext chat outputs/dpo-demo": "tests/cli/test_chat.py chats",
    'pip install ".[demo]"': "tests/scripts/test_wheel.py installs the wheel in an empty environment",
    "trl-ext dpo --nproc 2 --model my-sft --dataset_name pairs.jsonl --output_dir out/two": (
        "tests/cli/test_launch.py starts two processes"
    ),
    "trl-ext serve my_ppo.yaml": "needs vLLM; tests/cli/test_serve.py has the command, test_vllm_engine.py the server",
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8000 --dtype bfloat16 --weight-transfer-config "
    '\'{"backend": "nccl"}\' --logprobs-mode processed_logprobs': "needs vLLM and a GPU; tests/cli/test_serve.py",
}
# Pages of measurements, whose commands take minutes to hours: where each of them runs, in full or cut short.
SHORT_PPO = "--total_episodes 128 --gradient_accumulation_steps 2 --warmup_steps 0 --test_size 96"
MEASURED = {
    "docs/demo.md": {
        "trl-ext reward --test_size 250": "tests/scripts/test_proof_demo.py",
        "trl-ext ppo --test_size 288": "tests/scripts/test_proof_demo.py",
        "trl-ext ppo --test_size 288 --critic head --critic_learning_rate 1e-3 --output_dir outputs/ppo-head": (
            "tests/scripts/test_proof_demo.py"
        ),
        "trl-ext dpo": "tests/scripts/test_proof_demo.py",
    },
    "docs/critic.md": {
        "python experiments/credit.py": "tests/benchmarks/test_credit.py",
        "trl-ext critic": "tests/cli/test_critic.py",
        f"trl-ext ppo {SHORT_PPO}": "tests/cli/test_critic.py",
        f"trl-ext ppo {SHORT_PPO} --value_model outputs/critic-demo --output_dir outputs/ppo-pretrained": (
            "tests/cli/test_critic.py"
        ),
        "python benchmarks/bench_learning.py": "tests/benchmarks/test_bench_learning.py",
        "python benchmarks/measure_value_heads.py": "tests/benchmarks/test_measure_value_heads.py",
    },
    "docs/kl_estimators.md": {"python experiments/kl_estimators.py": "tests/benchmarks/test_equivalence.py"},
    "docs/measurements.md": {
        "python benchmarks/bench_ppo.py": "tests/benchmarks/test_bench_ppo.py",
        "python benchmarks/bench_ppo.py --shapes varied-answers varied wide-varied-answers": (
            "tests/benchmarks/test_bench_ppo.py"
        ),
        "python benchmarks/bench_ppo.py --shapes groups groups-varied varied-groups": (
            "tests/benchmarks/test_bench_ppo.py"
        ),
        "python benchmarks/profile_sampling.py": "tests/benchmarks/test_profile_sampling.py",
        "python benchmarks/measure_growth.py": "tests/benchmarks/test_measure_growth.py",
        "python benchmarks/bench_overlap.py times": "tests/benchmarks/test_bench_overlap.py",
        "python benchmarks/bench_overlap.py learning": "tests/benchmarks/test_bench_overlap.py",
        'python benchmarks/bench_overlap.py learning --task "late score"': "tests/benchmarks/test_bench_overlap.py",
        "python benchmarks/bench_dpo.py": "tests/benchmarks/test_bench_dpo.py",
        "python benchmarks/bench_reward.py": "tests/benchmarks/test_bench_reward.py",
        "python benchmarks/measure_memory.py": "tests/benchmarks/test_planner_measuring.py",
        "python benchmarks/measure_gpu.py": "tests/benchmarks/test_planner_measuring.py",
        "python benchmarks/bench_ppo.py --device cuda --shapes 0.5b 1.5b --runs 1 --minutes 5": (
            "tests/benchmarks/test_bench_ppo.py"
        ),
        "python benchmarks/bench_ppo.py --device cuda --shapes 7b-lora --runs 1 --minutes 5": (
            "tests/benchmarks/test_bench_ppo.py"
        ),
    },
}
A_COMMAND = re.compile(
    rf"^(?:\$ )?(?:\w+=\S+ )*(?:trl(?:-ext)?|{commands.A_SCRIPT}|pip|make|vllm serve)(?: |$|\w)", re.MULTILINE
)

# What cuts a run short, by script.
# Other pages have runs in the same folders.
BATCH = "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --report_to none --overwrite"
SHORT = {
    "reward": f"--max_steps 2 {BATCH} --train_size 8 --test_size 4",
    "dpo": f"--max_steps 2 --warmup_steps 0 {BATCH} --train_size 8 --test_size 4",
    "ppo": f"--total_episodes 4 --gradient_accumulation_steps 1 --num_ppo_epochs 1 {BATCH} --response_length 3 "
    "--test_size 4",
    "critic": f"--total_episodes 4 --gradient_accumulation_steps 1 --max_passes 1 {BATCH} --response_length 3 "
    "--test_size 4",
    "sft": "--max_steps 2 --per_device_train_batch_size 4 --report_to none --use_cpu",
    "score": "--test_size 4",
    "equivalence": "--steps 20",
    "plan": "",
    "merge": "",
    "recipes": "",
}
TWO_STEPS = 'max_steps=2, logging_steps=1, per_device_train_batch_size=4, save_strategy="no", report_to="none"'
SHORTER = {
    "path/to/sft-model": "my-sft",
    "path/to/reward-model": "my-reward",
    "path/to/reward-adapter": "my-reward-adapter",
    "total_episodes=128": "total_episodes=4",
    "total_episodes=10_000": "total_episodes=4",
    "total_episodes=192": "total_episodes=8",
    "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    "response_length=12": "response_length=3",
    "train_size=64, test_size=32": "train_size=8, test_size=4",
    "train_size=192, test_size=96": "train_size=8, test_size=4",
    "test_size=48)": "test_size=4)",
    'DPOConfig("outputs/trl-dpo", ': f'DPOConfig("outputs/trl-dpo", bf16=False, {TWO_STEPS}, ',
    'GRPOConfig("outputs/grpo", beta=0.04': 'GRPOConfig("outputs/grpo", beta=0.04, num_generations=2, bf16=False, '
    f"max_completion_length=4, {TWO_STEPS}",
    'DPOConfigX("outputs/dpo-watched", ': f'DPOConfigX("outputs/dpo-watched", {TWO_STEPS}, ',
    'DPOConfigX("outputs/dpo")': f'DPOConfigX("outputs/dpo", {TWO_STEPS})',
}
# The names that a page's Python takes as given.
GIVEN = {
    "docs/dpo.md": lambda: {
        "policy": tiny.tiny_actor(1),
        "reference": tiny.tiny_actor(),
        "tokenizer": tiny.tiny_tokenizer(),
        "args": ppo_config("outputs/by-implicit-reward"),
        "prompts": tiny.tiny_prompts(16),
    },
    "docs/report.md": lambda: {"pairs": dpo_runs.tiny_pairs()},
}


def pages():
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


NOTEBOOKS = ["docs/notebooks/dpo.ipynb", "docs/notebooks/ppo.ipynb"]
# tests/docs/test_proof_launch_page.py has the commands that start several processes.
PAGES = [page for page in pages() if list(steps(page)) and page not in {"docs/launch.md", *MEASURED}] + NOTEBOOKS


def made_up_ratings():
    """600 different sentences of 4 to 11 words of the tests' vocabulary."""
    rng = random.Random(0)
    texts = {" ".join(rng.choices(tiny.WORDS[:50], k=rng.randint(4, 11))) for _ in range(600)}
    return Dataset.from_list(
        [{"text": text, "rating": rng.uniform(-4, 4), "source": f"row/{i}"} for i, text in enumerate(sorted(texts))]
    )


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder like a checkout, with the files that the pages call theirs, as current directory."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for room in ("scripts", "benchmarks", "experiments"):
            patch.syspath_prepend(str(ROOT / room))
        for room in ("configs", "scripts", "benchmarks", "experiments"):
            Path(room).symlink_to(ROOT / room)
        Path("docs/images").mkdir(parents=True)
        actor = tiny.save_tiny(folder)["actor"]
        # NF4 on CPU needs such widths.
        for name in ("my-base", "my-sft"):  # the quick start makes the second of the first, other pages come before
            tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained(name)
        tiny.tiny_reward_model().save_pretrained("my-reward")
        for name in ("my-base", "my-sft", "my-reward"):
            tiny.tiny_tokenizer().save_pretrained(name)
        four_roles.save_adapter("my-sft", "my-reward-adapter", "SEQ_CLS", 1)
        rows = [{"prompt": text} for text in tiny.tiny_prompts(40)["prompt"]]
        write_lines("prompts.jsonl", rows)
        (rewards,) = re.findall(
            r"^```python\n# my_rewards.py\n(.*?)^```", (ROOT / "docs/ppo.md").read_text(), re.M | re.S
        )
        Path("my_rewards.py").write_text(rewards)
        Path("chats").mkdir()
        talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a good film"}]
        write_lines("chats/train.jsonl", [{"messages": talk}] * 8)
        write_lines("pairs.jsonl", [row | {"chosen": " good film", "rejected": " bad film"} for row in rows])
        patch.setattr(demo, "smollm2", lambda: actor)
        patch.setattr(demo, "movie_reviews", made_up_ratings)
        yield folder


@pytest.fixture(scope="module")
def done():
    """The commands that have run in this folder."""
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_from_top_to_bottom(workplace, done, page, request, monkeypatch, capsys):
    shown = []  # in a notebook, by cell
    display = SimpleNamespace(
        Image=lambda path: {"image/png": base64.b64encode(Path(path).read_bytes()).decode()},
        Markdown=lambda text: {"text/markdown": text},
    )
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    if page not in {"docs/report.md", *NOTEBOOKS}:  # which show the picture
        request.getfixturevalue("undrawn")
    names = GIVEN.get(page, dict)()
    for language, text in steps(page):
        if language == "python":
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            value = run_cell(text, page, names)
            shown += [value if isinstance(value, dict) and {*value} & {*KINDS} else {"text/plain": repr(value)}]
            if "trainer.train()" in text:
                assert names["trainer"].state.global_step > 0
        elif text not in done | ELSEWHERE.keys() and page != "docs/report.md":  # whose commands follow below
            commands.run(text, *SHORT[commands.name_in(text)].split())
            done.add(text)
    printed = capsys.readouterr().out
    check = CHECKS.get(page)
    if check:
        check(page=page, names=names, folder=workplace, shown=shown, printed=printed)


# What a page has left, beyond a run without an error


def quick_start(folder, **_):
    folders = ("outputs/dpo-demo", "outputs/reward-demo", "outputs/ppo-demo", "outputs/ppo-head", "out/dpo", "out/ppo")
    for name in folders:
        assert (folder / name / "metrics.json").is_file(), name
    base, sft = (load_file(folder / name / "model.safetensors") for name in ("my-base", "my-sft"))
    assert any(not torch.equal(base[name], sft[name]) for name in base)
    assert (folder / "outputs/ppo-head/critic").is_dir()
    assert len((folder / "out/scores.jsonl").read_text().splitlines()) == 4


def tutorial(names, folder, **_):
    for name in ("reward", "dpo", "ppo", "dpo-then-ppo"):
        assert (folder / "outputs" / name / "metrics.json").is_file(), name
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
    assert "| accuracy, gap above 2 |" in (folder / "outputs/dpo/table.md").read_text()


def run_cell(text, page, names):
    """The value of its last expression, or `None`."""
    *first, last = ast.parse(text).body
    if not isinstance(last, ast.Expr):
        first, last = [*first, last], None
    exec(compile(ast.Module(first, []), page, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), page, "eval"), names)


def form(value):
    """Of a value its types, keys and lengths, without what it says."""
    if isinstance(value, dict):
        return {key: form(one) for key, one in value.items()}
    return [form(one) for one in value] if isinstance(value, list | tuple) else type(value)


def columns(table):
    """The head of a Markdown table; and its first column, unless prompts stand there."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return head, [] if head[0] == "prompt" else [row[0] for row in rows]


KINDS = {  # how what a cell shows is compared: what it says depends on the model
    "image/png": lambda picture: base64.b64decode(picture)[:8],
    "text/markdown": columns,
    "text/plain": lambda text: form(ast.literal_eval(text)),
}


def kinds(output):
    return {kind: read(output[kind]) for kind, read in KINDS.items() if kind in output}


def stored_outputs(page):
    cells = [cell for cell in json.loads((ROOT / page).read_text())["cells"] if cell["cell_type"] == "code"]
    return [{kind: "".join(text) for each in cell["outputs"] for kind, text in each["data"].items()} for cell in cells]


def notebook(page, names, shown, **_):
    """What the cells show here is of the kind that is stored with them."""
    assert list(map(kinds, shown)) == [kinds(output or {"text/plain": "None"}) for output in stored_outputs(page)]
    after = names["after"]
    assert after["eval_preference/pairs"] == 4 if "eval_preference/pairs" in after else "eval_reward/rise" in after
    assert all(math.isfinite(value) for value in after.values())


def migration(names, **_):
    """A config like TRL 1.12's."""
    args = names["args"]
    assert (args.kl_placement, args.vf_coef, args.ent_coef, args.temperature) == ("reward", 0.1, 0.0, 0.7)
    assert PPOLoopConfig(args).kl_estimator == "k1"


def callbacks(folder, names, **_):
    assert (folder / "outputs/trl-dpo/report.html").is_file()
    for table in ("samples", "implicit_rewards"):
        assert (folder / "outputs/dpo-watched" / table / "step_00002.jsonl").is_file()


def dpo(names, **_):
    names["trainer"].train()
    assert names["trainer"].state.global_step > 0


CHECKS = {
    "docs/callbacks.md": callbacks,
    "docs/dpo.md": dpo,
    "docs/migration.md": migration,
    "docs/ppo.md": lambda folder, **_: (folder / "outputs/four-roles/critic/adapter_model.safetensors").stat(),
    "docs/quickstart.md": quick_start,
    "docs/report.md": lambda folder, **_: (folder / "outputs/dpo/README.md").read_text().index("](report.png)"),
    "docs/scale.md": lambda folder, **_: (folder / "docs/images/scale.png").stat(),
    "docs/tutorial.md": tutorial,
    **dict.fromkeys(NOTEBOOKS, notebook),
}


def test_report_page_draws_one_run_then_two_then_one_until_it_is_done(tmp_path, monkeypatch, capsys):
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


# Nothing is left out


def commands_outside_bash(text):
    """Lines that look like commands in a fence of another language, or of none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [match[0] for language, block in blocks if language != "bash" for match in A_COMMAND.finditer(block)]


@pytest.mark.parametrize("page", pages())
def test_page_has_no_command_outside_a_fence_of_bash(page):
    assert commands_outside_bash((ROOT / page).read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["trl-ext dpo --model m", "python scripts/x.py", "pip install x", "make test", "A=1 vllm serve m", "$ trl-ext x"],
)
def test_control_command_in_a_bare_fence_is_found(line):
    assert commands_outside_bash(f"text\n\n```\n{line}\n```\n")
    assert commands_outside_bash(f"```text\nfirst\n{line}\n```\n")
    assert not commands_outside_bash(f"```bash\n{line}\n```\n\nmake it so\n\n```\nloss = makeshift · pip\n```\n")


@pytest.mark.parametrize("page", MEASURED)
def test_commands_of_a_page_of_measurements_run_elsewhere(page):
    assert [text for language, text in steps(page) if language == "bash"] == list(MEASURED[page])
    for line, test in MEASURED[page].items():
        text = (ROOT / test).read_text()
        assert re.search(rf"\b{commands.name_in(line)}\b", text), f"{test} does not run {line}"


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_notebook_is_stored_with_the_outputs_of_its_cells(page):
    """`make notebooks` has run these very cells, and has left out paths and times."""
    text = (ROOT / page).read_text()
    stored = json.loads(text)
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert stored["metadata"]["sources"] == digest([source for _, source in steps(page)]), "run `make notebooks`"
    assert len(text) < 600_000
    shown = [kind for output in stored_outputs(page) for kind in output]
    assert {"image/png", "text/markdown", "text/plain"} <= set(shown)
    assert not re.search(r"/(?:home|root|tmp|usr|work)/", re.sub(r'"image/png": ".*?"', "", text))


def test_control_another_output_is_noticed():
    table = "| held-out pairs | before |\n|---|---|\n| pairs | 4 |"
    assert kinds({"text/markdown": table}) == kinds({"text/markdown": table.replace("4", "128")})
    assert kinds({"text/markdown": table}) != kinds({"text/markdown": table.replace("| pairs |", "| triples |")})
    assert kinds({"text/plain": "(0.1, 0.2)"}) == kinds({"text/plain": "(0.3,\n 4.0)"}) != kinds({"text/plain": "0.1"})
    assert kinds({"text/plain": "{'a': 'x'}"}) != kinds({"text/plain": "{'b': 'x'}"})


def test_every_shortening_and_every_exception_is_used():
    of_pages = [step for page in [*pages(), *NOTEBOOKS] for step in steps(page)]
    python = "".join(text for language, text in of_pages if language == "python")
    assert [long for long in SHORTER if long not in python] == []
    assert [line for line in ELSEWHERE if ("bash", line) not in of_pages] == []
