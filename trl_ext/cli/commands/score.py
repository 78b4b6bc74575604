"""
Score pairs of answers by what a DPO policy has learnt: its implicit reward β log(π_θ / π_ref).

    trl-ext score                                     # the demo's held-out pairs, by the demo's policy
    trl-ext score --model out --ref_model my-sft --beta 0.1 --dataset_name pairs.jsonl
    trl-ext score --model my-adapter --dataset_name pairs.jsonl    # the reference: without the adapter

The pairs are those of `trl-ext dpo`; if the data have several splits, `dataset_test_split` is scored. The output file
gets every row with `chosen_reward`, `rejected_reward` and their difference `margin`, as JSON lines.
"""

import itertools
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from trl import maybe_extract_prompt

from ... import ImplicitReward
from ...data import demo
from ...data.json_values import plain_line
from ...data.pairs import check_columns
from ...models.loading import adapter_config, load_tokenizer
from ...models.saved_adapter import load_writer, require_writer
from ...runs.requirements import require_writable
from ...statistics import wilson_interval
from ..data import DataArguments, load_rows
from ..errors import usage_errors
from ..models import ModelArguments
from ..options import read
from ..parser import OptionParser


PAIR = ("prompt", "chosen", "rejected")
DEMO_POLICY = "outputs/dpo-demo"


@dataclass
class ScoreArguments(DataArguments):
    TOPIC: ClassVar[str] = "Scoring"

    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Model or adapter that the policy started from. Unset: the policy without its adapter; of the "
            "demo's policy, SmolLM2."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "β used in training, above 0."})
    batch_size: int = field(default=16, metadata={"help": "Number of sequences in a forward pass."})
    output_file: str = field(default="scores.jsonl", metadata={"help": "File for the scored pairs."})
    overwrite: bool = field(default=False, metadata={"help": "Write over the file that `--output_file` names."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})


def load(data: ScoreArguments) -> Dataset:
    if data.dataset_name is None and not data.datasets:
        return demo.preference_pairs(test_size=data.test_size)["test"]
    return load_rows(data)


def load_model(path: str, data: ScoreArguments, model: ModelArguments, revision: str | None) -> Any:
    is_adapter = adapter_config(path) is not None  # its base gets the dtype of the training
    device = "cuda" if torch.cuda.is_available() and not data.use_cpu else "cpu"
    options = model.init_kwargs(data.use_cpu, is_adapter)
    options |= {"revision": revision, "quantization_config": model.quantization()}
    return load_writer(path, device_map={"": device}, **options)


def build(path: str, ref_path: str | None, data: ScoreArguments, model: ModelArguments) -> ImplicitReward:
    policy = load_model(path, data, model, model.model_revision)
    # A revision is the policy's: the reference is another model.
    reference = None if ref_path is None else load_model(ref_path, data, model, None)
    tokenizer = load_tokenizer(path, revision=model.model_revision)
    return ImplicitReward(policy, reference, tokenizer, data.beta, data.batch_size, shows_progress=True)


def paths_of(data: ScoreArguments, model: ModelArguments) -> tuple[str, str | None]:
    """
    Return the policy, and the reference if it is another model, of adapters their folders; `ValueError` unless both
    are language models.
    """
    path, ref_path = model.model_name_or_path, data.ref_model
    if path is None:
        if not Path(DEMO_POLICY).exists():
            raise ValueError(
                "There is no policy to score with: give the output folder of `trl-ext dpo` and the model that it "
                "started from, `--model out --ref_model my-sft`; or make the demo's first, with `trl-ext dpo`."
            )
        path, ref_path = DEMO_POLICY, ref_path or str(demo.smollm2())
    path = require_writer(path, "--model", model.model_revision)
    if ref_path is None and adapter_config(path) is None:
        raise ValueError(
            f"{path!r} (`--model`) is a whole model, so `--ref_model START` is needed: give the model that DPO "
            "started from; with the same one twice every reward is 0. For an adapter the reference is its base."
        )
    return path, None if ref_path is None else require_writer(ref_path, "--ref_model")


def score(rows: Dataset, reward: ImplicitReward) -> list[dict[str, Any]]:
    check_columns(None, {"the pairs to score": rows}, lambda: reward.tokenizer)
    pairs = rows.map(maybe_extract_prompt)  # if there is none, it is what both answers begin with
    others = {name: pairs[name] for name in pairs.column_names if name not in PAIR}  # such as `tools`
    rewards = reward.of_pairs(*(pairs[name] for name in PAIR), **others)
    return [
        row | {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}
        for row, chosen, rejected in zip(rows, *rewards, strict=True)
    ]


def require_free(file: Path, overwrite: bool) -> None:
    """Raise `ValueError` for an output file that cannot be written, or that is there and not to be written over."""
    require_writable(file.parent, "output_file")
    if file.is_dir():
        raise ValueError(f"`output_file` is {file}, a folder. Give a file, such as {file / 'scores.jsonl'}.")
    if file.exists() and not overwrite:
        free = next(path for n in itertools.count(2) if not (path := file.with_stem(f"{file.stem}-{n}")).exists())
        raise ValueError(
            f"{file} (`--output_file`) is there already. Give another file, `--output_file {shlex.quote(str(free))}`, "
            "or write over it with `--overwrite`."
        )


def arguments() -> OptionParser:
    return OptionParser("score", (ScoreArguments, ModelArguments), description=__doc__)


def main(argv: list[str] | None = None) -> None:
    with usage_errors():
        given = read(arguments(), argv)
    with usage_errors(given.wording):
        data, model = given.make()
        if not data.beta > 0:
            raise ValueError(
                f"`--beta` is {data.beta}; it must be above 0: give the β that the policy was trained with."
            )
        require_free(Path(data.output_file), data.overwrite)
        paths = paths_of(data, model)  # before any row is read
        scored = score(load(data), build(*paths, data, model))
    output = Path(data.output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(map(plain_line, scored)), encoding="utf-8")
    count, right = len(scored), sum(row["margin"] > 0 for row in scored)
    low, high = wilson_interval(right, count)
    print(
        f"Pairs in the right order: {right / count:.1%} of {count} (95% interval {low:.1%} to {high:.1%}); mean "
        f"margin {sum(row['margin'] for row in scored) / count:+.3f}. Scores are in {output}"
    )
