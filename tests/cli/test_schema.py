"""The schemas that editors check recipes by, and the script that completes a line in the shell."""

import json
import subprocess

import pytest
import yaml

from cli_runs import RECIPES, error_of
from trl_ext.cli.commands import completion
from trl_ext.cli.commands.recipes import main
from trl_ext.cli.parser import parser_of
from trl_ext.cli.recipes import installed_recipes
from trl_ext.cli.schema import schema_of


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

IS = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def faults(value, schema):
    """What a validator of draft 7 finds, of the keywords that these schemas use."""
    kinds = schema.get("type", list(IS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is none of {schema['enum']}"
    if not any(IS[kind](value) for kind in kinds):
        yield f"{value!r} is no {kinds}"
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, each in value.items():
            if name not in known and others is False:
                yield f"{name} is unknown"
            else:
                yield from faults(each, known.get(name, others))
    if isinstance(value, list):
        for each in value:
            yield from faults(each, schema.get("items", {}))


@pytest.fixture(scope="module")
def schemas():
    return {command: schema_of(command) for command in ("ppo", "critic", "dpo", "reward")}


def test_every_recipe_is_what_its_schema_asks_for(schemas):
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        assert list(faults(recipe, schemas[path.parent.name])) == [], path


@pytest.mark.parametrize(
    ("command", "recipe", "fault"),
    [
        ("ppo", "kl_coefs: 0.1", "kl_coefs is unknown"),
        ("ppo", "kl_coef: much", "'much' is no ['number']"),
        ("ppo", "critic: heads", "'heads' is none of"),
        ("ppo", "total_episodes: 1.5", "1.5 is no"),
        ("dpo", "use_peft: 1", "1 is no ['boolean']"),
        ("dpo", "beta: 0.1", None),
        ("dpo", "{model: x, lora_target_modules: all-linear, columns: {prompt: question}}", None),
        ("dpo", "{gradient_checkpointing_kwargs: {use_reentrant: false}, datasets: [{path: x}]}", None),
        ("dpo", "{loss_type: [sigmoid, sft], loss_weights: [1, 0.5], dtype: null}", None),
        ("dpo", "loss_weights: [one]", "'one' is no"),
        ("reward", "env: {CUDA_VISIBLE_DEVICES: 0}", None),
    ],
)
def test_schema_finds_what_is_wrong_and_takes_what_is_right(schemas, command, recipe, fault):
    found = list(faults(yaml.safe_load(recipe), schemas[command]))
    assert found == [] if fault is None else (len(found) == 1 and found[0].startswith(fault)), found


def test_schemas_are_of_draft_7_and_describe_every_option(schemas):
    for command, schema in schemas.items():
        assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
        options = {action.dest for action in parser_of(command)._actions} - {"help", "help_all", "config"}
        assert options | {"model", "env"} == set(schema["properties"])
        assert all(option["description"] for name, option in schema["properties"].items())
        for name, option in schema["properties"].items():
            if "default" in option:
                assert list(faults(option["default"], option)) == [], name


def test_schemas_are_written_beside_the_recipes_that_name_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["reward", "--schema", "."])
    assert "# yaml-language-server: $schema=recipe-reward.schema.json" in capsys.readouterr().out
    assert (
        "center_rewards_coefficient" in json.loads((tmp_path / "recipe-reward.schema.json").read_text())["properties"]
    )


# --- the list


def test_list_names_every_recipe_with_its_hardware(capsys):
    main([])
    text = capsys.readouterr().out
    main(["--json"])
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    critic = installed_recipes("critic")
    assert set(found) == {f"{p.parent.name}/{p.stem}" for p in RECIPES} | {each.name for each in critic}
    for name, each in found.items():
        assert f"{name}\n" in text
        assert each["purpose"].split()[0] in text
        assert each["hardware"]
        assert each["expected"]
        assert f"--config {each['path'].split('trl_ext/')[1]}" in each["launch"] or name.endswith("demo")
    assert found["dpo/demo"]["expected"].endswith("after 6 min 7 s; docs/demo.md.")
    assert found["ppo/8b_qlora_24gb"]["memory"] == "10.0 of 24 GiB"
    main(["dpo"])
    assert "ppo/" not in capsys.readouterr().out.replace("trl_ext", "")
    assert "There are no recipes of 'sft': write `trl-ext recipes`" in error_of(["recipes", "sft"], capsys)


# --- the shell


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """As it is made: the one that comes with the package is the same, which test_help.py checks."""
    path = tmp_path_factory.mktemp("shell") / "completion.bash"
    path.write_text(completion.made())
    return path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("trl-ext re", {"reward", "report", "recipes"}),
        ("trl-ext ppo --critic_lea", {"--critic_learning_rate"}),
        ("trl-ext ppo --critic ", {"model", "head", "adapter"}),
        ("trl-ext dpo --config dpo/d", {"dpo/demo"}),
        ("trl-ext plan --from_config ppo/8", {"ppo/8b_qlora_24gb"}),
        ("trl-ext dpo --dtype int", set()),
        ("trl-ext dpo --dtype b", {"bfloat16"}),
        ("trl-ext completion z", {"zsh"}),
        ("trl-ext chat --te", {"--temperature"}),
    ],
)
def test_bash_completes_a_line(script, line, found):
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    at = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}"
    told = f"source {script}; {at}; _trl_ext; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    said = subprocess.run(["bash", "--norc", "-c", told], capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) == found
    assert said.stderr == ""


def test_zsh_gets_the_same_script_behind_bashcompinit(script, capsys):
    completion.main(["zsh"])
    start, _, rest = capsys.readouterr().out.partition("\n")
    assert "bashcompinit" in start
    assert rest == script.read_text()
