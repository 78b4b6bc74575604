"""`--dry_run`: the batch plan, the memory plan and the sample are those of the run."""

import datetime
import decimal
import json
import re
import shutil

import pytest
from datasets import Dataset

import tiny
from cli_runs import RECIPES, plan_line, run_of
from commands import build
from trl_ext.cli.main import main


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def dry(name, paths, capsys, *more, **options):
    main([name, *run_of(name, paths, **options), "--dry_run", *more])
    return capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_runs_dry_on_hardware_that_is_not_here(path, paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = path.parent.name
    paths = paths | {"actor": paths["long"], "prompts": paths["many"], "reward_model": "outputs/not-there"}
    recipe = ["--config", f"{name}/{path.stem}", "--gpu", "a100", "--nproc", "4"]
    # One recipe names layers that the tiny model has not.
    targets = ["--lora_target_modules", "all-linear"] if "use_peft: true" in path.read_text() else []
    functions = ["--reward_funcs", "ppo_runs.response_lengths"] if "reward_funcs" in path.read_text() else []
    text = dry(name, paths, capsys, *recipe, *targets, *functions, output_dir="out")
    assert "× 4 processes)" in plan_line(text)
    assert "It fits" in text
    assert "This was a dry run" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{}, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3}, {"max_steps": 7}], ids=str
)
def test_dry_run_of_dpo_counts_the_steps_of_the_trainer(options, paths, tmp_path, capsys):
    options |= {"per_device_train_batch_size": 4, "output_dir": tmp_path}
    steps = re.search(r"; (\d+) optimizer steps over 36 pairs", plan_line(dry("dpo", paths, capsys, **options)))
    trainer = build("dpo", run_of("dpo", paths, **options, save_strategy="no", eval_strategy="no"))
    trainer.train()
    assert int(steps.group(1)) == trainer.state.max_steps


def test_dry_run_of_ppo_prints_the_trainers_plan(paths, tmp_path, capsys):
    options = {"per_device_train_batch_size": 4, "total_episodes": 24, "output_dir": tmp_path}
    line = plan_line(dry("ppo", paths, capsys, **options))
    build("ppo", run_of("ppo", paths, **options)).train()
    assert line in capsys.readouterr().out


def sample_of(text, part):
    """Token ids of a part of the sample."""
    match = re.search(rf"^  {part} +(\d+) tokens  (.*)\n +([\d ]+)$", text, flags=re.MULTILINE)
    ids = [int(word) for word in match.group(3).split()]
    assert int(match.group(1)) == len(ids)
    return ids


PROMPT, ANSWERS = [{"role": "user", "content": "what is"}], ("good film", "bad film")
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in ANSWERS)
WHEN = datetime.datetime(2025, 1, 2)
# A template that writes what a row may bring along, so that a sample without it is seen.
TEMPLATE = "{% if tools %}{{ '<system> ' + tools[0]['name'] + ' ' }}{% endif %}{{ mark or '' }}" + tiny.CHAT_TEMPLATE
ROWS = {
    "text": {"prompt": "what is", "chosen": " good film", "rejected": " bad film"},
    "chat": {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    "implicit prompt": {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
}
ROWS["tools"] = ROWS["chat"] | {"tools": '[{"name": "cat"}]'}
ROWS["template"] = ROWS["chat"] | {"chat_template_kwargs": {"mark": "<system> dog "}}
ROWS["times"] = ROWS["chat"] | {"prompt": [PROMPT[0] | {"when": WHEN}], "when": WHEN, "raw": b"\xff"}
ROWS["times"] |= {"price": decimal.Decimal("1.10")}


@pytest.fixture
def chats(paths, tmp_path):
    """Paths to data of conversations and to models whose template shows all that a row brings."""

    def write(row):
        path = tmp_path / "chats.parquet"
        Dataset.from_list([row] * 12).to_parquet(str(path))
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        for name in ("actor", "reward_model"):
            shutil.copytree(paths[name], tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        models = {name: str(tmp_path / name) for name in ("actor", "reward_model")}
        return paths | models | {"pairs": str(path), "prompts": str(path)}

    return write


@pytest.mark.parametrize("name", ["dpo", "reward"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_sample_of_a_dry_run_is_what_the_trainer_trains_on(name, row, chats, tmp_path, capsys):
    there, options = chats(row), {"output_dir": tmp_path, "max_length": 32}
    text = dry(name, there, capsys, **options)
    first = build(name, run_of(name, there, **options)).train_dataset[0]
    for part in ("prompt", "chosen", "rejected") if name == "dpo" else ("chosen", "rejected"):
        assert sample_of(text, part) == list(first[f"{part}_ids"])
    extra = {"tools": "<system> cat", "template": "<system> dog"}
    for kind, words in extra.items():
        assert (words in text) is (row is ROWS[kind])


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_prompt_of_a_dry_run_is_what_the_actor_reads(row, chats, tmp_path, capsys):
    there = chats(row)
    options = {"output_dir": tmp_path, "per_device_train_batch_size": 4, "total_episodes": 4}
    if row.keys() & {"tools", "chat_template_kwargs"}:  # options of each row, which PPO does not read
        with pytest.raises(SystemExit, match="which PPO does not read"):
            dry("ppo", there, capsys, **options)
        return
    text = dry("ppo", there, capsys, **options)
    trainer = build("ppo", run_of("ppo", there, **options))
    (ids,), *_ = trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]])
    assert sample_of(text, "prompt") == list(ids)


@pytest.mark.parametrize("name", ["reward", "dpo", "ppo"])
def test_text_with_the_chat_template_is_read_as_a_conversation(name, chats, tmp_path, capsys):
    """Reward training, DPO and PPO then read alike; without it, and without a conversation, a note says so."""
    options = {"output_dir": tmp_path / "out", "per_device_train_batch_size": 4}
    of_chat = dry(name, chats(ROWS["chat"]), capsys, **options)
    for model in ("actor", "reward_model"):
        shutil.rmtree(tmp_path / model)
    there = chats({part: text.strip() for part, text in ROWS["text"].items()})
    assert dry(name, there, capsys, "--apply_chat_template", **options) == of_chat
    as_text = dry(name, there, capsys, **options)
    assert ("--apply_chat_template" in as_text, "Note:" in of_chat) == (True, False)
    assert as_text.partition("The first p")[2] != of_chat.partition("The first p")[2]


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_json_of_a_dry_run_says_what_its_text_says(name, paths, tmp_path, capsys):
    options = {"output_dir": tmp_path / "out", "per_device_train_batch_size": 4, "gpu": "a100"}
    text = dry(name, paths, capsys, **options)
    found = json.loads(dry(name, paths, capsys, "--json", **options))
    assert found["batches"] == plan_line(text)
    assert f"; {found['optimizer_steps']} optimizer steps" in text
    assert found["rows"] == {"train": 36, "test": 4}
    assert found["data"] == paths["pairs" if name == "dpo" else "prompts"]
    memory = found["memory"]
    assert f"It fits: {memory['needed_gib']:.1f} of {memory['of_gib']:.1f} GiB on each GPU" in text
    assert (memory["fits"], memory["planned"]) == (True, True)
    assert f"most when {memory['most_when']} " in text
    for part, sample in found["sample"]["parts"].items():
        assert sample["ids"] == sample_of(text, part)
        assert repr(sample["text"]) in text
    assert set(found["sample"]["parts"]) == ({"prompt", "chosen", "rejected"} if name == "dpo" else {"prompt"})


def test_recipe_that_leaves_its_data_empty_is_told_whose_rows_are_read(paths, recipe, capsys):
    main(["dpo", "--config", recipe(f"model: {paths['actor']}\ndataset_name:\n"), "--dry_run"])
    said = "Note: the rows are embedded movie reviews (Hutto & Gilbert 2014), since no data are named."
    assert said in capsys.readouterr().out


def test_pair_that_is_too_long_is_named_in_a_dry_run(paths, tmp_path, capsys):
    text = dry("reward", paths, capsys, output_dir=tmp_path, max_length=2)
    assert "The first pair is left out: it is longer than `max_length=2`." in text


def test_dry_run_without_a_gpu_plans_for_this_machine(paths, tmp_path, capsys):
    assert "GiB on the process" in dry("dpo", paths, capsys, output_dir=tmp_path)
    with pytest.raises(SystemExit, match="does not know the GPU 'gtx'"):
        dry("dpo", paths, capsys, output_dir=tmp_path, gpu="gtx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 64}, "has 36 prompts, and a rollout takes 64"),
        ({"reward_model_path": "outputs/none", "nproc": 0}, "`--nproc` is 0; it must be at least 1"),
        ({"response_length": 4000}, "does not fit the model's context"),
    ],
)
def test_dry_run_refuses_what_the_trainer_would(options, said, paths, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        dry("ppo", paths, capsys, output_dir=tmp_path, **options)
    assert "PPO plan:" not in capsys.readouterr().out  # what cannot be has no plan
    with pytest.raises(SystemExit, match="error: There is no reward at all"):
        main(["ppo", "--model", paths["actor"], "--dataset_name", paths["prompts"], "--dry_run"])


def test_plan_is_of_the_engine_that_the_accelerate_file_names(paths, capsys):
    launch = {"gpu": "a100-80gb", "nproc": 2, "accelerate_config": "fsdp2"}
    main(["dpo", *run_of("dpo", paths, **launch), "--dry_run"])
    assert "\nFSDP2, " in capsys.readouterr().out
    main(["dpo", *run_of("dpo", paths, **launch), "--dry_run", "--use_peft", "--load_in_4bit"])
    assert "Memory: not planned: FSDP has not been tried with quantised weights" in capsys.readouterr().out
