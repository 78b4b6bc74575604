"""`DPOTrainerX` from end to end: label smoothing, what it logs, evaluates and writes, and when it refuses to go on."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PromptTuningConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

import dpo_runs
import oracles
import tiny
from trl_ext import DPOTrainerX
from trl_ext.dpo import trainer as trainer_module


pytestmark = pytest.mark.integration

MARGINS = ("loss", "rewards/margins_", "logps/", "preference/", "kl/ref")
STAND_STILL = {"learning_rate": 0.0, "logging_steps": 1}


def losses(trainer):
    return [line["loss"] for line in dpo_runs.lines(trainer)]


def warnings_of(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name.startswith(("trl_ext.dpo", "trl_ext.packing"))
    ]


@pytest.fixture
def caplog(caplog):
    """transformers keeps its own handlers; the project's loggers propagate."""
    caplog.set_level(logging.WARNING, logger="trl_ext")
    return caplog


# Label smoothing


def slow_smoothed_loss(rows, beta, epsilon, score):
    """−(1 − ε) log σ(m) − ε log σ(−m), m = β (score of the chosen − score of the rejected), the mean over pairs."""
    total = 0.0
    for _, _, chosen, rejected, *_ in rows:
        p = oracles.sigmoid(beta * (score(chosen) - score(rejected)))
        total += -(1 - epsilon) * math.log(p) - epsilon * math.log(1 - p)
    return total / len(rows)


SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js_divergence": lambda x: math.log(2 * math.exp(x) / (math.exp(x) + 1)),
    "alpha_divergence": lambda x: (math.exp(x * (0.5 - 1)) - 1) / (0.5 - 1),
}


@pytest.mark.parametrize("divergence", SCORES)
def test_label_smoothing_is_conservative_dpo(tmp_path, divergence):
    options = {"label_smoothing": 0.2, "f_divergence_type": divergence, "max_steps": 1}
    trainer = dpo_runs.dpo_run(tmp_path, per_device_train_batch_size=8, **options, **STAND_STILL)
    rows = dpo_runs.slow_rows(trainer, trainer.train_dataset, dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1))
    expected = slow_smoothed_loss(rows, 0.1, 0.2, SCORES[divergence])
    # The log rounds nothing: float32 sums of some ten terms.
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_weighs_with_the_sigmoid_loss(tmp_path):
    """Of two losses only the sigmoid one is smoothed here, by its weight."""
    mixed = {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.5, 3.0], "max_steps": 1} | STAND_STILL
    plain = losses(dpo_runs.dpo_run(tmp_path, **mixed))[0]
    smoothed = losses(dpo_runs.dpo_run(tmp_path, **mixed, label_smoothing=0.1))[0]
    alone = [losses(dpo_runs.dpo_run(tmp_path, max_steps=1, label_smoothing=e, **STAND_STILL))[0] for e in (0.0, 0.1)]
    assert smoothed - plain == pytest.approx(3 * (alone[1] - alone[0]), rel=1e-4)


# When things are wrong: the arguments


def test_config_of_trl_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="`args` is a DPOConfig; DPOTrainerX needs a `DPOConfigX`"):
        dpo_runs.dpo_trainer(tmp_path, side=(DPOTrainerX, DPOConfig))


def test_no_config_names_the_folder_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = dpo_runs.tiny_model()
    model.config._name_or_path = "somewhere/tiny/"
    # TRL's defaults ask for a GPU.
    monkeypatch.setattr(trainer_module, "DPOConfigX", dpo_runs.dpo_config)
    arguments = {"processing_class": tiny.tiny_tokenizer(), "train_dataset": dpo_runs.tiny_pairs()}
    trainer = DPOTrainerX(model, dpo_runs.tiny_model(seed=1), **arguments)
    assert trainer.args.output_dir == "tiny-DPO"


def test_reference_that_is_not_finite_is_named(tmp_path):
    reference = dpo_runs.tiny_model(seed=1)
    reference.model.norm.weight.data.fill_(torch.nan)
    trainer = dpo_runs.dpo_trainer(tmp_path, {"ref_model": reference})
    with pytest.raises(FloatingPointError, match=r"it is the reference that gives others. It does not learn") as error:
        trainer.train()
    assert "learning rate" not in str(error.value)


def test_generation_needs_a_reference_that_is_kept(tmp_path):
    with pytest.raises(ValueError, match=r"with `precompute_ref_log_probs` no\s+reference is kept"):
        dpo_runs.dpo_trainer(tmp_path, {"ref_model": None}, generate_during_eval=True, precompute_ref_log_probs=True)


# When things are wrong: the data


def pairs_with(rows=None, **columns):
    """Eight good rows, of which all or `rows` have other columns. A column of `None` alone is left out."""
    good = dpo_runs.tiny_pairs().to_list()
    rows = range(8) if rows is None else rows
    changed = [row | (columns if i in rows else {}) for i, row in enumerate(good)]
    names = [name for name in changed[0] if any(row.get(name) is not None for row in changed)]
    return Dataset.from_list([{name: row[name] for name in names} for row in changed])


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "data, message",
    [
        (pairs_with(rejected=None, bad="cat"), r"no column 'rejected'; its columns .*`--columns rejected=bad`, in P"),
        (pairs_with(rejected=None, chosen=None, text="cat"), r"has no columns 'chosen' and 'rejected'"),
        (pairs_with(chosen=3), r"The column 'chosen' of .* holds int \(3\); it must hold text, or a conversation"),
        (pairs_with(prompt=["the", "cat"]), r"The column 'prompt' of .* holds list \(\['the', 'cat'\]\)"),
        (
            pairs_with(prompt=dpo_runs.said("user", "the cat")),
            r"\['chosen', 'rejected'\] hold text and \['prompt'\] conversations; they must be of one kind",
        ),
        *(
            (pairs_with({5, 7}, **{name: None}), f"The column '{name}' .* is empty in 2 of 8 rows, the first is row 5")
            for name in ("prompt", "chosen", "rejected")
        ),
        (
            Dataset.from_list([{"chosen": dpo_runs.said("assistant", "good"), "rejected": []}] * 2),
            "The column 'rejected' of .* holds list",
        ),
        (dpo_runs.tiny_pairs().select([]), "has no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_column_error_names_what_was_found_and_needed(tmp_path, split, data, message):
    with pytest.raises(ValueError, match=message) as error:
        dpo_runs.dpo_trainer(tmp_path, {split: data})
    assert f"`{split}`" in str(error.value)


def test_column_error_comes_before_a_model_is_loaded(tmp_path):
    """The folder does not exist; the data is what is complained of. In a dict, the split is named."""
    models = {"model": "no/such/folder", "eval_dataset": {"held out": pairs_with(chosen=None)}}
    with pytest.raises(ValueError, match="`held out` has no column 'chosen'"):
        dpo_runs.dpo_trainer(tmp_path, models)


EQUAL = "`chosen` equals `rejected`."
AS_TEXT = dpo_runs.tiny_pairs().to_list()
DROPPED = {
    "text": (AS_TEXT, {0, 5}, {"rejected": "cat", "chosen": "cat"}, EQUAL),
    "conversations": (
        dpo_runs.tiny_chats().to_list(),
        {2},
        dict.fromkeys(("chosen", "rejected"), dpo_runs.said("assistant", "cat")),
        EQUAL,
    ),
    "tokens": (
        AS_TEXT,
        {4},
        {"chosen": "good", "rejected": "good <eos>"},
        "`chosen` and `rejected` have the same tok",
    ),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_equal_pairs_are_counted_dropped_and_never_trained_on(tmp_path, kind, caplog):
    good, where, columns, why = DROPPED[kind]
    rows = [row | (columns if i in where else {}) for i, row in enumerate(good)]
    last = max(where)
    models = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[last:])}
    trainer = dpo_runs.dpo_trainer(tmp_path, models)
    assert trainer.train_dataset["prompt"] == [row["prompt"] for i, row in enumerate(rows) if i not in where]
    assert len(trainer.eval_dataset) == 8 - last - 1
    for dropped, of, split in ((len(where), 8, "train"), (1, 8 - last, "eval")):
        begins = f"Dropped {dropped} of {of} rows of the {split} dataset: {why}"
        assert any(said.startswith(begins) for said in warnings_of(caplog)), warnings_of(caplog)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_that_are_cut_before_they_differ_are_dropped(tmp_path, caplog, mode):
    common = "the cat is good and the dog is"
    rows = [
        {"prompt": "why ", "chosen": f"{common} bad", "rejected": f"{common} funny"},
        {"prompt": "why ", "chosen": f"good {common} {common}", "rejected": f"bad {common} {common}"},
    ]
    options = {"max_length": 8, "truncation_mode": mode}
    kept, dropped = rows[::-1] if mode == "keep_start" else rows
    trainer = dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list(rows)}, **options)
    assert [text.removesuffix("<eos>") for text in trainer.train_dataset["chosen"]] == [kept["chosen"]]
    assert any("the same tokens within `max_length=8`" in said for said in warnings_of(caplog))
    with pytest.raises(ValueError, match=r"In all 1 rows .* the same tokens within .* Raise `max_length`"):
        dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list([dropped])}, **options)


def test_equal_pairs_of_a_stream_are_never_trained_on_and_it_says_so(tmp_path, caplog):
    rows = dpo_runs.tiny_pairs().to_list()
    equal = [row | {"rejected": row["chosen"]} for row in rows]
    mixed = Dataset.from_list([row for pair in zip(rows, equal, strict=True) for row in pair])
    streams = [data.to_iterable_dataset() for data in (mixed, Dataset.from_list(rows))]
    with caplog.at_level("INFO", logger="trl_ext"):
        first, second = (losses(dpo_runs.dpo_run(tmp_path, {"train_dataset": stream})) for stream in streams)
    assert first == second
    assert "Rows of the train dataset whose `chosen` equals `rejected` are dropped as they come." in caplog.text


def test_dataset_of_equal_pairs_alone_is_refused(tmp_path):
    data = pairs_with(chosen="cat", rejected="cat")
    with pytest.raises(ValueError, match="In all 8 rows of the train dataset `chosen` equals `rejected`"):
        dpo_runs.dpo_trainer(tmp_path, {"train_dataset": data})


def test_completion_of_no_tokens_is_refused_and_counted(tmp_path):
    """With a template that renders no eos, an empty answer leaves nothing to score."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    rows = dpo_runs.tiny_chats().to_list()
    for i in (4, 6):
        rows[i]["rejected"] = dpo_runs.said("assistant", "")
    with pytest.raises(ValueError, match=r"3 of 8 rows of the train dataset have a completion of no tokens, .* row 2"):
        dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer})


def test_prompts_that_fill_the_length_are_counted_and_dropped(tmp_path, caplog):
    rows = dpo_runs.tiny_pairs(prompt=(2, 4)).to_list()
    for i in (1, 6, 7):
        rows[i]["prompt"] = "the cat and the dog of the old house "
    trainer = dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list(rows)}, max_length=8)
    assert len(trainer.train_dataset) == 4  # and one is cut before its completions differ
    assert "Dropped 3 of 8 rows of the train dataset: their prompts fill `max_length=8`." in warnings_of(caplog)
    with pytest.raises(ValueError, match=r"prompts of all 8 rows .* at least `max_length=2` tokens"):
        dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list(rows)}, max_length=2)


def test_sequences_beyond_the_context_are_counted_before_training(tmp_path):
    data = dpo_runs.tiny_pairs()
    models = {"model": dpo_runs.tiny_model(max_position_embeddings=12), "train_dataset": data}
    tokenizer = tiny.tiny_tokenizer()
    too_long = sum(
        len(tokenizer(row["prompt"])["input_ids"])
        + 1
        + max(len(tokenizer(row[side].removesuffix("<eos>"))["input_ids"]) for side in ("chosen", "rejected"))
        > 12
        for row in data
    )
    assert 0 < too_long < 8
    with pytest.raises(ValueError, match=rf"{too_long} of 8 rows .* context of\s+12 tokens. Set `max_length`"):
        dpo_runs.dpo_trainer(tmp_path, models)
    assert dpo_runs.dpo_trainer(
        tmp_path, models | {"model": dpo_runs.tiny_model(max_position_embeddings=12)}, max_length=12
    )


def test_pad_that_is_the_eos_changes_no_loss(tmp_path):
    """The eos after a completion counts, the same id as padding does not."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    distinct = dpo_runs.dpo_run(tmp_path, {"processing_class": tiny.tiny_tokenizer()})
    same = dpo_runs.dpo_run(tmp_path, {"processing_class": tokenizer})
    assert same.data_collator.collator.pad_token_id == tokenizer.eos_token_id == 2
    assert losses(same) == pytest.approx(losses(distinct), rel=1e-6)
    assert dpo_runs.lines(same)[0]["logps/chosen"] == pytest.approx(dpo_runs.lines(distinct)[0]["logps/chosen"])


class Break(TrainerCallback):
    """Sets the actor's embedding of a word to NaN before a step."""

    def __init__(self, word, step):
        self.token, self.step = tiny.VOCABULARY.index(word), step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.get_input_embeddings().weight.data[self.token] = math.nan


def test_loss_that_is_not_finite_stops_the_run_and_names_step_and_pair(tmp_path):
    """One pair of the batch holds the word whose embedding breaks. Of what it broke, nothing is saved."""
    rows = [{"prompt": f"the {word} ", "chosen": "good", "rejected": "bad"} for word in ("cat", "dog", "bird", "fish")]
    models = {"train_dataset": Dataset.from_list(rows), "callbacks": [Break("bird", 2)]}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    with pytest.raises(FloatingPointError, match="loss is nan after 2 optimizer steps") as error:
        dpo_runs.dpo_run(tmp_path, models, **options)
    assert "Pair 2 of the batch" in str(error.value)
    assert "'the bird good" in str(error.value)
    assert {path.name for path in Path(tmp_path).glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not list(Path(tmp_path).glob("*.safetensors"))


# Why prefixes are not shared: one line each, and TRL's numbers


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 6}


UNSHARED = r"Rows are padded for the actor, not packed: "
REASONS = {
    "dropout": (
        {"model": lambda: dpo_runs.tiny_model(attention_dropout=0.3)},
        {"disable_dropout": False},
        UNSHARED + r"dropout is active \(`disable_dropout=False`\)",
    ),
    "prompt tuning": (
        {"ref_model": None, "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
        {},
        UNSHARED + "PROMPT_TUNING puts virtual tokens before every row",
    ),
    "activated adapter": (
        {"ref_model": None, "peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, alora_invocation_tokens=[20])},
        {},
        UNSHARED + "an activated LoRA looks for its invocation tokens",
    ),
    "alibi": ({"model": lambda: dpo_runs.tiny_model("bloom")}, {}, UNSHARED + "BloomForCausalLM "),
    "rotary embedding": (
        {"model": lambda: dpo_runs.tiny_model(rope_parameters=DYNAMIC)},
        {"max_length": None},
        r"Rows of the actor are packed in batches whose sequences have at most 6 tokens.*rope_parameters",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_log_says_why_prefixes_are_not_shared_and_the_numbers_are_trls(tmp_path, case, caplog):
    models, options, reason = REASONS[case]
    results = []
    for side in (dpo_runs.OURS, dpo_runs.TRLS):
        made = {key: value() if callable(value) else value for key, value in models.items()}
        trainer = dpo_runs.dpo_trainer(tmp_path, made, side, **options)
        trainer.train()
        results.append(losses(trainer))
    assert len([line for line in warnings_of(caplog) if re.match(reason, line)]) == 1, warnings_of(caplog)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_torch_compile_compiles_nothing_anew_in_every_step(tmp_path, caplog):
    """Batches of other lengths; TRL's numbers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = dpo_runs.dpo_run(tmp_path / "compiled", max_steps=4, **options)
    assert torch._dynamo.utils.counters["frames"]["total"] <= 2  # the wrapper of either model
    assert losses(compiled) == losses(dpo_runs.dpo_run(tmp_path / "plain", max_steps=4))
    assert any("`torch_compile` compiles nothing here" in line for line in warnings_of(caplog))


OF_THE_MACHINE = ("tokens_per_second", "time/", "memory/")


@pytest.mark.parametrize("adapter", [False, True])
def test_packing_changes_the_rows_and_no_number(tmp_path, adapter, caplog):
    """A batch of four pairs is one row, also under PEFT, whose call names what it does not pass; nothing is said."""
    logs, shapes = [], {True: [], False: []}
    for packing, seen in shapes.items():
        lora = LoraConfig(r=2, task_type="CAUSAL_LM")
        models = {"ref_model": None, "peft_config": lora} if adapter else {}
        trainer = dpo_runs.dpo_trainer(tmp_path, models, packing=packing)
        assert not warnings_of(caplog)
        embedding = trainer.model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0].shape))
        trainer.train()
        lines = dpo_runs.lines(trainer)
        logs.append([{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines])
    assert {rows for rows, _ in shapes[True]} == {1}
    assert {rows for rows, _ in shapes[False]} == {8}
    assert all(p.numel() < q.numel() for p, q in zip(shapes[True], shapes[False], strict=True))
    for mine, theirs in zip(*logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


# What is logged


def assert_ledger(line, expected, prefix=""):
    got = {key: line[prefix + key] for key in expected}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("ref, accumulation", [("given", 1), ("given", 2), ("precomputed", 2), ("adapter off", 2)])
def test_metrics_of_a_logging_window_speak_of_all_its_pairs(tmp_path, ref, accumulation):
    """Eight pairs in four micro-batches, logged once; and ten held-out ones, the last batch with two."""
    models, reference = {"eval_dataset": dpo_runs.tiny_pairs(10, seed=4)}, dpo_runs.tiny_model(seed=1)
    if ref == "adapter off":
        reference = dpo_runs.tiny_model()
        models |= {"ref_model": None, "model": dpo_runs.tiny_model()}
        models["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    sizes |= {"max_steps": 4 // accumulation, "logging_steps": 4 // accumulation, "learning_rate": 0.0}
    trainer = dpo_runs.dpo_trainer(tmp_path, models, precompute_ref_log_probs=ref == "precomputed", **sizes)
    with dpo_runs.not_at_the_start():
        trainer.train()
    trainer.evaluate()
    (line,), (held_out,) = dpo_runs.lines(trainer), dpo_runs.lines(trainer, "eval_loss")
    actor = trainer.model.eval()
    expected = [
        dpo_runs.slow_rows(trainer, data, actor, reference) for data in (trainer.train_dataset, trainer.eval_dataset)
    ]
    assert any(row[0] != row[1] for row in expected[0])
    assert_ledger(line, oracles.preference_metrics(expected[0]))
    assert_ledger(held_out, oracles.preference_metrics(expected[1]), "eval_")
    assert line["preference/pairs"] == 8
    assert held_out["eval_preference/pairs"] == 10


def test_metrics_with_ld_alpha_are_those_of_the_loss(tmp_path):
    """Tokens beyond the shorter completion count α in the log-ratios too, as in TRL's rewards."""
    trainer = dpo_runs.dpo_run(tmp_path, ld_alpha=0.3, **STAND_STILL)
    for line in dpo_runs.lines(trainer):
        assert line["logps/chosen_drift"] == pytest.approx(line["rewards/chosen"] / trainer.beta, rel=1e-5)
        assert line["logps/rejected_drift"] == pytest.approx(line["rewards/rejected"] / trainer.beta, rel=1e-5)


@pytest.mark.parametrize("reference", ["given", "adapter off"])
def test_policy_and_reference_are_told_apart_in_whatever_order_they_are_asked(tmp_path, reference, monkeypatch):
    """TRL asks the policy first; here the reference is asked before it, too."""
    compute = DPOTrainer._compute_loss

    def reference_first(self, model, inputs, return_outputs):
        self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        return compute(self, model, inputs, return_outputs)

    runs = []
    for _ in range(2):
        adapter = {"model": dpo_runs.with_adapter(dpo_runs.tiny_model()), "ref_model": None}
        with dpo_runs.not_at_the_start():
            trainer = dpo_runs.dpo_run(tmp_path, adapter if reference == "adapter off" else {})
        runs.append([{k: v for k, v in line.items() if k.startswith(MARGINS)} for line in dpo_runs.lines(trainer)])
        monkeypatch.setattr(DPOTrainer, "_compute_loss", reference_first)
    assert all(len(line) > 5 for line in runs[0])
    assert runs[0] == runs[1]


def with_sources(data):
    return data.add_column("source", [("books", "films")[i % 3 == 0] for i in range(len(data))])


@pytest.mark.parametrize("precomputed", [False, True])
def test_accuracy_is_logged_for_each_source(tmp_path, precomputed):
    train, held_out = with_sources(dpo_runs.tiny_pairs()), with_sources(dpo_runs.tiny_pairs(10, seed=4))
    models = {"train_dataset": train, "eval_dataset": held_out}
    options = {"precompute_ref_log_probs": precomputed, "learning_rate": 0.0, "logging_steps": 2}
    trainer = dpo_runs.dpo_run(tmp_path, models, **options)
    trainer.evaluate()
    actor, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    found = dpo_runs.lines(trainer)[0], dpo_runs.lines(trainer, "eval_loss")[0]
    for line, prefix, data in zip(found, ("", "eval_"), (trainer.train_dataset, trainer.eval_dataset), strict=True):
        rows = dpo_runs.slow_rows(trainer, data, actor, reference)
        for source in ("books", "films"):
            own = [good > bad for (good, bad, *_), name in zip(rows, data["source"], strict=True) if name == source]
            assert line[f"{prefix}preference/accuracy/{source}"] == pytest.approx(sum(own) / len(own))


# Evaluation


@pytest.mark.parametrize(
    "held_out, more",
    [
        ("one", {"eval_on_start": True}),
        ("one", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
        ("one", {}),
        ("several", {}),
    ],
    ids=str,
)
def test_unknown_metric_for_the_best_model_is_an_error_that_lists_the_known(tmp_path, held_out, more):
    pairs = dpo_runs.tiny_pairs(4, seed=4)
    models = {"eval_dataset": pairs if held_out == "one" else {"a": pairs, "b": pairs}}
    each = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "zzz", **more}
    trainer = dpo_runs.dpo_trainer(tmp_path, models, **each)
    with pytest.raises(ValueError, match=r"`metric_for_best_model`.* '(eval_)?zzz'.*eval_loss"):
        trainer.train()
    assert trainer.state.global_step == (0 if "eval_on_start" in more else 1)


def greedy(model, prompt, tokens):
    """The most probable continuation, token by token, without a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == 2:
            break
    return tiny.tiny_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("reference", ["given", "adapter off", "adapter ref"])
def test_evaluation_shows_completions_of_actor_and_reference(tmp_path, reference, capsys):
    held_out = dpo_runs.tiny_pairs(5, seed=4)
    models, of_reference = {"eval_dataset": held_out}, dpo_runs.tiny_model(seed=1)
    if reference == "adapter off":
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        models |= {"ref_model": None, "peft_config": lora}
        of_reference = dpo_runs.tiny_model()
    elif reference == "adapter ref":
        models |= {"ref_model": None, "model": dpo_runs.with_adapter(dpo_runs.tiny_model())}
        of_reference = dpo_runs.with_adapter(dpo_runs.tiny_model())
    options = {"generate_during_eval": True, "num_eval_samples": 3, "eval_max_new_tokens": 6, "learning_rate": 0.5}
    with dpo_runs.not_at_the_start():
        trainer = dpo_runs.dpo_run(tmp_path, models, eval_strategy="steps", eval_steps=1, **options)
    files = sorted((tmp_path / "completions").glob("*.jsonl"))
    assert [path.name for path in files] == ["eval_step_00001.jsonl", "eval_step_00002.jsonl"]
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    prompts = trainer.eval_dataset["prompt_ids"][:3]
    actor = trainer.model.eval()
    assert [row["prompt"] for row in rows] == [row["prompt"].strip() for row in held_out.to_list()[:3]]
    assert [row["reference"] for row in rows] == [greedy(of_reference.eval(), prompt, 6) for prompt in prompts]
    assert [row["actor"] for row in rows] == [greedy(actor, prompt, 6) for prompt in prompts]
    assert rows[0]["actor"] != rows[0]["reference"]
    assert "held-out prompts, actor and reference" in capsys.readouterr().out


@pytest.mark.parametrize("by_hand", [False, True])
def test_several_held_out_sets_are_evaluated_and_completed_each_under_its_name(tmp_path, by_hand):
    """TRL has one name for all of them."""
    held_out = {"one": dpo_runs.tiny_pairs(5, seed=4), "b/c": dpo_runs.tiny_pairs(6, seed=5)}
    options = {"generate_during_eval": True, "eval_max_new_tokens": 2, "num_eval_samples": 1}
    trainer = dpo_runs.dpo_trainer(tmp_path, {} if by_hand else {"eval_dataset": held_out}, **options)
    metrics = trainer.evaluate(held_out if by_hand else None)
    assert len(list((tmp_path / "completions").iterdir())) == 2
    for name, pairs in held_out.items():
        label = f"eval_{name.replace('/', '_')}_step_00000"
        (row,) = (tmp_path / "completions" / f"{label}.jsonl").read_text().splitlines()
        assert json.loads(row)["prompt"] == pairs[0]["prompt"].strip()
        alone = trainer.evaluate(pairs)
        assert metrics[f"eval_{name}_preference/pairs"] == len(pairs)
        for key in ("rewards/accuracies", "preference/accuracy", "kl/ref", "loss"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"])


@pytest.mark.parametrize("by_hand", [False, True])
def test_metrics_of_several_held_out_sets_together_are_those_of_one_set_of_all(tmp_path, by_hand):
    """Under the names that docs and the Trainer's options know."""
    parts = [dpo_runs.tiny_pairs(size, seed=seed) for size, seed in ((4, 4), (8, 5), (6, 6))]
    parts = [part.add_column("source", [str(i % 2) for i in range(len(part))]) for part in parts]
    held_out = dict(zip("abc", parts, strict=True))
    whole = dpo_runs.dpo_trainer(tmp_path, per_device_eval_batch_size=2).evaluate(concatenate_datasets(parts))
    models = {} if by_hand else {"eval_dataset": held_out}
    trainer = dpo_runs.dpo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(held_out if by_hand else None)
    of_the_run = ("runtime", "_per_second", "memory/", "num_tokens", "model_preparation_time", "epoch")
    expected = {key: value for key, value in whole.items() if not any(part in key for part in of_the_run)}
    assert "eval_rewards/accuracies" in expected
    assert "eval_preference/accuracy/1" in expected
    # Logits are TRL's means over the tokens of a batch, accuracies over its pairs.
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # A line for each set, as TRL has them, the last of which is that of all, too.
    lines = trainer.state.log_history
    assert [[name for name in "abc" if f"eval_{name}_loss" in line] for line in lines] == [["a"], ["b"], ["c"]]
    assert ["eval_loss" in line for line in lines] == [False, False, True]
    assert lines[-1]["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("metric", ["eval_rewards/accuracies", "eval_b_rewards/margins", None])
def test_best_model_is_kept_also_with_several_held_out_sets(tmp_path, several, metric):
    class Told(TrainerCallback):
        heard: list[dict] = []

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.heard.append(metrics)

    told, pairs = Told(), {"a": dpo_runs.tiny_pairs(4, seed=4), "b": dpo_runs.tiny_pairs(4, seed=5)}
    metric = metric if several or metric is None else metric.replace("_b_", "_")
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 0.5}
    models = {"eval_dataset": pairs if several else pairs["a"], "callbacks": [told]}
    trainer = dpo_runs.dpo_run(tmp_path, models, **each, **best)
    values = [heard[metric or "eval_loss"] for heard in told.heard if (metric or "eval_loss") in heard]
    assert len(values) == 3
    choose = min if metric in (None, "eval_loss") else max
    assert trainer.state.best_metric == choose(values)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{1 + values.index(choose(values))}")


def test_pairs_without_a_prompt_are_left_out_of_the_completions(tmp_path, caplog):
    rows = dpo_runs.tiny_pairs(6, seed=4).to_list()
    rows[0]["prompt"] = ""
    models = {"eval_dataset": Dataset.from_list(rows)}
    options = {"generate_during_eval": True, "eval_max_new_tokens": 2, "num_eval_samples": 2}
    dpo_runs.dpo_trainer(tmp_path, models, **options).evaluate()
    lines = (tmp_path / "completions" / "eval_step_00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [row["prompt"].strip() for row in rows[1:3]]
    models["eval_dataset"] = Dataset.from_list([row | {"prompt": ""} for row in rows])
    dpo_runs.dpo_trainer(tmp_path / "none", models, **options).evaluate()
    assert any("No held-out pair has a prompt" in said for said in warnings_of(caplog))


# Streams and interruptions


def test_stream_is_trained_on_as_trl_does(tmp_path):
    results = []
    for side in (dpo_runs.OURS, dpo_runs.TRLS):
        stream = with_sources(dpo_runs.tiny_pairs()).to_iterable_dataset()
        trainer = dpo_runs.dpo_trainer(tmp_path, {"train_dataset": stream, "eval_dataset": stream}, side)
        trainer.train()
        trainer.evaluate()
        results.append([*losses(trainer), dpo_runs.lines(trainer, "eval_loss")[0]["eval_loss"]])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["whole", "adapter", "mixture of experts", "a reference that follows"])
def test_interrupted_run_resumes_and_gives_the_same_losses(tmp_path, kind):
    def models():
        if kind == "adapter":
            return {"ref_model": None, "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")}
        return {"model": tiny.tiny_mixture(output_router_logits=False)} if kind == "mixture of experts" else {}

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    if kind == "a reference that follows":
        options |= {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}
    whole = dpo_runs.dpo_run(tmp_path / "whole", models(), **options)
    with pytest.raises(KeyboardInterrupt):
        dpo_runs.dpo_run(tmp_path / "cut", models() | {"callbacks": [Interrupt()]}, **options)
    resumed = dpo_runs.dpo_trainer(tmp_path / "cut", models(), **options)
    output = resumed.train(resume_from_checkpoint=True)
    of_all = sum(line["loss"] for line in dpo_runs.lines(whole)) / 6
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(of_all, rel=1e-5)
    for key in (
        "loss",
        "rewards/margins",
        "preference/gradient_weight",
        "logps/chosen_drift",
        "grad_norm",
        "num_tokens",
    ):
        expected = [line[key] for line in dpo_runs.lines(whole)]
        assert [line[key] for line in dpo_runs.lines(resumed)] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_run_whose_reference_followed_is_not_resumed_without_it(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_strategy": "steps", "save_steps": 1}
    dpo_runs.dpo_run(tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-1" / "ref_model")
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()  # as in a run that had no reference of its own to save
    with pytest.raises(ValueError, match=r"checkpoint-1/ref_model is not there.*`sync_ref_model`"):
        dpo_runs.dpo_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_closing_line_of_a_mixture_has_the_auxiliary_loss_as_trl_s_has(tmp_path, strategy):
    closing = []
    for side in (dpo_runs.OURS, dpo_runs.TRLS):
        trainer = dpo_runs.dpo_trainer(
            tmp_path, {"model": tiny.tiny_mixture()}, side, logging_steps=10, logging_strategy=strategy
        )
        trainer.train()
        closing.append(trainer.state.log_history[-1])
    assert "train_loss" in closing[0]
    assert closing[0]["aux_loss"] == pytest.approx(closing[1]["aux_loss"], rel=1e-5)


def test_best_model_of_a_mixture_has_its_experts(tmp_path):
    trainer = dpo_runs.dpo_trainer(tmp_path, {"model": tiny.tiny_mixture(output_router_logits=False)})
    best = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, best[name]), name


class StopAtAnEvaluation(TrainerCallback):
    """As `EarlyStoppingCallback` does; the model is in evaluation mode then."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize("ended_by", ["max_steps", "an evaluation of the last step", "a callback"])
def test_steps_after_the_last_full_window_are_logged_once(tmp_path, ended_by):
    models, options = {}, {"max_steps": 4, "lr_scheduler_type": "constant"}
    each = dpo_runs.lines(dpo_runs.dpo_run(tmp_path / "each", **options))
    if ended_by != "max_steps":
        models["eval_dataset"] = dpo_runs.tiny_pairs(4, seed=2)
        options |= {"eval_strategy": "steps", "eval_steps": 4}
    if ended_by == "a callback":
        models["callbacks"] = [StopAtAnEvaluation()]
        options["max_steps"] = 8
    trainer = dpo_runs.dpo_run(tmp_path, models, logging_steps=3, **options)
    log, lines = trainer.state.log_history, dpo_runs.lines(trainer)
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[-1]["preference/pairs"] == 4
    assert lines[0]["preference/pairs"] == 12
    for key in ("loss", "rewards/margins", "preference/accuracy", "logps/chosen_drift", "kl/ref", "grad_norm"):
        assert lines[-1][key] == pytest.approx(each[3][key], rel=1e-4), key
    assert "train_runtime" in log[-1]
    assert not log[-1].keys() & lines[-1].keys() - {"step", "epoch"}
    evaluations = [line for line in log if "eval_loss" in line]
    assert len(evaluations) == (ended_by != "max_steps")
    if ended_by == "an evaluation of the last step":  # a checkpoint of that step has the line too
        assert log.index(lines[-1]) < log.index(evaluations[0])
