"""
The model card: what was trained on what, by which loss, how it came out, how to load it, whom to cite.

TRL's trainers write a card with their text, tags and citations. `complete_card` adds a run's own sections, from the
trainer and its log. TRL writes a new card each time, so no section is ever in it twice.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, try_to_load_from_cache

from .._trl import get_config_model_id
from ..data.json_values import plain
from .facts import base_name, changed_options, data_facts, machine_facts, model_facts
from .folder import DATA_FILES, is_of_this_run, without_place
from .log import is_tie


FILE, PICTURE = "README.md", "report.png"
# Options that say nothing about the model: paths and switches of one machine.
OF_THE_MACHINE = {
    *("output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", "debug", "resume_from_checkpoint"),
    *("accelerator_config", "activation_checkpointing", "do_train", "do_eval", "do_predict", "pad_to_multiple_of"),
    *("use_cpu", "dataloader_pin_memory", "dataloader_num_workers"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
}
OF_SIGNS = ("preference/accuracy", "preference/calibration_error")
# InstructGPT: a reward model of human preferences, and PPO against it.
OUYANG = """\
@inproceedings{ouyang2022training,
    title     = {{Training Language Models to Follow Instructions with Human Feedback}},
    author    = {Long Ouyang and Jeff Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and
                 Pamela Mishkin and others},
    booktitle = {Advances in Neural Information Processing Systems 35},
    year      = 2022
}"""


class Metric(NamedTuple):
    """A metric of the log that belongs on a card. Held out, `key` has `eval_` before it."""

    key: str
    name: str
    form: str = "{:.3f}"


@dataclass(frozen=True)
class Training:
    """What one kind of training says about itself."""

    trainer: str  # its public name, with its package
    facts: Mapping[str, Any]  # rows of the table "What was trained, and how"
    loss: str  # the section on the loss, in Markdown
    metrics: Sequence[Metric]  # those to show, the first ones first
    loading: str  # Python lines that load what was trained from the folder `folder`
    citations: Sequence[str] = ()  # BibTeX entries beside those of TRL's own card
    task: str = "text-generation"  # the hub's name
    rewording: Mapping[str, str] = field(default_factory=dict)  # what TRL's own card says -> what it should say


def card_name(trainer: Any) -> str:
    """Return the model's name: that of its repository, else of its folder."""
    repository = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    return str(repository).split("/")[-1] if repository else Path(trainer.args.output_dir).resolve().name


def hub_name(dataset_name: str | None) -> str | None:
    """Return the dataset's name if it is one of the hub's; a file or folder has no page there."""
    if dataset_name is None:
        return None
    path = Path(dataset_name)
    return None if path.exists() or path.is_absolute() or path.suffix in DATA_FILES else dataset_name


class WritesCard:
    """A trainer that writes its run's model card from what `describe` says. Name it before TRL's trainer."""

    def describe(self) -> Training:
        """Return the sections of this training's card."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        # The Trainer writes a card beside its checkpoints and when it pushes; a folder saved at the end needs one too.
        args: Any = self.args  # type: ignore[attr-defined]
        is_own = Path(output_dir or args.output_dir) == Path(args.output_dir)
        if is_own and not _internal_call and not args.push_to_hub:
            self.create_model_card()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's model card, with the sections of this training."""
        super().create_model_card(model_name or card_name(self), hub_name(dataset_name), tags)  # type: ignore[misc]
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            complete_card(self, self.describe(), dataset_name)


def complete_card(trainer: Any, training: Training, dataset_name: str | None = None) -> None:
    """Complete the card that TRL has just written, with what `training` says; on the main process."""
    path = Path(trainer.args.output_dir) / FILE
    card = ModelCard.load(path)
    repository = getattr(trainer, "hub_model_id", None) or str(without_place(trainer.args.output_dir))
    card.text = card.text.replace("[None](https://huggingface.co/None)", f"`{base_name(trainer.model)}`")
    card.text = card.text.replace('="None"', f'="{repository}"')
    card.text = re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", card.text)  # where TRL's template has no badge to show
    for theirs, ours in training.rewording.items():
        card.text = card.text.replace(theirs, ours)
    before, heading, citations = card.text.partition("## Citations")
    more = "".join(f"\n```bibtex\n{entry}\n```\n" for entry in training.citations)
    cited = f"{citations.rstrip()}\n" + (f"\nCite the methods used as:\n{more}" if more else "")
    card.text = f"{before}{_sections(trainer, training, dataset_name)}\n{heading}{cited}"
    _complete_metadata(card, trainer, training, dataset_name)
    card.save(path)


# ---- Sections ----


def _sections(trainer: Any, training: Training, dataset_name: str | None) -> str:
    facts: dict[str, Any] = {"trained by": f"`{training.trainer}`"}
    of_model = model_facts(trainer.model)
    base = of_model.pop("model")
    if base.count("/") == 1 and not Path(base).exists():  # a hub name has a page
        base = f"[{base}](https://huggingface.co/{base})"
    facts |= {"base model": base} | of_model
    facts |= data_facts(trainer, dataset_name) | {**training.facts} | machine_facts(trainer)
    known = {name: str(value).replace("|", "\\|") for name, value in facts.items() if value not in (None, "")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in known.items())
    changed = {name: value for name, value in changed_options(trainer.args).items() if name not in OF_THE_MACHINE}
    options = without_place(plain(changed, not_finite=str))
    if options:
        lines = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        options = f"Those that differ from the defaults of `{type(trainer.args).__name__}`:\n\n```yaml\n{lines}```"
    folder = f'folder = "{without_place(trainer.args.output_dir)}"'
    if repository := getattr(trainer, "hub_model_id", None):
        folder = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}")'
    parts = {
        "Results": _results(trainer, training.metrics),
        "What was trained, and how": f"| | |\n|---|---|\n{rows}",
        "The loss": training.loss,
        "Options": options,
        "How to load it": f"```python\n{folder}\n{textwrap.dedent(training.loading).strip()}\n```",
    }
    return "\n".join(f"## {title}\n\n{text}\n" for title, text in parts.items() if text)


def _results(trainer: Any, metrics: Sequence[Metric]) -> str:
    log, parts = trainer.state.log_history, []
    folder = Path(trainer.args.output_dir)
    if is_of_this_run(folder / PICTURE):
        parts.append(f"![The run: its loss terms, rewards and KL over the steps]({PICTURE})")
    for prefix in _held_out(log, metrics):
        name = prefix.removeprefix("eval").strip("_")
        parts.append(_table(f"held out{f', {name}' if name else ''}", log, metrics, prefix))
    parts.append(_table("in training", log, metrics, ""))
    return "\n\n".join(filter(None, parts))


def _held_out(log: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> list[str]:
    """Return the prefix of each held-out set's metrics: "eval_", or "eval_<name>_" of several."""
    first = metrics[0].key
    keys = {key for line in log for key in line if key.startswith("eval_") and key.endswith(f"_{first}")}
    return sorted(key.removesuffix(first) for key in keys)


def _table(title: str, log: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], prefix: str) -> str:
    """Show each metric as first and last logged; a cell names its step if it is not its column's."""
    known = {metric: lines for metric in metrics if (lines := _lines(log, prefix + metric.key))}
    if not known:
        return ""
    steps = [line["step"] for lines in known.values() for line in lines]
    heads = (min(steps), max(steps))
    if heads[0] == heads[1]:
        rows = [f"| {title} | step {heads[0]} |", "|---|---:|"]
        return "\n".join([*rows, *(f"| {m.name} | {_cell(lines[-1], m, prefix)} |" for m, lines in known.items())])
    rows = [f"| {title} | step {heads[0]} | step {heads[1]} |", "|---|---:|---:|"]
    for metric, lines in known.items():
        cells = [
            _cell(line, metric, prefix) + ("" if line["step"] == head else f", step {line['step']}")
            for line, head in zip((lines[0], lines[-1]), heads, strict=True)
        ]
        rows.append(f"| {metric.name} | {' | '.join(cells if len(lines) > 1 else ['', cells[1]])} |")
    return "\n".join(rows)


def _lines(log: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [line for line in log if line.get(key) is not None and math.isfinite(line[key])]


def _cell(line: Mapping[str, Any], metric: Metric, prefix: str) -> str:
    """Return the value, with its 95% interval if one is logged."""
    if _is_of_ties(line, metric, prefix):
        return "all ties"
    key = prefix + metric.key
    value, half = metric.form.format(line[key]), line.get(f"{key}_ci95")
    if half is not None:
        return f"{value} ± {metric.form.format(half).lstrip('+')}"
    low, high = line.get(f"{key}_low"), line.get(f"{key}_high")
    if low is None or high is None:
        return value
    return f"{value} ({metric.form.format(low)} to {metric.form.format(high)})"


def _is_of_ties(line: Mapping[str, Any], metric: Metric, prefix: str) -> bool:
    """Return whether the metric depends on signs that say nothing, because all pairs are ties."""
    return metric.key in OF_SIGNS and is_tie({key.removeprefix(prefix): value for key, value in line.items()})


# ---- Metadata ----


def _complete_metadata(card: ModelCard, trainer: Any, training: Training, dataset_name: str | None) -> None:
    """Complete the card's YAML header, as huggingface_hub defines it."""
    data: Any = card.data
    is_adapter = is_peft_model(trainer.model)
    if "licence" in data.__dict__:  # TRL's placeholder, under a name that the hub does not know
        del data.licence
    data.license = data.license or _license_of(get_config_model_id(trainer.model.config))
    data.library_name = "peft" if is_adapter else data.library_name
    data.pipeline_tag = training.task
    data.tags = sorted(set(data.tags or ()) | {"trl-ext"})
    if data.base_model:
        data.base_model_relation = "adapter" if is_adapter else "finetune"
    log, data.model_name = trainer.state.log_history, card_name(trainer)
    results = []
    for prefix in _held_out(log, training.metrics):
        name = prefix.removeprefix("eval").strip("_")
        for metric in training.metrics:
            lines = _lines(log, prefix + metric.key)
            if lines and not _is_of_ties(lines[-1], metric, prefix):
                result = EvalResult(
                    task_type=training.task,
                    dataset_type=hub_name(dataset_name) or "own",
                    dataset_name=f"{without_place(dataset_name) or 'held-out rows'}{f', {name}' if name else ''}",
                    dataset_split="held out",
                    metric_type=metric.key,
                    metric_name=metric.name,
                    metric_value=round(float(lines[-1][prefix + metric.key]), 6),
                )
                results.append(result)
    data.eval_results = results or None


def _license_of(base: str | None) -> str | None:
    """Return the license that the base's own card names, if the card is on this machine."""
    if not base:
        return None
    card = Path(base) / FILE if Path(base).is_dir() else try_to_load_from_cache(base, FILE)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")


def loading_lines(auto_class: str, is_adapter: bool, *arguments: str) -> str:
    """Return Python lines that load the model, or the adapter with its base, and the tokenizer, from `folder`."""
    name, imports = auto_class, f"from transformers import {auto_class}, AutoTokenizer"
    if is_adapter:
        name = f"AutoPeft{auto_class.removeprefix('Auto')}"
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
    load = f"model = {name}.from_pretrained({', '.join(['folder', *arguments])})"
    return f"{imports}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained(folder)"
