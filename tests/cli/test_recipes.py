"""Recipes: where they are found, and what each says of itself."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cli_runs import RECIPES
from commands import ROOT, command
from trl_ext.cli.recipes import INSTALLED, find_config, find_deepspeed
from zero_runs import launched


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_configs_are_installed_with_the_package():
    """What the wheel holds beside the code is what is in configs/."""
    files = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*"))
    assert files == sorted(path.relative_to(INSTALLED) for path in INSTALLED.rglob("*.*"))
    assert len(files) > 25
    globs = re.search(r"^trl_ext = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE).group(1)
    packaged = {path for glob in json.loads(globs) for path in (ROOT / "trl_ext").glob(glob)}
    assert {INSTALLED / file for file in files} <= packaged


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("configs/dpo/demo.yaml", "", "dpo/demo.yaml"),
        ("dpo/demo.yaml", "", "dpo/demo.yaml"),
        ("dpo/demo", "", "dpo/demo.yaml"),
        ("8b_qlora_24gb", "ppo", "ppo/8b_qlora_24gb.yaml"),
        ("zero3", "accelerate", "accelerate/zero3.yaml"),
        ("zero3", "deepspeed", "deepspeed/zero3.json"),
    ],
)
def test_installed_file_is_found_from_any_folder(name, folder, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name, folder) == INSTALLED / file


def test_own_file_goes_before_an_installed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dpo").mkdir()
    Path("dpo/demo.yaml").write_text("beta: 1\n")
    assert find_config("dpo/demo.yaml") == Path("dpo/demo.yaml")
    with pytest.raises(ValueError, match=r"There is no file '/nowhere/dpo/demo\.yaml'"):
        find_config("/nowhere/dpo/demo.yaml")


def test_recipe_outside_a_checkout_finds_its_deepspeed_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = command("ppo").COMMAND.options(["--config", "ppo/33b_full_offload"])
    assert given.deepspeed == str(INSTALLED / "deepspeed" / "ppo_33b_4x80g.json")


def test_deepspeed_file_goes_by_its_name_and_what_is_none_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("zero3", "zero3.json", "configs/deepspeed/zero3.json"):
        assert find_deepspeed(name) == str(INSTALLED / "deepspeed" / "zero3.json")
    for other in (None, {"zero_optimization": {"stage": 2}}, '{"zero_optimization": {"stage": 2}}', "zero9"):
        assert find_deepspeed(other) == other


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


SIZED = "33b_full_offload 33b_lora 33b_qlora 8b_qlora_24gb 1b5_12gb 0b5_cpu".split()
PAPERS = "vc_ppo vapo sao open_reasoner_zero".split()
EMBEDDED = ("demo", "zhang2025", "0b5_cpu")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_says_what_it_is_for_and_is_accepted(path, monkeypatch):
    text, room = path.read_text(), path.parent.name
    opening = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    said = [line.split(":")[0].removeprefix("# ") for line in opening if re.match(r"# [A-Z][a-z]+: ", line)]
    assert {"Hardware", "Launch"} < set(said)
    assert {"Expected", "Measured"} & set(said)
    assert "@" not in opening
    if path.stem in SIZED:
        assert said == ["Hardware", "Launch", "Memory", "Measured"]
        assert opening.index("#") > 0, "the purpose comes first"
        assert re.search(rf"trl-ext {room}( --\w+ \w+)* --config configs/{name_of(path)}", "\n".join(opening))
        assert f"trl-ext plan --from-config configs/{name_of(path)}" in text
    for named in re.findall(r"(?:configs|docs)/[\w./]+\.(?:yaml|json|md)", text):
        assert (ROOT / named).is_file(), named
    monkeypatch.chdir(ROOT)  # a recipe may name a DeepSpeed file, which must not stay in force
    with launched({}):
        data, _, args = command(room).COMMAND.options(["--config", str(path)]).make()
    assert (data.dataset_name is None) == (path.stem in EMBEDDED)
    assert args.output_dir.startswith("outputs/")


def test_there_is_a_recipe_for_every_size():
    assert {f"{room}/{name}" for room in ("ppo", "dpo") for name in SIZED} <= set(map(name_of, RECIPES))


@pytest.mark.parametrize("room, deepspeed, gpus", [("ppo", "ppo_33b_4x80g", 4), ("dpo", "dpo_33b_2x80g", 2)])
def test_recipes_of_33b_have_the_layout_of_zhang2025(room, deepspeed, gpus):
    """In full with a DeepSpeed file; a quantised base is small enough to be whole on every GPU."""
    text = (ROOT / "configs" / room / "33b_full_offload.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["deepspeed"] == f"configs/deepspeed/{deepspeed}.json"
    assert f"trl-ext {room} --nproc {gpus} --config" in text
    assert not {"use_peft", "load_in_4bit"} & {key for key, value in recipe.items() if value}
    for name in ("33b_qlora", "8b_qlora_24gb"):
        recipe = yaml.safe_load((ROOT / "configs" / room / f"{name}.yaml").read_text())
        assert (recipe["load_in_4bit"], recipe["use_peft"], recipe.get("deepspeed")) == (True, True, None)


def options_of(room, name):
    return command(room).COMMAND.options(["--config", f"{room}/{name}"])


@pytest.mark.parametrize("name", [*SIZED, "zhang2025"])
def test_recipes_of_ppo_take_the_numbers_of_zhang2025(name):
    """Zhang 2025 §6.2; the KL to the reference is kept within 0.5 to 2 nats per sequence."""
    given = options_of("ppo", name)
    numbers = ("cliprange", "gamma", "lam", "vf_coef", "ent_coef", "kl_band")
    assert [getattr(given, number) for number in numbers] == [0.2, 0.99, 0.95, 0.5, 0.01, [0.5, 2.0]]
    if name == "zhang2025":
        assert (given.kl_placement, given.kl_estimator) == ("loss", "k2")
        assert (given.whiten_advantages, given.cliprange_value) == (False, None)


OF_CRITIC = ("lam", "lam_alpha", "critic_lam", "cliprange", "cliprange_high", "policy_objective", "critic_steps")
NUMBERS = {
    "open_reasoner_zero": (1.0, None, None, 0.2, None, "clip", 4),
    "vc_ppo": (0.95, None, 1.0, 0.2, None, "clip", 1),
    "vapo": (0.95, 0.05, 1.0, 0.2, 0.28, "clip", 1),
    "sao": (0.95, 1.5, 1.0, 0.8, 3.0, "mask", 2),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_papers_have_their_numbers_and_no_kl(name):
    given = options_of("ppo", name)
    assert tuple(getattr(given, option) for option in OF_CRITIC) == NUMBERS[name]
    assert (given.gamma, given.kl_coef, given.ent_coef, given.learning_rate) == (1.0, 0.0, 0.0, 1e-6)
    assert given.critic_learning_rate > given.learning_rate
    assert given.num_generations == {"vapo": 16, "open_reasoner_zero": 8}.get(name, 1)
    assert (given.positive_nll_coef, given.positive_min_score) == ((0.1, 1.0) if name == "vapo" else (0.0, None))
    assert (given.critic_warmup_steps, given.freeze_critic) == ((10, ["*self_attn*"]) if name == "sao" else (0, []))


@pytest.mark.parametrize("name", ["33b_full_offload", "zhang2025"])
def test_recipes_of_dpo_take_the_numbers_of_zhang2025(name):
    """Zhang 2025 §6.2: beta 0.1 to 0.5, learning rate 1e-6, 16 pairs per device."""
    given = options_of("dpo", name)
    assert (given.beta, given.learning_rate, given.loss_type, given.label_smoothing) == (0.1, 1e-6, ["sigmoid"], 0.0)
    assert given.per_device_train_batch_size * given.gradient_accumulation_steps == 16


# --- the memory that a header names is what the planner says when it is asked as the header says

HEADER = re.compile(r"^# Memory: +(.+), planned by\n# +(trl-ext plan .+)$", flags=re.MULTILINE)
PLANNED = {path: HEADER.search(path.read_text()) for path in RECIPES if path.parent.name != "reward"}


def test_recipes_for_hardware_name_their_memory():
    without = {path.stem for path, header in PLANNED.items() if header is None}
    # Those that have been run, and those that are for no hardware in particular
    assert without == {"demo", "zhang2025", *PAPERS}


@pytest.mark.parametrize("path", [path for path in PLANNED if PLANNED[path]], ids=name_of)
def test_header_says_what_the_planner_says(path, capsys, monkeypatch):
    figure, line = PLANNED[path].groups()
    assert f"--from-config {path.relative_to(ROOT)}" in line
    monkeypatch.chdir(ROOT)
    command("plan").main(shlex.split(line)[2:])
    said = capsys.readouterr().out
    assert "It fits" in said
    numbers = re.findall(r"\d+\.\d|\d+(?= GiB of host)", figure)
    assert numbers
    for number in numbers:
        assert re.search(rf"\b{re.escape(number)} of ", said), number
