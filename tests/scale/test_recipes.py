"""The recipes for models of 0.5B to 33B: there are those that were asked for, and each says what it needs."""

import re

import pytest
import yaml

from two_processes import ROOT


NAMES = ("33b_full_offload", "33b_lora", "33b_qlora", "8b_qlora_24gb", "1b5_12gb", "0b5_cpu")
RECIPES = [f"{room}/{name}.yaml" for room in ("ppo", "dpo") for name in NAMES]
HEADINGS = ("Hardware", "Launch", "Memory", "Measured")


def read(name):
    return (ROOT / "configs" / name).read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_opens_with_purpose_hardware_launch_and_memory(name):
    opening = read(name).split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    said = [line.split(":")[0].removeprefix("# ") for line in opening if re.match(r"# [A-Z][a-z]+: ", line)]
    assert tuple(said) == HEADINGS
    assert opening.index("#") > 0, "the purpose comes first"
    text = "\n".join(opening)
    assert re.search(rf"trl-ext {name[:3]}( --\w+ \w+)* --config configs/{name}", text)
    assert f"trl-ext plan --from-config configs/{name}" in text


@pytest.mark.parametrize("name", RECIPES)
def test_files_that_a_recipe_names_exist(name):
    for path in re.findall(r"(?:configs|docs)/[\w./]+\.(?:yaml|json|md)", read(name)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("room, deepspeed, gpus", [("ppo", "ppo_33b_4x80g", 4), ("dpo", "dpo_33b_2x80g", 2)])
def test_full_training_of_33b_is_the_documents_layout(room, deepspeed, gpus):
    name = f"{room}/33b_full_offload.yaml"
    recipe = yaml.safe_load(read(name))
    assert recipe["deepspeed"] == f"configs/deepspeed/{deepspeed}.json"
    assert f"trl-ext {room} --nproc {gpus} --config" in read(name)
    assert not recipe.get("use_peft")
    assert not recipe.get("load_in_4bit")


@pytest.mark.parametrize("room", ["ppo", "dpo"])
def test_quantized_recipes_keep_the_base_whole_on_every_gpu(room):
    """It is small enough, and is not gathered again and again."""
    for name in ("33b_qlora", "8b_qlora_24gb"):
        recipe = yaml.safe_load(read(f"{room}/{name}.yaml"))
        assert (recipe["load_in_4bit"], recipe["use_peft"], recipe.get("deepspeed")) == (True, True, None)


def test_dpo_takes_the_documents_numbers():
    """S1 §6.2: beta 0.1 to 0.5, learning rate 1e-6, 16 pairs per device."""
    recipe = yaml.safe_load(read("dpo/33b_full_offload.yaml"))
    assert (recipe["beta"], recipe["learning_rate"]) == (0.1, 1e-6)
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("ppo")])
def test_ppo_takes_the_documents_numbers(name):
    """S1 §6.2; the KL to the reference is kept within 0.5 to 2 nats per sequence."""
    recipe = yaml.safe_load(read(name))
    numbers = ("cliprange", "gamma", "lam", "vf_coef", "ent_coef", "kl_band")
    assert [recipe[number] for number in numbers] == [0.2, 0.99, 0.95, 0.5, 0.01, [0.5, 2.0]]
