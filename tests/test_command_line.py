"""`trl-ext` and what its commands share: finding files, launching, dry runs, last lines, talking to a model."""

import dataclasses
import json
import re
import shlex
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
from datasets import Dataset
from trl import RewardTrainer

import tiny
import two_processes
from commands import ROOT, command
from trl_ext import DPOTrainerX, PPOTrainerX, __version__, embedded
from trl_ext.cli import closing, topics
from trl_ext.cli.closing import closing_lines, without
from trl_ext.cli.commands import chat, demo, plan
from trl_ext.cli.data import PairArguments, load_pairs
from trl_ext.cli.launch import LaunchArguments, accelerate_flags, launches, require_all
from trl_ext.cli.main import COMMANDS, leave_out_noise, main
from trl_ext.cli.options import read, usage_errors
from trl_ext.cli.recipes import INSTALLED, find_config
from trl_ext.planner import Layout


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
RECIPES = [path for name in ("reward", "ppo", "dpo") for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
TRAINING = ("reward", "ppo", "dpo")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Tiny models, 40 prompts and 40 pairs."""
    folder = tmp_path_factory.mktemp("command-line")
    texts = tiny.tiny_prompts(40)["prompt"]
    Dataset.from_dict({"prompt": texts}).to_json(str(folder / "prompts.jsonl"))
    pairs = [{"prompt": text, "chosen": " good film", "rejected": " bad film and cat"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    Dataset.from_dict({"prompt": [f"good {i}" for i in range(1200)]}).to_json(str(folder / "many.jsonl"))
    tiny.tiny_actor(max_position_embeddings=4096).save_pretrained(folder / "long")
    tiny.tiny_tokenizer().save_pretrained(folder / "long")
    others = {"many": str(folder / "many.jsonl"), "long": str(folder / "long")}
    return (
        others
        | {"folder": folder, "pairs": str(folder / "pairs.jsonl"), "prompts": str(folder / "prompts.jsonl")}
        | (tiny.save_tiny(folder))
    )


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_of(name, paths, **options):
    """Flags of a tiny run."""
    data = {"model": paths["actor"], "dataset_name": paths["prompts" if name == "ppo" else "pairs"]}
    judge = {"reward_model_path": paths["reward_model"], "response_length": 4} if name == "ppo" else {}
    return flags(**data | judge | {"report_to": "none"} | options)


def error_of(arguments, capsys):
    """What the command line says as it refuses."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code not in (0, None)
    return said


# ------------------------------------------------------------------------------------------------------------ trl-ext


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
    assert "there is no command 'rewrad'. Did you mean `trl-ext reward`?" in said
    assert "Did you mean" not in error_of(["xyzzy"], capsys)


@pytest.mark.parametrize("name", ["reward", "ppo", "dpo", "score"])
def test_script_of_the_checkout_is_the_command(name, monkeypatch):
    called = []
    monkeypatch.setattr(command(name), "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", "--model", "x"])
    code = (ROOT / "scripts" / f"{name}.py").read_text()
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert called == [["--model", "x"]]


def test_noise_of_other_packages_is_left_out_and_nothing_else(recwarn):
    leave_out_noise()
    warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    warnings.warn("the other one is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["the other one is deprecated"]


# --------------------------------------------------------------------------------------------------------------- help


def help_of(name, capsys, option="--help"):
    main([name, option])  # torchrun's `record` takes an exit without an error for a return
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["reward", "ppo", "dpo", "score"])
def test_help_begins_with_the_ten_options_that_matter(name, capsys):
    text = help_of(name, capsys)
    first = re.search(r"^The 10 options that matter first:\n((?:  .*\n)+)", text, flags=re.MULTILINE).group(1)
    shown = re.findall(r"^  (?:--model_name_or_path, )?--(\w+)", first, flags=re.MULTILINE)
    assert shown == topics.FIRST[name].split()
    headings = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert headings[0] == "The 10 options that matter first"
    assert headings[-1] == "options"  # --help itself
    assert len(headings) >= 5
    assert not [heading for heading in headings if heading.startswith("More options of")]
    every = help_of(name, capsys, "--help_all")
    assert len(every.splitlines()) > len(text.splitlines())
    assert every == help_of(name, capsys, "--help-all")


def test_every_topic_has_options_that_a_command_shows(capsys):
    shown = set()
    for name in TRAINING:
        shown |= set(re.findall(r"^  (?:--model_name_or_path, )?--(\w+)", help_of(name, capsys), flags=re.MULTILINE))
    named = {option for names in topics.TOPICS.values() for option in names.split()} - {"model_name_or_path"}
    assert named <= shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dpo", "--lerning_rate", "1"], "there is no option `--lerning_rate`; did you mean `--learning_rate`?"),
        (["ppo", "--kl-coeff=1"], "there is no option `--kl-coeff`; did you mean `--kl_coef`?"),
        (["reward", "--xyzzyx"], "there is no option `--xyzzyx`. `--help_all` lists every option."),
        (["dpo", "--beta", "-1"], "`beta` is -1.0"),
        (
            ["ppo", "--config", "ppo/dmeo"],
            "There is no file ppo/dmeo, here or among the installed ones, such as ppo/demo",
        ),
    ],
)
def test_option_that_is_wrong_ends_the_command_with_one_sentence(arguments, said, capsys):
    message = error_of(arguments, capsys)
    assert message.startswith("error: ")
    assert said in message


# ------------------------------------------------------------------------------------------------------------ recipes


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
    with pytest.raises(ValueError, match=r"There is no file /nowhere/dpo/demo\.yaml"):
        find_config("/nowhere/dpo/demo.yaml")


def test_recipe_outside_a_checkout_finds_its_deepspeed_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = command("ppo").options(["--config", "ppo/33b_full_offload"])
    assert given.deepspeed == str(INSTALLED / "deepspeed" / "ppo_33b_4x80g.json")


# ---------------------------------------------------------------------------------------------------------- launching


def asked(*words):
    return read("", (LaunchArguments,), "", list(words))


def test_flags_of_accelerate_are_those_that_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = INSTALLED / "accelerate"
    assert accelerate_flags(asked("--nproc", "3")) == [
        *("--config_file", str(configs / "ddp.yaml")),
        *("--num_processes", "3"),
    ]
    words = ("--accelerate_config", "zero3_2nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert accelerate_flags(asked(*words)) == [
        *("--config_file", str(configs / "zero3_2nodes.yaml")),
        *("--deepspeed_config_file", str(INSTALLED / "deepspeed" / "zero3.json")),
        *("--machine_rank", "1", "--main_process_ip", "10.0.0.1"),
    ]


def test_a_file_of_one_process_is_not_for_several():
    with pytest.raises(ValueError, match="starts one process, and `--nproc 2` asks for more"):
        accelerate_flags(asked("--nproc", "2", "--accelerate_config", "single"))


def test_command_launches_once(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not launches(asked())
    assert launches(asked("--nproc", "2"))
    assert launches(asked("--accelerate_config", "zero3"))
    with pytest.raises(ValueError, match="give `--accelerate_config` too"):
        launches(asked("--machine_rank", "0"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launches(asked("--nproc", "2"))


def test_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"has started 2 processes, and this one sees 1.*add `--use_cpu`"):
        require_all(Namespace(world_size=1))
    require_all(Namespace(world_size=2))


@pytest.mark.distributed
def test_nproc_starts_processes_that_train_one_model(paths, tmp_path):
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "output_dir": tmp_path / "out", "nproc": 2}
    done = two_processes.run("-m", "trl_ext.cli", "dpo", *run_of("dpo", paths, **short), launch=(sys.executable,))
    assert done.stdout.count("Everything is in") == 1
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["facts"]["hardware"] == "2 × CPU"


# ------------------------------------------------------------------------------------------------------------ dry run


def plan_line(text):
    return next(line for line in text.splitlines() if " plan: " in line)


def dry(name, paths, capsys, *more, **options):
    main([name, *run_of(name, paths, **options), "--dry_run", *more])
    return capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_runs_dry_on_hardware_that_is_not_here(path, paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = path.parent.name
    paths = paths | {"actor": paths["long"], "prompts": paths["many"], "reward_model": "outputs/not-there"}
    recipe = ["--config", f"{name}/{path.stem}", "--gpu", "a100-80gb", "--nproc", "4"]
    targets = ["--lora_target_modules", "all-linear"]  # one recipe names layers that the tiny model has not
    text = dry(name, paths, capsys, *recipe, *targets, output_dir="out")
    assert "× 4 process(es)" in plan_line(text)
    assert ("It fits" in text) == (name != "reward")
    assert "This was a dry run" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{}, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3}, {"max_steps": 7}], ids=str
)
def test_dry_run_of_dpo_counts_the_steps_of_the_trainer(options, paths, tmp_path, capsys):
    options |= {"per_device_train_batch_size": 4, "output_dir": tmp_path}
    steps = re.search(r"; (\d+) optimizer steps over 36 pairs", plan_line(dry("dpo", paths, capsys, **options)))
    body = command("dpo")
    trainer = body.build(*body.options(run_of("dpo", paths, **options, save_strategy="no", eval_strategy="no")).make())
    trainer.train()
    assert int(steps.group(1)) == trainer.state.max_steps


def test_dry_run_of_ppo_prints_the_trainers_plan(paths, tmp_path, capsys):
    options = {"per_device_train_batch_size": 4, "total_episodes": 24, "output_dir": tmp_path}
    line = plan_line(dry("ppo", paths, capsys, **options))
    body = command("ppo")
    body.build(*body.options(run_of("ppo", paths, **options)).make()).train()
    assert line in capsys.readouterr().out


def sample_of(text, part):
    """Token ids of a part of the sample."""
    match = re.search(rf"^  {part} +(\d+) tokens  (.*)\n +([\d ]+)$", text, flags=re.MULTILINE)
    ids = [int(word) for word in match.group(3).split()]
    assert int(match.group(1)) == len(ids)
    return ids


@pytest.mark.parametrize(("name", "kind"), [("dpo", DPOTrainerX), ("reward", RewardTrainer)])
def test_sample_of_a_dry_run_is_what_the_trainer_trains_on(name, kind, paths, tmp_path, capsys):
    options = {"output_dir": tmp_path, "max_length": 32}
    text = dry(name, paths, capsys, **options)
    body = command(name)
    trainer = body.build(*body.options(run_of(name, paths, **options)).make())
    assert isinstance(trainer, kind)
    first = trainer.train_dataset[0]
    parts = [column.removesuffix("_ids") for column in first if column.endswith("_ids")]
    assert set(parts) >= {"chosen", "rejected"}
    for part in parts:
        assert sample_of(text, part) == list(first[f"{part}_ids"])


def test_prompt_of_a_dry_run_is_what_the_actor_reads(paths, tmp_path, capsys):
    text = dry("ppo", paths, capsys, output_dir=tmp_path)
    body = command("ppo")
    trainer = body.build(*body.options(run_of("ppo", paths, output_dir=tmp_path)).make())
    assert isinstance(trainer, PPOTrainerX)
    (ids,), *_ = trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]])
    assert sample_of(text, "prompt") == list(ids)


def test_pair_that_is_too_long_is_named_in_a_dry_run(paths, tmp_path, capsys):
    text = dry("reward", paths, capsys, output_dir=tmp_path, max_length=2)
    assert "The first pair is left out: it is longer than `max_length=2`." in text


def test_dry_run_without_a_gpu_plans_for_this_machine(paths, tmp_path, capsys):
    assert "GiB on the process" in dry("dpo", paths, capsys, output_dir=tmp_path)
    with pytest.raises(SystemExit, match="'gtx' is no GPU of the table"):
        dry("dpo", paths, capsys, output_dir=tmp_path, gpu="gtx")


# --------------------------------------------------------------------------------------------------------- last lines


def last_lines(text):
    """Place and commands of the last lines."""
    lines = text[text.index("Everything is in ") :].splitlines()
    return lines[0].removeprefix("Everything is in "), dict(line.strip().split(maxsplit=1) for line in lines[1:])


def test_last_lines_of_dpo_resume_it_and_talk_to_it(paths, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a run"  # a folder that has to be quoted
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": output, "save_steps": 1}
    main(["dpo", *run_of("dpo", paths, **short)])
    place, lines = last_lines(capsys.readouterr().out)
    assert place == str(output)
    program, page = shlex.split(lines["look"])
    assert (program, Path(page).is_file()) == ("open", True)
    resume = shlex.split(lines["resume"])
    assert resume[:2] == ["trl-ext", "dpo"]
    assert resume[-2:] == ["--resume_from_checkpoint", str(output / "checkpoint-1")]
    resume[resume.index("--max_steps") + 1] = "2"
    main(resume[1:])
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    again = shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])
    assert again.count("--resume_from_checkpoint") == 1
    assert again[-1] == str(output / "checkpoint-2")
    assert shlex.split(lines["chat"]) == ["trl-ext", "chat", str(output)]


def test_last_lines_of_ppo_go_on_from_actor_and_critic(paths, tmp_path, capsys):
    short = {"total_episodes": 4, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "output_dir": tmp_path / "1"}
    main(["ppo", *run_of("ppo", paths, **short)])
    _, lines = last_lines(capsys.readouterr().out)
    words = shlex.split(lines["next"])
    assert words[:2] == ["trl-ext", "ppo"]
    again = dict(zip(words[2::2], words[3::2], strict=True))
    first = dict(zip(*[iter(run_of("ppo", paths, **short))] * 2, strict=True))
    assert again == first | {
        "--model": str(tmp_path / "1"),
        "--value_model": str(tmp_path / "1" / "critic"),
        "--output_dir": str(tmp_path / "1-next"),
    }
    main(words[1:])
    assert (tmp_path / "1-next" / "critic").is_dir()


def test_last_lines_of_ppo_resume_it(paths, tmp_path, capsys):
    """The second run ends where the first, longer one would have been; `next` does not resume."""
    short = {"total_episodes": 4, "per_device_train_batch_size": 4, "output_dir": tmp_path, "save_steps": 2}
    main(["ppo", *run_of("ppo", paths, **short)])
    resume = shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])
    assert resume[:2] == ["trl-ext", "ppo"]
    resume[resume.index("--total_episodes") + 1] = "8"
    before = json.loads((tmp_path / "trainer_state.json").read_text())
    main(resume[1:])
    after = json.loads((tmp_path / "trainer_state.json").read_text())
    assert after["global_step"] == 2 * before["global_step"]
    first, both = ([line["loss"] for line in s["log_history"] if "loss" in line] for s in (before, after))
    assert both[: len(first)] == first
    lines = last_lines(capsys.readouterr().out)[1]
    assert "--resume_from_checkpoint" not in lines["next"]
    assert lines["resume"].endswith(f"checkpoint-{after['global_step']}")


def test_last_line_without_a_report_says_how_to_make_it(tmp_path):
    assert f"trl-ext report {tmp_path}" in closing_lines("dpo", tmp_path)


# --------------------------------------------------------------------------------------------------- chat and the demo


def talk(monkeypatch, capsys, model, *said, options=()):
    answers = iter([*said, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    chat.main([str(model), "--max_new_tokens", "5", *options])
    return capsys.readouterr().out


def test_chat_answers_as_the_model_generates(paths, monkeypatch, capsys):
    model, tokenizer = tiny.tiny_actor().eval(), tiny.tiny_tokenizer()
    assert tokenizer.chat_template
    said = [{"role": "user", "content": "good film"}]
    batch = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].size(1) :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.strip()
    assert expected in talk(monkeypatch, capsys, paths["actor"], "good film")


def test_chat_remembers_until_it_starts_over(paths, monkeypatch, capsys):
    asked, real = [], chat.pipeline
    monkeypatch.setattr(chat, "pipeline", lambda *a, **k: Spy(real(*a, **k), asked))
    talk(monkeypatch, capsys, paths["actor"], "one", "two", "/new", "three", options=["--system", "be brief"])
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert asked[2][1]["content"] == "three"


class Spy:
    """A pipeline that writes down what it is asked."""

    def __init__(self, writer, asked):
        self.writer, self.asked, self.model = writer, asked, writer.model

    def __call__(self, messages, **options):
        self.asked.append(list(messages))
        return self.writer(messages, **options)


def test_chat_needs_a_model(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no model: there is no config\.json and no adapter_config\.json"):
        chat.main([str(tmp_path)])


def test_demo_is_a_reward_model_and_then_ppo_against_it(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(demo.subprocess, "run", lambda words: ran.append(words[3:]) or Namespace(returncode=0))
    monkeypatch.setattr(embedded, "smollm2", lambda: pytest.fail("loaded something"))
    demo.main(["--output_dir", str(tmp_path)])
    (first, *of_reward), (second, *of_ppo) = ran
    assert (first, second) == ("reward", "ppo")
    reward, ppo = command("reward").options(of_reward), command("ppo").options(of_ppo)
    assert ppo.reward_model_path == reward.output_dir == str(tmp_path / "reward-demo")
    assert ppo.total_episodes == 896  # the demo's recipe
    monkeypatch.setattr(demo.subprocess, "run", lambda words: Namespace(returncode=3))
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 3


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs gguf, matplotlib, jinja2: pip install 'trl-ext\[demo\]'"):
        demo.main([])


# --------------------------------------------------------------------------------------------------------------- data


def test_columns_of_other_names_are_mapped_by_the_flag_that_the_error_gives(paths, tmp_path, capsys):
    rows = [
        {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]}
        for row in map(json.loads, Path(paths["pairs"]).read_text().splitlines())
    ]
    Dataset.from_list(rows).to_json(str(tmp_path / "other.jsonl"))
    words = ["dpo", *run_of("dpo", paths | {"pairs": str(tmp_path / "other.jsonl")}, output_dir=tmp_path), "--dry_run"]
    said = error_of(words, capsys)
    flag = re.search(r"`(--columns prompt=question chosen=good rejected=bad)`", said).group(1)
    main([*words, *flag.split()])
    mapped = capsys.readouterr().out
    main(["dpo", *run_of("dpo", paths, output_dir=tmp_path), "--dry_run"])
    assert mapped == capsys.readouterr().out


def test_answers_with_labels_become_pairs_and_pairs_become_prompts(paths, tmp_path, capsys):
    rows = [
        {"prompt": f"good {i}", "completion": answer, "label": label}
        for i in range(20)
        for answer, label in ((" film", True), (" cat", False))
    ]
    Dataset.from_list(rows).to_json(str(tmp_path / "thumbs.jsonl"))
    main(["dpo", *run_of("dpo", paths | {"pairs": str(tmp_path / "thumbs.jsonl")}, output_dir=tmp_path), "--dry_run"])
    assert "over 18 pairs" in plan_line(capsys.readouterr().out)  # two of twenty are held out
    main(["ppo", *run_of("ppo", paths | {"prompts": paths["pairs"]}, output_dir=tmp_path), "--dry_run"])
    assert "The first prompt" in capsys.readouterr().out


def test_rows_of_one_prompt_are_held_out_together(paths, tmp_path):
    """Else a held-out prompt would be one that was trained on."""
    rows = [{"prompt": f"good {i}", "chosen": f" film {k}", "rejected": " cat"} for i in range(30) for k in range(3)]
    Dataset.from_list(rows).to_json(str(tmp_path / "pairs.jsonl"))
    splits = load_pairs(PairArguments(dataset_name=str(tmp_path / "pairs.jsonl")))
    train, test = set(splits["train"]["prompt"]), set(splits["test"]["prompt"])
    assert (len(train), len(test), train & test) == (27, 3, set())
    assert (len(splits["train"]), len(splits["test"])) == (81, 9)
    few = [{"prompt": f"good {i % 3}", "chosen": f" film {i}", "rejected": " cat"} for i in range(30)]
    Dataset.from_list(few).to_json(str(tmp_path / "few.jsonl"))
    splits = load_pairs(PairArguments(dataset_name=str(tmp_path / "few.jsonl")))
    assert (len(splits["train"]), len(splits["test"])) == (27, 3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nosuch.jsonl", None, r"There is no file .*nosuch\.jsonl\. The nearest is .*pairs\.jsonl"),
        ("pairs.tsv", "a\tb\n", r"pairs\.tsv is of no kind that is known by its name; those are \.json, \.jsonl"),
        ("one.jsonl", '{"chosen": "a", "rejected": "b"}\n', "There is one row, and it takes two at least"),
    ],
)
def test_data_that_cannot_be_are_refused_in_one_sentence(name, content, said, paths, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    words = run_of("dpo", paths | {"pairs": str(tmp_path / name)}, output_dir=tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(["dpo", *words])


def test_names_of_files_may_be_in_capitals(paths, tmp_path, capsys):
    (tmp_path / "PAIRS.JSONL").write_text(Path(paths["pairs"]).read_text())
    main(["dpo", *run_of("dpo", paths | {"pairs": str(tmp_path / "PAIRS.JSONL")}, output_dir=tmp_path), "--dry_run"])
    assert "over 36 pairs" in plan_line(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------- what a newcomer ran into


def test_error_of_this_package_ends_a_run_in_one_sentence_and_another_keeps_its_traceback(paths, tmp_path):
    with pytest.raises(SystemExit, match="error: There is no reward at all"):
        main(["ppo", "--model", paths["actor"], "--dataset_name", paths["prompts"], "--output_dir", str(tmp_path)])

    with pytest.raises(ValueError, match="invalid literal"), usage_errors():
        int("x")


def test_without_the_extra_a_run_goes_on_and_says_that_there_is_no_report(paths, tmp_path, monkeypatch, capsys):
    def missing(**_):
        raise ImportError("Pictures need matplotlib")

    monkeypatch.setattr(closing, "ReportCallback", missing)
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": tmp_path}
    main(["dpo", *run_of("dpo", paths, **short)])
    printed = capsys.readouterr()
    assert "There will be no report: Pictures need matplotlib" in printed.err
    assert f"trl-ext report {tmp_path}" in printed.out


def test_next_of_a_reward_run_is_ppo_of_the_same_model_and_data(paths, tmp_path, capsys):
    short = {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": tmp_path / "r"}
    main(["reward", *run_of("reward", paths, **short)])
    words = shlex.split(last_lines(capsys.readouterr().out)[1]["next"])
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--model": str(paths["actor"]),
        "--dataset_name": str(paths["pairs"]),
        "--reward_model_path": str(tmp_path / "r"),
        "--output_dir": f"{tmp_path / 'r'}-ppo",
    }
    main([*words[1:], "--dry_run"])
    assert "The first prompt" in capsys.readouterr().out


def test_words_are_dropped_with_their_values_in_both_spellings():
    argv = ["--a_b", "1", "2", "--keep", "3", "--a-b=4", "--flag", "--c", "5"]
    assert without(argv, "a_b", "c") == ["--keep", "3", "--flag"]


def test_help_shows_the_defaults_of_own_data(capsys):
    text = help_of("ppo", capsys)
    assert re.search(r"--response_length INT .*\(default: 53\)", text)
    main(["ppo", "--help", "--config", "ppo/demo"])
    assert re.search(r"--response_length INT .*\(default: 12\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--gpuss", "4"], "there is no option `--gpuss`; did you mean `--gpus`?"),
        (["plan", "--model", "nosuch"], "'nosuch' is no folder or hub name"),
        (["report", "out", "--wach", "3"], "there is no option `--wach`; did you mean `--watch`?"),
        (["chat", "out", "--temprature", "1"], "did you mean `--temperature`?"),
        (["demo", "--output-dri", "x"], "did you mean `--output_dir`?"),
    ],
)
def test_commands_with_few_options_say_what_was_meant_too(arguments, said, capsys):
    assert said in error_of(arguments, capsys)


def test_plan_takes_both_spellings_and_explains_its_layout(capsys):
    main(["plan", "--from-config", "dpo/8b_qlora_24gb", "--gpu-memory", "24", "--no-gradient-checkpointing"])
    first = capsys.readouterr().out
    main(["plan", "--from_config=dpo/8b_qlora_24gb", "--gpu_memory=24", "--no-gradient_checkpointing"])
    assert capsys.readouterr().out == first
    text = help_of("plan", capsys)
    first = re.search(r"^The 10 options that matter first:\n((?:  .*\n)+)", text, flags=re.MULTILINE).group(1)
    assert len(re.findall(r"^  --\w+", first, flags=re.MULTILINE)) == 10
    assert set(plan.LAYOUT_TEXTS) == {field.name for field in dataclasses.fields(Layout)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta: null", "`beta` is None; it must be a number."),
        ("beta: [0.1]", r"`beta` is \[0.1\]; it must be a number."),
        ("max_steps: 2.5", "`max_steps` is 2.5; it must be a whole number."),
        ("dtype: float23", "`dtype` is 'float23'; it must be one of auto"),
        ("model: a\nmodel_name_or_path: b", "gives `model_name_or_path` twice"),
        ("config: other.yaml", "there is no option `config`"),
        ("no_dataloader_pin_memory: true", "there is no option `no_dataloader_pin_memory`"),
        ("beta: [", "is no YAML"),
    ],
)
def test_recipe_value_that_a_flag_would_refuse_is_refused(line, said, tmp_path):
    (tmp_path / "r.yaml").write_text(line + "\n")
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(["dpo", "--config", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize("columns", ["prompt=question chosen=good", "{prompt: question, chosen: good}"])
def test_columns_of_a_recipe_may_be_a_line_or_a_mapping(columns, tmp_path):
    (tmp_path / "r.yaml").write_text(f"columns: {columns}\n")
    assert command("dpo").options(["--config", str(tmp_path / "r.yaml")]).columns == ["prompt=question", "chosen=good"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 64}, "has 36 prompts and a rollout takes 64"),
        ({"reward_model_path": "outputs/none", "nproc": 0}, "`--nproc` is 0; it must be at least 1"),
        ({"response_length": 4000}, "does not fit the model's context"),
    ],
)
def test_dry_run_refuses_what_the_trainer_would(options, said, paths, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        dry("ppo", paths, capsys, output_dir=tmp_path, **options)
    with pytest.raises(SystemExit, match="error: There is no reward at all"):
        main(["ppo", "--model", paths["actor"], "--dataset_name", paths["prompts"], "--dry_run"])


def test_chat_ends_where_the_model_ends(paths, tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny.tiny_actor(), tiny.tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(3, 64))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked, real = [], chat.pipeline
    monkeypatch.setattr(chat, "pipeline", lambda *a, **k: Spy(real(*a, **k), asked))
    talk(monkeypatch, capsys, tmp_path, "one", "two")
    answer = asked[1][1]["content"]
    assert len(tokenizer(answer)["input_ids"]) <= 1
    with pytest.raises(SystemExit, match="is a reward model: it scores text and writes none"):
        chat.main([str(paths["reward_model"])])


def test_checkpoint_of_an_earlier_run_is_not_resumed(paths, tmp_path, capsys):
    short = {"max_steps": 3, "per_device_train_batch_size": 4, "output_dir": tmp_path, "save_steps": 1}
    main(["dpo", *run_of("dpo", paths, **short)])
    assert "checkpoint-3" in last_lines(capsys.readouterr().out)[1]["resume"]
    main(["dpo", *run_of("dpo", paths, **short | {"max_steps": 1, "beta": 0.3})])
    assert shlex.split(last_lines(capsys.readouterr().out)[1]["resume"])[-1] == str(tmp_path / "checkpoint-1")
    main(["dpo", *run_of("dpo", paths, **short | {"max_steps": 1, "save_strategy": "no"})])
    assert "resume" not in last_lines(capsys.readouterr().out)[1]
