"""Rows of the embedded data, of files, folders and mixtures: split, mapped and checked."""

import datetime
import decimal
import json
import math
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from cli_runs import error_of, plan_line, run_of, toy_run
from trl_ext.cli.data import DataArguments, PairArguments, flags_of, load_pairs, load_rows, load_splits
from trl_ext.cli.main import main
from trl_ext.data.conversions import to_preference, to_prompts


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def no_embedded(*_):
    raise AssertionError("the embedded data were asked for")


@pytest.fixture
def rows():
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(20)]})


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_loaded_and_a_tenth_of_it_held_out(rows, tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    getattr(rows, f"to_{kind.removesuffix('l')}")(str(path))
    splits = load_splits(DataArguments(dataset_name=str(path)), no_embedded, to_prompts)
    assert (len(splits["train"]), len(splits["test"])) == (18, 2)
    assert sorted([*splits["train"]["prompt"], *splits["test"]["prompt"]]) == sorted(rows["prompt"])


def test_a_saved_folder_is_loaded_with_its_splits(rows, tmp_path):
    DatasetDict(train=rows, test=rows.select([3])).save_to_disk(str(tmp_path / "both"))
    rows.save_to_disk(str(tmp_path / "one"))
    given = DataArguments(dataset_name=str(tmp_path / "both"), train_size=5, test_size=99)
    both = load_splits(given, no_embedded, to_prompts)
    assert (both["train"]["prompt"], both["test"]["prompt"]) == ([f"p{i}" for i in range(5)], ["p3"])
    assert len(load_splits(DataArguments(dataset_name=str(tmp_path / "one")), no_embedded, to_prompts)["test"]) == 2


def test_a_missing_split_is_an_error_that_lists_the_splits(rows, tmp_path):
    DatasetDict(training=rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"no split 'train', but 'training': write `--dataset_train_split training`"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "rows")), no_embedded, to_prompts)
    splits = {"dataset_train_split": "training", "dataset_test_split": "nope"}
    given = DataArguments(dataset_name=str(tmp_path / "rows"), **splits)
    for read in (lambda: load_splits(given, no_embedded, to_prompts), lambda: load_rows(given)):
        with pytest.raises(ValueError, match=r"no split 'nope', but 'training': .* or leave it out"):
            read()


def test_a_stream_holds_out_its_first_rows(rows, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    rows.to_json(path)
    args = DataArguments(dataset_name=path, dataset_streaming=True, test_size=2, train_size=3)
    splits = load_splits(args, no_embedded, to_prompts)
    assert [row["prompt"] for row in splits["test"]] == ["p0", "p1"]
    assert [row["prompt"] for row in splits["train"]] == ["p2", "p3", "p4"]
    with pytest.raises(ValueError, match=r"no split 'test' was found: give `--test_size 100`"):
        load_splits(DataArguments(dataset_name=path, streaming=True), no_embedded, to_prompts)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_stream_needs_the_number_of_steps(name, paths, tmp_path, capsys):
    words = [name, *run_of(name, paths, output_dir=tmp_path, dataset_streaming=True, test_size=4)]
    for more in ([], ["--dry_run"]):
        assert error_of([*words, *more], capsys) == (
            "error: A stream has no length: give the number of steps, such as `--max_steps 1000`."
        )


def test_a_mixture_in_the_recipe_is_loaded_and_split(rows, tmp_path, recipe, demo):
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for file in files:
        rows.to_json(file)
    lines = "".join(f"  - {{path: json, data_files: {file}}}\n" for file in files)
    _, data, *_ = toy_run(["--config", recipe(f"datasets:\n{lines}test_split_size: 0.25\n")], demo)
    splits = load_splits(data, no_embedded, to_prompts)
    assert (len(splits["train"]), len(splits["test"])) == (30, 10)
    again = load_splits(data, no_embedded, to_prompts)
    assert splits["test"]["prompt"] == again["test"]["prompt"]  # as on another rank
    data.dataset_train_split = "none"
    with pytest.raises(ValueError, match=r"^'json, json' has no split 'none', but 'train'"):
        load_splits(data, no_embedded, to_prompts)


def test_rows_to_score_are_those_of_the_test_split_or_all(rows, tmp_path):
    rows = rows.add_column("chosen", ["yes"] * 20).add_column("rejected", ["no"] * 20)
    rows.to_json(str(tmp_path / "rows.jsonl"))
    DatasetDict(train=rows, test=rows.select([3, 4])).save_to_disk(str(tmp_path / "both"))
    assert len(load_rows(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")))) == 20
    assert load_rows(DataArguments(dataset_name=str(tmp_path / "both"), test_size=1))["prompt"] == ["p3"]
    given = DataArguments(dataset_name=str(tmp_path / "both"), dataset_test_split="held", dataset_train_split="t")
    with pytest.raises(ValueError, match=r"no split 'held', but 'train', 'test': write `--dataset_test_split test`"):
        load_rows(given)


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


def test_next_command_reads_the_same_rows_as_conversations():
    given = DataArguments(dataset_name="p.csv", columns=["prompt=q"], apply_chat_template=True)
    assert flags_of(given) == ["--dataset_name", "p.csv", "--columns", "prompt=q", "--apply_chat_template"]
    assert "--apply_chat_template" not in flags_of(DataArguments(dataset_name="p.csv"))


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
        ("nosuch.jsonl", None, r"There is no file .*nosuch\.jsonl'\. Did you mean `--dataset_name .*pairs\.jsonl`"),
        ("pairs.tsv", "a\tb\n", r"pairs\.tsv' is no file of \.json, \.jsonl.*read_csv\('.*sep='\\t'"),
        ("empty.json", "", r"The file .*empty\.json' is empty\."),
        ("empty.jsonl", " \n\n", r"The file .*empty\.jsonl' is empty\."),
        ("empty.csv", "", r"The file .*empty\.csv' is empty\."),
        ("empty.parquet", "", r"The file .*empty\.parquet' is empty\."),
        ("list.json", "[]", r"list\.json"),
        ("heads.csv", "chosen,rejected\n", r"heads\.csv' holds no rows"),
        ("cut.json", '[{"chosen": "a", "rejec', r"cut\.json' is no JSON in line 1, `\[.*rejec`: Unterminated string"),
        ("cut.jsonl", '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rej', r"cut\.jsonl' is no JSON in line 2, "),
        ("text.jsonl", "what is this", r"text\.jsonl' is no JSON in line 1, `what is this`: Expecting value\."),
        ("tabs.csv", "chosen\trejected\na\tb\n", r"has one column, 'chosen\\trejected': .* is '\\t' and no comma"),
        ("odd.csv", 'chosen,rejected\n"a,b\n', r"odd\.csv' cannot be read: \w+: .+"),
        ("bad.parquet", "PAR1 and no more", r"bad\.parquet' cannot be read: \w+: .+"),
        ("one.jsonl", '{"chosen": "a", "rejected": "b"}\n', r"one\.jsonl' has only one row"),
    ],
)
def test_data_that_cannot_be_are_refused_in_one_sentence(name, content, said, paths, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    words = run_of("dpo", paths | {"pairs": str(tmp_path / name)}, output_dir=tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{said}") as end:
        main(["dpo", *words])
    assert len(end.value.code.splitlines()) == 1


PAIR = {"prompt": "good", "chosen": "film", "rejected": "cat"}
TURNS = {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in PAIR.items()}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": 1, "chosen": 2, "rejected": 3}] * 4, r"'prompt' of `?(.*?)`? holds int \(1\); it must hold text"),
        ([PAIR | {"prompt": 1}] * 4, r"'prompt' of `?(.*?)`? holds int \(1\); it must hold text"),
        ([PAIR, PAIR | {"chosen": [1]}, PAIR, PAIR], r"'chosen' of `?(.*?)`? holds text in its .* and list in row \d"),
        (
            [TURNS, TURNS | {"rejected": "cat"}, TURNS, TURNS],
            r"'rejected' of `?(.*?)`? holds a conversation in its first row and text in row \d",
        ),
    ],
)
def test_cells_of_another_kind_are_named(rows, said, paths, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("dpo", "reward", "score"):
        flags = run_of("dpo", paths | {"pairs": str(tmp_path / "rows.jsonl")}, output_dir=tmp_path)
        if name == "score":
            flags = [*flags[:4], "--ref_model", paths["actor"]]
        found = re.search(said, error_of([name, *flags], capsys))
        assert found, name
        assert (
            found[1] == "the pairs to score"
            if name == "score"
            else re.fullmatch("the (training|test) split of '.*'", found[1])
        )


def test_share_that_is_none_is_refused_in_one_sentence(paths, tmp_path, capsys):
    words = run_of("dpo", paths, output_dir=tmp_path, test_split_size=2)
    assert "`--test_split_size` is 2.0; it must be a share" in error_of(["dpo", *words], capsys)


def test_data_of_other_kinds_that_cannot_be_read_are_named_too(paths, tmp_path, capsys):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    for name in (tmp_path / "saved", tmp_path / "nothing", "no/such-data"):
        said = error_of(["dpo", *run_of("dpo", paths | {"pairs": str(name)}, output_dir=tmp_path)], capsys)
        assert said.startswith(f"error: '{name}' cannot be read: ")
    (tmp_path / "cut.jsonl").write_text('{"chosen": "a", "rej')
    words = run_of("dpo", paths | {"pairs": str(tmp_path / "cut.jsonl")}, output_dir=tmp_path, test_size=1)
    said = error_of(["dpo", *words, "--dataset_streaming", "--max_steps", "1"], capsys)
    assert "cannot be read: " in said or "is no JSON in line 1" in said  # older versions of datasets say which line


# What JSON does not have and a parquet file has.
TIME = datetime.datetime(2025, 1, 2, tzinfo=datetime.UTC)
ODD = {"when": TIME, "day": TIME.date(), "raw": b"\xff", "price": decimal.Decimal("1.10"), "weight": math.nan}


def test_prompts_with_times_bytes_and_decimals_are_held_out_together(tmp_path):
    def turn(role, text):
        return [{"role": role, "content": text, **ODD}]

    rejected = {"rejected": turn("assistant", "b")}
    rows = [
        {"prompt": turn("user", f"good {i % 12}"), "chosen": turn("assistant", f"a {i}"), **rejected}
        for i in range(36)
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    splits = load_pairs(PairArguments(dataset_name=str(tmp_path / "p.parquet")))
    train, test = ({row["prompt"][0]["content"] for row in splits[name]} for name in ("train", "test"))
    assert (len(splits["train"]), len(splits["test"]), train & test) == (30, 6, set())
    thumbs = [
        {"prompt": turn("user", f"good {i}"), "completion": turn("assistant", str(label)), "label": label}
        for i in range(4)
        for label in (True, False)
    ]
    pairs = to_preference(Dataset.from_list(thumbs))
    assert [row["chosen"][0]["content"] for row in pairs] == ["True"] * 4


def test_scored_rows_are_json_whatever_they_hold(paths, tmp_path):
    rows = [{"prompt": "good", "chosen": " film", "rejected": " cat", **ODD} for _ in range(3)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    words = ["--model", paths["actor"], "--ref_model", paths["long"], "--dataset_name", str(tmp_path / "p.parquet")]
    main(["score", *words, "--output_file", str(tmp_path / "s.jsonl"), "--use_cpu"])
    for line in (tmp_path / "s.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert row.pop("margin") == pytest.approx(row.pop("chosen_reward") - row.pop("rejected_reward"))
        plain = {"when": "2025-01-02T00:00:00+00:00", "day": "2025-01-02", "raw": "/w==", "price": "1.10"}
        assert row == rows[0] | plain | {"weight": None}


def test_scores_are_not_written_over_unasked(paths, tmp_path, capsys):
    words = ["score", "--model", paths["actor"], "--ref_model", paths["long"], "--dataset_name", paths["pairs"]]
    words += ["--test_size", "2", "--use_cpu", "--output_file"]
    file = tmp_path / "s.jsonl"
    file.write_text("mine")
    (tmp_path / "s-2.jsonl").write_text("")
    said = error_of([*words, str(file)], capsys)
    assert said.startswith(f"error: {file} (`--output_file`) is there already. Give another file, `--output_file ")
    assert f"`--output_file {tmp_path / 's-3.jsonl'}`, or write over it with `--overwrite`." in said
    assert f"`--output_file` is {tmp_path}, a folder. Give a file" in error_of([*words, str(tmp_path)], capsys)
    assert file.read_text() == "mine"
    main([*words, str(file), "--overwrite"])
    assert len(file.read_text().splitlines()) == 2


def test_empty_name_of_data_is_refused(paths, tmp_path, capsys):
    said = error_of(["dpo", *run_of("dpo", paths | {"pairs": ""}, output_dir=tmp_path), "--dry_run"], capsys)
    assert "`--dataset_name` is empty. Name a file, " in said


def test_configuration_of_a_file_here_is_refused(rows, tmp_path):
    rows.to_json(str(tmp_path / "p.jsonl"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name, kind in (("p.jsonl", "a file"), ("saved", "a saved set")):
        given = DataArguments(dataset_name=str(tmp_path / name), dataset_config="default")
        with pytest.raises(ValueError, match=f"`dataset_config` is 'default', and .*{name} is {kind} here: only"):
            load_splits(given, None, to_preference)


def test_names_of_files_may_be_in_capitals(paths, tmp_path, capsys):
    (tmp_path / "PAIRS.JSONL").write_text(Path(paths["pairs"]).read_text())
    main(["dpo", *run_of("dpo", paths | {"pairs": str(tmp_path / "PAIRS.JSONL")}, output_dir=tmp_path), "--dry_run"])
    assert "over 36 pairs" in plan_line(capsys.readouterr().out)
