"""`trl-ext` itself: its commands, the scripts that are the same, what ends a command in one sentence."""

import sys
import warnings
from argparse import Namespace

import pytest

import trl_ext
from cli_runs import error_of, run_of
from commands import ROOT, command
from trl_ext import __version__
from trl_ext.cli import closing
from trl_ext.cli.commands import demo
from trl_ext.cli.errors import DEBUG, KNOWN, take_debug, usage_errors
from trl_ext.cli.main import COMMANDS, main
from trl_ext.data import demo as embedded


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_usage_names_every_command_and_every_command_has_its_module(capsys):
    main([])
    without = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == without
    for name in COMMANDS:
        assert f"trl-ext {name} " in without
        assert callable(command(name).main)
    bodies = {path.stem for path in (ROOT / "trl_ext/cli/commands").glob("*.py")} - {"__init__"}
    assert bodies == set(COMMANDS)


def test_version_is_the_packages(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"trl-ext {__version__}\n"


def test_misspelt_command_is_an_error_that_names_the_right_one(capsys):
    said = error_of(["rewrad"], capsys)
    assert "there is no command 'rewrad'. Did you mean `trl-ext reward` (" in said
    assert said.startswith("error: ")
    assert "Did you mean" not in error_of(["xyzzy"], capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_script_of_the_checkout_is_the_command(name, monkeypatch):
    called = []
    monkeypatch.setattr(command(name), "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", "--model", "x"])
    code = (ROOT / "scripts" / f"{name}.py").read_text()
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert called == [["--model", "x"]]


def test_noise_of_other_packages_is_left_out_and_nothing_else(recwarn):
    """In Python as soon as the first trainer or config is taken from the package."""
    assert trl_ext.PPOConfigX
    warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    warnings.warn("the other one is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["the other one is deprecated"]


def test_error_of_this_package_ends_a_run_in_one_sentence_and_another_keeps_its_traceback(paths, tmp_path):
    with pytest.raises(SystemExit, match="error: There is no reward at all"):
        main(["ppo", "--model", paths["actor"], "--dataset_name", paths["prompts"], "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="invalid literal"), usage_errors():
        int("x")


@pytest.mark.parametrize("said", KNOWN)
def test_error_of_another_package_whose_cure_is_known_is_that_cure(said, monkeypatch):
    def fail():
        exec(compile(f"raise ValueError({said!r})", "<upstream>", "exec"), {"__name__": "upstream"})

    with pytest.raises(SystemExit) as end, usage_errors():
        fail()
    assert end.value.code == f"error: {KNOWN[said]}"
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError), usage_errors():  # noqa: PT011
        fail()


def test_debug_shows_where_an_error_was_raised(tmp_path, monkeypatch):
    monkeypatch.setenv(DEBUG, "")  # so that it is put back
    with pytest.raises(ValueError, match="`beta` is -1"):
        main(["dpo", "--output_dir", str(tmp_path), "--debug", "--beta", "-1"])
    assert take_debug(["--debug", "underflow_overflow", "--beta", "1"])[0] == "--debug"  # transformers' own option
    assert take_debug(["--beta", "1", "--debug"]) == ["--beta", "1"]


def test_without_the_extra_a_run_goes_on_and_says_that_there_is_no_report(paths, tmp_path, monkeypatch, capsys):
    def missing(**_):
        raise ImportError("Pictures need matplotlib")

    monkeypatch.setattr(closing, "ReportCallback", missing)
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": tmp_path}
    main(["dpo", *run_of("dpo", paths, **short)])
    printed = capsys.readouterr()
    assert "There will be no report: Pictures need matplotlib" in printed.err
    assert f"trl-ext report {tmp_path}" in printed.out


def test_broken_files_that_options_name_are_one_sentence(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("beta: [\nmodel: x\n")
    (tmp_path / "b.yaml").write_bytes(b"beta: \xff\n")
    (tmp_path / "z.json").write_text("{")
    (tmp_path / "a.yaml").write_text("distributed_type: [\n")
    for flags, said in (
        (["--config", tmp_path / "r.yaml"], f"The recipe {tmp_path / 'r.yaml'} is no YAML: "),
        (["--config", tmp_path / "b.yaml"], f"The recipe {tmp_path / 'b.yaml'} is no YAML: "),
        (["--config", tmp_path], f"There is no file '{tmp_path}', here or"),
        (["--deepspeed", tmp_path / "z.json"], f"The DeepSpeed file {tmp_path / 'z.json'} is no JSON: "),
        (["--accelerate_config", tmp_path / "a.yaml"], f"The accelerate file {tmp_path / 'a.yaml'} is no YAML: "),
    ):
        text = error_of(["dpo", *map(str, flags)], capsys)
        assert text.startswith(f"error: {said}")
        assert len(text.splitlines()) == 1


# --- the demo


def test_demo_is_a_reward_model_and_then_ppo_against_it(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(demo.subprocess, "run", lambda words: ran.append(words[3:]) or Namespace(returncode=0))
    monkeypatch.setattr(embedded, "smollm2", lambda: pytest.fail("loaded something"))
    demo.main(["--output_dir", str(tmp_path)])
    (first, *of_reward), (second, *of_ppo) = ran
    assert (first, second) == ("reward", "ppo")
    reward, ppo = command("reward").COMMAND.options(of_reward), command("ppo").COMMAND.options(of_ppo)
    assert ppo.reward_model_path == reward.output_dir == str(tmp_path / "reward-demo")
    assert ppo.total_episodes == 896  # the demo's recipe
    monkeypatch.setattr(demo.subprocess, "run", lambda words: Namespace(returncode=3))
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 3


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs gguf, matplotlib, jinja2, uplot: pip install 'trl-ext\[demo\]'"):
        demo.main([])


@pytest.mark.parametrize(
    "words, command",
    [(["--config", "ppo/demo"], "ppo"), (["--output_dir", "reward"], "dpo"), (["--config", "mine.yaml"], "dpo")],
)
def test_missing_command_is_that_of_the_recipe(words, command, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert f"write `trl-ext {command} {' '.join(words)}`" in capsys.readouterr().err
