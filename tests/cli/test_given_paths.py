"""Models and checkpoints that there are not: one sentence, before any row is read."""

import json
import re
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from cli_runs import TRAINING, error_of, run_of
from commands import build, command
from trl_ext.cli import data
from trl_ext.cli.main import main
from trl_ext.data import demo


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def no_rows(monkeypatch):
    """No command gets as far as its data."""

    def load(*_):
        raise AssertionError("the rows were read first")

    monkeypatch.setattr(data, "_load", load)
    monkeypatch.setattr(demo, "movie_reviews", load)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
def test_model_that_there_is_not_is_named(name, more, paths, tmp_path, no_rows, capsys):
    said = error_of([name, *run_of(name, paths, model="nowhere", output_dir=tmp_path), *more], capsys)
    assert said.startswith(
        "error: 'nowhere' (`--model`) is no folder here, and no model of that name came from the hub ("
    )
    assert len(said.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    said = error_of([name, *run_of(name, paths, model=tmp_path / "empty"), *more], capsys)
    assert "(`--model`) holds no model: there is no config.json" in said
    said = error_of([name, *run_of(name, paths, model=tmp_path / "none"), *more], capsys)
    assert said.startswith(f"error: There is no folder '{tmp_path / 'none'}' (`--model`).")


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
@pytest.mark.parametrize("option", ["reward_model_path", "value_model", "sft_model_path"])
def test_other_models_of_ppo_are_named_too(option, more, paths, tmp_path, capsys):
    flags = run_of("ppo", paths, output_dir=tmp_path, **{option: "nowhere"})
    if option == "sft_model_path":
        flags = flags[2:]  # without `--model`
    assert error_of(["ppo", *flags, *more], capsys).startswith(f"error: 'nowhere' (`--{option}`) is no folder here")


def test_chat_and_score_name_the_model_that_there_is_not(paths, tmp_path, monkeypatch, no_rows, capsys):
    monkeypatch.chdir(tmp_path)
    assert error_of(["chat", "nowhere"], capsys).startswith("error: 'nowhere' (`trl-ext chat`) is no folder here")
    assert error_of(["score", "--model", "nowhere"], capsys).startswith(
        "error: 'nowhere' (`--model`) is no folder here"
    )
    said = error_of(["score", "--model", paths["actor"], "--ref_model", "nowhere"], capsys)
    assert said.startswith("error: 'nowhere' (`--ref_model`) is no folder here")
    said = error_of(["score"], capsys)
    assert said.startswith("error: There is no policy to score with: give the output folder of `trl-ext dpo`")


def lora(model, task="CAUSAL_LM"):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))


def test_base_of_an_adapter_that_there_is_not_is_named(tmp_path, no_rows, capsys):
    adapter = lora(tiny.tiny_actor())
    adapter.peft_config["default"].base_model_name_or_path = "nowhere"
    adapter.save_pretrained(tmp_path)
    for words in (["chat", str(tmp_path)], ["score", "--model", str(tmp_path)]):
        assert error_of(words, capsys).startswith(f"error: 'nowhere' (the base of the adapter {tmp_path}, ")


def test_reward_model_is_scored_by_as_little_as_it_is_talked_to(paths, tmp_path, no_rows, capsys):
    """Its language model's head would be a random one."""
    judge = AutoModelForSequenceClassification.from_pretrained(paths["actor"], num_labels=1)
    lora(judge, "SEQ_CLS").save_pretrained(tmp_path / "judge")
    lora(AutoModelForCausalLM.from_pretrained(paths["reward_model"])).save_pretrained(tmp_path / "on")
    for path in (paths["reward_model"], tmp_path / "judge", tmp_path / "on"):
        for option in ("--model", "--ref_model"):
            words = {"--model": paths["actor"], "--ref_model": paths["actor"], option: str(path)}
            said = error_of(["score", *(word for pair in words.items() for word in pair)], capsys)
            assert option in said
            assert "scores text and cannot write it" in said
        assert "scores text and cannot write it" in error_of(["chat", str(path)], capsys)


def shards(folder):
    """The weights in two files, of which one is gone."""
    tiny.tiny_actor().save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-*.safetensors")).unlink()


# What a folder of a model may lack or hold -> what it takes to make it so, and what is said of it.
DAMAGED = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds a config and no weights"),
    "other weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"xx"), "cannot be read .*header"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99]),
        "cannot be read .* is incomplete: copy it again",
    ),
    "a shard": (shards, r"model-0000\d-of-\d+.safetensors' .* cannot be read.* is missing: copy"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"The config of .* cannot be read"),
    "type": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"})),
        r"The config of .* cannot be read: .*nonesuch",
    ),
}
ROLES = [*((name, "model") for name in ("chat", "dpo", "ppo", "reward", "score")), ("score", "ref_model")]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_model_is_named(damage, paths, tmp_path, capsys):
    damaging, said = DAMAGED[damage]
    for role in ("actor", "reward_model"):
        shutil.copytree(paths[role], tmp_path / role)
        damaging(tmp_path / role)
    for name, option in [*ROLES, ("ppo", "reward_model_path"), ("ppo", "value_model")]:
        path = tmp_path / ("actor" if option in ("model", "ref_model") else "reward_model")
        flags = run_of("ppo" if name == "ppo" else "dpo", paths, **{option: path})
        flags += ["--output_dir", str(tmp_path / "out")]
        if name == "score":
            flags = ["--model", paths["actor"], "--ref_model", paths["actor"], "--dataset_name", paths["pairs"]]
            flags[flags.index(f"--{option}") + 1] = str(path)
        error = error_of(["chat", str(path)] if name == "chat" else [name, *flags], capsys)
        assert re.search(said, error), (name, option, error)
        assert str(path) in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", TRAINING)
def test_tokenizer_that_cannot_be_read_is_named(name, paths, tmp_path, capsys):
    shutil.copytree(paths["actor"], tmp_path / "actor")
    (tmp_path / "actor" / "tokenizer.json").write_text("{")
    said = error_of([name, *run_of(name, paths, model=tmp_path / "actor", output_dir=tmp_path / "out")], capsys)
    assert said.startswith(f"error: The tokenizer of '{tmp_path / 'actor'}' (`--model`) cannot be read: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere"])
def test_chat_template_that_there_is_not_is_named(path, paths, tmp_path, capsys):
    said = error_of(["reward", *run_of("reward", paths, output_dir=tmp_path, chat_template_path=path)], capsys)
    assert path in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
def test_checkpoint_that_there_is_not_is_named(name, more, paths, tmp_path, no_rows, capsys):
    def said(checkpoint):
        flags = run_of(name, paths, output_dir=tmp_path / "out", resume_from_checkpoint=checkpoint)
        return error_of([name, *flags, *more], capsys)

    assert said("nowhere").startswith("error: `--resume_from_checkpoint` is 'nowhere', and there is no such folder.")
    assert "and it has no trainer_state.json" in said(tmp_path)
    for word in ("True", "true"):
        assert said(word).startswith(f"error: There is no checkpoint to resume from in '{tmp_path / 'out'}'. ")


def test_true_resumes_from_the_last_checkpoint(paths, tmp_path):
    short = {"per_device_train_batch_size": 4, "output_dir": tmp_path, "save_steps": 1, "eval_strategy": "no"}
    main(["dpo", *run_of("dpo", paths, max_steps=2, **short)])
    first = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()  # the last one it is
    main(["dpo", *run_of("dpo", paths, max_steps=3, resume_from_checkpoint="True", **short)])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    losses, begun = ([line for line in log if "loss" in line] for log in (state["log_history"], first))
    assert losses[:1] == begun


def test_tokenizers_get_the_revision_of_the_policy_and_remote_code(paths, tmp_path, monkeypatch):
    """A revision is the policy's alone."""
    asked, real = [], AutoTokenizer.from_pretrained

    def tokenizer(path, **options):
        asked.append(options)
        return real(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    flags = run_of("reward", paths, output_dir=tmp_path, max_steps=1)
    main(["reward", *flags, "--trust_remote_code", "--dry_run"])
    assert asked[0]["trust_remote_code"] is True
    asked.clear()
    build("reward", [*flags, "--trust_remote_code"])
    assert asked[0]["trust_remote_code"] is True

    asked.clear()
    body, loaded = command("score"), []
    monkeypatch.setattr(body, "load_model", lambda path, data, model, revision: loaded.append(revision))
    monkeypatch.setattr(body, "ImplicitReward", lambda *_, **__: None)
    body.build(
        paths["actor"],
        paths["actor"],
        body.ScoreArguments(ref_model=paths["actor"]),
        body.ModelArguments(model_name_or_path=paths["actor"], model_revision="mine"),
    )
    assert loaded == ["mine", None]
    assert asked[0]["revision"] == "mine"
