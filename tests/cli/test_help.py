"""What `--help` shows first, by topic and in full, and what a misspelt option is told."""

import dataclasses
import re
import shutil
from fnmatch import fnmatch
from importlib.metadata import version

import pytest
from trl import RewardConfig

import shipped_texts
from cli_runs import TRAINING, error_of
from commands import ROOT, command
from trl_ext.cli import kept_help, shipped, topics
from trl_ext.cli.commands import plan
from trl_ext.cli.main import main
from trl_ext.cli.models import ModelArguments
from trl_ext.dpo.config import SMOOTHED
from trl_ext.planner import Layout


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
OTHERS = ("robust", "exo_pair", "aot", "aot_unpaired")


def help_of(name, capsys, option="--help"):
    main([name, option])  # torchrun's `record` takes an exit without an error for a return
    return capsys.readouterr().out


def options_in(text):
    return re.findall(r"^  (?:--model_name_or_path, )?--(\w+)", text, flags=re.MULTILINE)


def first_options(text):
    first = re.search(r"^The 10 options that matter first:\n((?:  .*\n)+)", text, flags=re.MULTILINE)
    return options_in(first.group(1))


@pytest.mark.parametrize("name", ["reward", "ppo", "dpo", "score"])
def test_help_begins_with_the_ten_options_that_matter(name, capsys):
    text = help_of(name, capsys)
    assert first_options(text) == topics.FIRST[name].split()
    headings = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 160
    assert headings[0] == "The 10 options that matter first"
    assert headings[-1] == "options"  # --help itself
    assert len(headings) >= 5
    assert not [heading for heading in headings if heading.startswith("More options of")]
    every = help_of(name, capsys, "--help_all")
    assert len(every.splitlines()) > len(text.splitlines())
    assert every == help_of(name, capsys, "--help-all")


def test_every_topic_has_options_that_a_command_shows(capsys):
    shown = {option for name in TRAINING for option in options_in(help_of(name, capsys))}
    named = {option for names in topics.TOPICS.values() for option in names.split()} - {"model_name_or_path"}
    assert named <= shown


def test_help_shows_the_defaults_of_own_data(capsys):
    text = help_of("ppo", capsys)
    assert re.search(r"--response_length INT .*\(default: 53\)", text)
    main(["ppo", "--help", "--config", "ppo/demo"])
    assert re.search(r"--response_length INT .*\(default: 12\)", capsys.readouterr().out)


@pytest.fixture(scope="module")
def is_pinned():
    """Whether the packages whose options are shown are those of constraints.txt."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    return all(version(name) == pins[name] for name in ("trl", "transformers"))


def test_texts_that_come_with_the_package_are_what_would_be_made(is_pinned):
    """If this fails: python tests/helpers/shipped_texts.py."""
    files = {path.name: path.read_text() for path in shipped.FOLDER.iterdir()}
    if files.pop("stamp").strip() != shipped.stamp():
        assert not is_pinned, "options have changed"
        assert shipped.shipped("ppo") is None  # nor any other: they are made
        return
    assert files == {f"{name}.txt": text for name, text in shipped_texts.texts().items()}


def test_stamp_of_the_texts_follows_every_class_with_options_and_no_other_code(tmp_path, monkeypatch):
    """The mutants change a copy of the package: a help text, a default, a topic, a flag, a recipe; and a function."""
    shown = {path for files in shipped.SHOWN.values() for path in files.split()}
    for name in shipped_texts.COMMANDS:
        for kind in {each for made in command(name).arguments().dataclass_types for each in made.__mro__}:
            if kind.__module__.split(".")[0] in shipped.SHOWN:
                file = "/".join(kind.__module__.split(".")[1:]) + ".py"
                assert any(fnmatch(file, each) for each in shown), file
    copy = tmp_path / "trl_ext"
    shutil.copytree(shipped.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(shipped, "PACKAGE", copy)
    before = shipped.stamp()

    def stamp_with(file, old, new):
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new, 1))
        changed = shipped.stamp()
        (copy / file).write_text(text)
        return changed

    for mutant in (
        ("ppo/options.py", "Initial learning rate", "First learning rate"),
        ("ppo/options.py", "default=3e-6", "default=3e-5"),
        ("cli/topics.py", "Loss and reference", "Losses"),
        ("cli/commands/chat.py", '"--system"', '"--sistem"'),
    ):
        assert stamp_with(*mutant) != before, mutant
    assert stamp_with("cli/data.py", "rows.take(size)", "rows.take(size + 1)") == before
    (copy / "configs/ppo/mine.yaml").write_text("")
    assert shipped.stamp() != before


def test_help_is_kept_until_code_or_packages_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_help, "shipped", lambda name: None)
    first = help_of("score", capsys)
    (kept,) = (tmp_path / "cache/help").iterdir()
    assert kept.read_text() == first
    monkeypatch.setattr(command("score"), "main", lambda words: pytest.fail("is made again"))
    assert help_of("score", capsys) == first
    monkeypatch.setattr(kept_help, "stamp", lambda: "later")  # as of another version
    monkeypatch.setattr(command("score"), "main", lambda words: print("another"))
    assert help_of("score", capsys) == "another\n"
    assert [path.read_text() for path in (tmp_path / "cache/help").iterdir()] == ["another\n"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    assert help_of("score", capsys) == "another\n"


def test_stamp_follows_the_sources_and_the_packages(tmp_path, monkeypatch):
    assert kept_help.stamp() == (before := kept_help.stamp())
    monkeypatch.setattr(kept_help, "version", lambda name: "9.9")
    assert kept_help.stamp() != before
    monkeypatch.undo()
    (tmp_path / "cli").mkdir()
    monkeypatch.setattr(kept_help, "__file__", str(tmp_path / "cli/kept_help.py"))
    (tmp_path / "a.py").write_text("1")
    one = kept_help.stamp()
    (tmp_path / "a.py").write_text("12")
    assert kept_help.stamp() != one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dpo", "--lerning_rate", "1"], "there is no option `--lerning_rate`; did you mean `--learning_rate`?"),
        (["ppo", "--kl-coeff=1"], "there is no option `--kl-coeff`; today it is `--kl_coef`."),
        (["reward", "--xyzzyx"], "there is no option `--xyzzyx`. `--help_all` lists every option."),
        (["dpo", "--beta", "-1"], "`--beta` is -1.0"),
        (
            ["ppo", "--config", "ppo/dmeo"],
            "installed ones. Did you mean `--config ppo/demo`?",
        ),
        (["plan", "--gpuss", "4"], "there is no option `--gpuss`; did you mean `--gpus`?"),
        (["plan", "--model", "nosuch"], "'nosuch' is no folder or hub name"),
        (["report", "out", "--wach", "3"], "there is no option `--wach`; did you mean `--watch`?"),
        (["chat", "out", "--temprature", "1"], "did you mean `--temperature`?"),
        (["demo", "--output-dri", "x"], "did you mean `--output_dir`?"),
    ],
)
def test_option_that_is_wrong_ends_the_command_with_one_sentence(arguments, said, capsys):
    message = error_of(arguments, capsys)
    assert message.startswith("error: ")
    assert said in message


def test_plan_takes_both_spellings_and_explains_its_layout(capsys):
    main(["plan", "--from-config", "dpo/8b_qlora_24gb", "--gpu-memory", "24", "--no-gradient-checkpointing"])
    first = capsys.readouterr().out
    main(["plan", "--from_config=dpo/8b_qlora_24gb", "--gpu_memory=24", "--no-gradient_checkpointing"])
    assert capsys.readouterr().out == first
    assert len(first_options(help_of("plan", capsys))) == 10
    assert all(field.metadata["help"] for field in dataclasses.fields(Layout))


def text_of(name, option, capsys):
    """The help of one option, in one line."""
    entry = re.search(rf"^  (?:--\w+, )?--{option}\b.*\n(?:   .*\n)*", help_of(name, capsys), flags=re.MULTILINE)
    return " ".join(entry.group(0).split()) if entry else None


def test_options_that_a_command_does_not_read_are_not_there(capsys):
    for name, options in topics.ABSENT.items():
        every = help_of(name, capsys, "--help_all")
        for option in options.split():
            assert not re.search(rf"--{option}\b", every)
            assert f"there is no option `--{option}`" in error_of([name, f"--{option}", "1"], capsys)
    lora = {field.name for field in dataclasses.fields(ModelArguments) if "lora" in field.name}
    assert lora <= set(topics.ABSENT["score"].split())


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        *((name, "resume_from_checkpoint", "True for the last one in `--output_dir`") for name in TRAINING),
        *((name, "output_dir", f"Unset: {RewardConfig(use_cpu=True, bf16=False).output_dir}.") for name in TRAINING),
        ("dpo", "label_smoothing", f"--loss_type sigmoid`; also read by {', '.join(OTHERS[:-1])} and {OTHERS[-1]}."),
        ("ppo", "gradient_accumulation_steps", "responses of a rollout on each process"),
        ("score", "model", "Unset: outputs/dpo- demo."),
        ("score", "dataset_test_split", "Split to score."),
        ("score", "dataset_streaming", "Read the rows while scoring."),
        ("plan", "model", "Unset: smollm2-135m-instruct."),
        ("plan", "prompt", "INT longest prompt. (default: 512)"),
        ("plan", "response", "INT longest response, or completion of a pair. (default: 512)"),
    ],
)
def test_help_of_an_option_is_what_the_command_does(name, option, said, capsys):
    assert said in text_of(name, option, capsys)


def test_label_smoothing_help_names_every_loss_that_reads_it():
    assert {"sigmoid", *OTHERS} == SMOOTHED


def test_plan_help_shows_the_layout_that_the_command_starts_from(capsys):
    """Of every option, as a plan without a recipe has it."""
    machine = plan.machine_of(plan.arguments().parse_args([]))
    names, layout = plan.run_of(plan.arguments().parse_args([]), machine)
    assert f"Unset: {names.actor}." in text_of("plan", "model", capsys)
    for field in dataclasses.fields(Layout):
        shown = re.search(r"\(default: (.*)\)$", text_of("plan", field.name, capsys)).group(1)
        if field.name == "rollout":
            assert (shown, layout.rollout) == ("micro_batch × accumulation", layout.micro_batch * layout.accumulation)
        elif field.name in ("compute", "critic", "reward", "reference"):
            assert str(getattr(layout, field.name)) in shown
        else:
            assert shown == str(getattr(layout, field.name))
    for flags, compute in (("--zero_stage 2", "bf16"), ("--method lora", "bf16"), ("--gpu cpu", "fp32")):
        given = plan.arguments().parse_args(flags.split())
        assert plan.run_of(given, plan.machine_of(given))[1].compute == compute
