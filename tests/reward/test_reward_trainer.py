"""Reward training looks at data and model first; accuracy is a share of all pairs, and what is left out is said."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import RewardConfig, RewardTrainer

import dpo_runs
import tiny
from cli_runs import flags
from reward_runs import reward_trainer
from trl_ext.cli.commands import reward
from trl_ext.cli.models import ModelArguments


@torch.no_grad()
def right_pairs(pairs):
    """How many pairs the untrained model orders right, one answer at a time."""
    model, tokenizer, right = tiny.tiny_reward_model(), tiny.tiny_tokenizer(), 0
    for row in pairs:
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        ids = [tokenizer(text if text.endswith("<eos>") else text + "<eos>")["input_ids"] for text in texts]
        chosen, rejected = (model(torch.tensor([each])).logits.item() for each in ids)
        right += chosen > rejected
    return right


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_is_the_share_of_all_pairs(tmp_path, capsys, seed):
    """Nine pairs in batches of eight and one; ten pairs in training, of which the last batch has two."""
    held_out, rows = dpo_runs.tiny_pairs(9, seed=seed), dpo_runs.tiny_pairs(10, seed=seed + 10)
    trainer = reward_trainer(tmp_path, rows, held_out)
    trainer.train()
    metrics = reward.evaluate(trainer)
    expected = right_pairs(held_out)
    assert metrics["eval_pairs"] == 9
    assert metrics["eval_accuracy"] == pytest.approx(expected / 9)
    line = next(line for line in trainer.state.log_history if "accuracy" in line)
    assert line["accuracy"] == pytest.approx(right_pairs(rows) / 10)
    reward.report(trainer, metrics, None, ModelArguments())
    assert f"in the right order: {expected / 9:.1%} of 9 " in capsys.readouterr().out


LONG = {"prompt": "the cat ", "chosen": "good " * 20, "rejected": "bad"}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_pairs_that_are_too_long_are_counted(tmp_path, caplog):
    rows = Dataset.from_list([*dpo_runs.tiny_pairs(8).to_list(), LONG])
    with caplog.at_level(logging.WARNING, "trl_ext"):
        trainer = reward_trainer(tmp_path, rows, rows, max_length=16)
    kept = len(trainer.train_dataset)
    assert kept < 9
    assert f"Left out {9 - kept} of 9 rows of the train dataset" in caplog.text
    assert f"Left out {9 - kept} of 9 rows of the eval dataset" in caplog.text
    assert trainer.evaluate()["eval_pairs"] == kept
    with pytest.raises(ValueError, match=r"In all 2 rows of the train dataset .*`max_length=16`.*Raise it"):
        reward_trainer(tmp_path, Dataset.from_list([LONG] * 2), rows, max_length=16)


def without_template():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def without_thoughts():
    tokenizer = tiny.tiny_tokenizer()
    of_it = "message['content']"
    tokenizer.chat_template = tokenizer.chat_template.replace(of_it, f"{of_it}.split('</think>')[-1]")
    return tokenizer


def chat(chosen="good", rejected="bad"):
    return {
        "prompt": [{"role": "user", "content": "why ?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


PAIR = {"prompt": "why ? ", "chosen": "good", "rejected": "bad"}
PARTS = [{"type": "text", "text": "good"}]
REFUSED = {  # name -> tokenizer, row, what the error says; `tests/data/test_rendering.py` has all of them
    "no pairs": (tiny.tiny_tokenizer, {"prompt": "why ?", "completion": "good"}, "no columns 'chosen' and 'rejected'"),
    "an empty cell": (tiny.tiny_tokenizer, PAIR | {"rejected": None}, "'rejected' of .* is empty in 1 of 5 rows"),
    "no template": (without_template, chat(), "no chat template"),
    "content in parts": (tiny.tiny_tokenizer, chat(PARTS, PARTS), "joins parts of text"),
    "thoughts that are cut off": (without_thoughts, chat("<think>so</think>good"), "leaves out a part of `chosen`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_trained_on_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, case):
    monkeypatch.setattr("trl.RewardTrainer.__init__", None)
    make, row, message = REFUSED[case]
    rows = Dataset.from_list([*[PAIR] * 4, row] if case == "an empty cell" else [row] * 5)
    for given in ((rows, None), (None, {"held_out": rows})):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            reward_trainer(tmp_path, *given, None, make())


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_rows_are_looked_at_as_the_trained_tokenizer_writes_them(tmp_path):
    """TRL sets the template of `chat_template_path` itself; rows of its own making have no text left to look at."""
    (tmp_path / "template.jinja").write_text(tiny.CHAT_TEMPLATE, encoding="utf-8")
    rows, template = Dataset.from_list([chat()] * 4), str(tmp_path / "template.jinja")
    made = reward_trainer(tmp_path, rows, None, tokenizer=without_template(), chat_template_path=template)
    assert reward_trainer(tmp_path, made.train_dataset.select_columns(["chosen_ids", "rejected_ids"]), None)
    (tmp_path / "template.jinja").write_text(without_thoughts().chat_template, encoding="utf-8")
    thought = Dataset.from_list([chat("<think>so</think>good")] * 4)
    with pytest.raises(ValueError, match="leaves out a part of `chosen`"):
        reward_trainer(tmp_path, thought, None, tokenizer=without_template(), chat_template_path=template)
    with pytest.raises(ValueError, match="cannot write row 0 of `eval`"):
        made.evaluate(Dataset.from_list([chat(PARTS, PARTS)] * 4))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_stream_of_which_no_pair_is_left_is_named(tmp_path):
    """It would end at once, with a loss of 0."""
    rows, stream = dpo_runs.tiny_pairs(4), Dataset.from_list([LONG] * 3).to_iterable_dataset()
    for given in ((stream, rows), (rows, stream)):
        with pytest.raises(ValueError, match=r"No row of the stream of (train|eval) rows is left: .*`max_length=16`"):
            reward_trainer(tmp_path, *given, max_length=16)
    reward_trainer(tmp_path, Dataset.from_list([LONG, *rows]).to_iterable_dataset(), None, max_length=16).train()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_run_looks_after_itself(tmp_path, caplog):
    """A log line for the last step, a name for trackio, a warning of steps that round away."""
    rows, model = dpo_runs.tiny_pairs(8), tiny.tiny_reward_model().to(torch.bfloat16)
    trainer = reward_trainer(tmp_path, rows, None, model, logging_steps=2, learning_rate=1e-7)
    assert "The weights of the reward model are trained in bfloat16" in caplog.text
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 3]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        reward_trainer(tmp_path / "file", rows, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"does not hold .* of the reward model's"):
        reward_trainer(tmp_path, rows, None, given={"optimizers": (optimizer, None)})


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_adapter_on_a_4_bit_base_gets_a_head_of_the_base_s_dtype(tmp_path, monkeypatch):
    """TRL makes the head bfloat16; the states that it reads are float32 here."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    tiny.tiny_reward_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    given = {"peft_config": lora, "quantization_config": nf4}
    path, rows = str(tmp_path / "model"), dpo_runs.tiny_pairs(8)
    trainer = reward_trainer(tmp_path, rows, rows, path, given=given, learning_rate=0.1, max_steps=1)
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters() if "score." in name}
    assert set(dtypes.values()) == {torch.float32}
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in trainer.model.modules())
    trainer.evaluate()
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


EACH = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_several_held_out_sets_are_logged_under_their_names_and_together(tmp_path):
    sets = {"a": dpo_runs.tiny_pairs(4, seed=4), "b": dpo_runs.tiny_pairs(6, seed=5)}
    right = {name: right_pairs(pairs) for name, pairs in sets.items()}
    assert right["a"] / 4 != right["b"] / 6
    metrics = reward_trainer(tmp_path, dpo_runs.tiny_pairs(4), sets).evaluate()
    for name, count in (("a", 4), ("b", 6)):
        assert metrics[f"eval_{name}_pairs"] == count
        assert metrics[f"eval_{name}_accuracy"] == pytest.approx(right[name] / count)
        alone = reward_trainer(tmp_path, dpo_runs.tiny_pairs(4), sets[name]).evaluate()
        for key in ("loss", "margin", "mean_reward"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], abs=1e-5)
    assert metrics["eval_pairs"] == 10
    assert metrics["eval_accuracy"] == pytest.approx(sum(right.values()) / 10)
    assert metrics["eval_loss"] == pytest.approx((4 * metrics["eval_a_loss"] + 6 * metrics["eval_b_loss"]) / 10)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", [None, "eval_accuracy", "eval_b_loss"])
def test_best_model_is_chosen_with_several_held_out_sets(tmp_path, metric):
    sets = {"a": dpo_runs.tiny_pairs(4, seed=4), "b": dpo_runs.tiny_pairs(6, seed=5)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 0.1}
    trainer = reward_trainer(tmp_path, dpo_runs.tiny_pairs(8), sets, **best, **EACH)
    trainer.train()
    key = metric or "eval_loss"
    values = [line[key] for line in trainer.state.log_history if key in line]
    assert len(values) == 3
    assert trainer.state.best_metric == (max if key == "eval_accuracy" else min)(values)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_unknown_metric_for_the_best_model_is_an_error_that_lists_the_known(tmp_path):
    rows = dpo_runs.tiny_pairs(8)
    trainer = reward_trainer(tmp_path, rows, rows, metric_for_best_model="zzz", **EACH)
    with pytest.raises(ValueError, match=r"`metric_for_best_model` is 'zzz', and an .* eval_accuracy, .* Set it to"):
        trainer.train()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_loss_of_a_resumed_run_is_of_the_whole_run(tmp_path):
    rows = dpo_runs.tiny_pairs(16)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2}
    whole = reward_trainer(tmp_path, rows, None, **options).train()
    resumed = reward_trainer(tmp_path, rows, None, **options).train(str(tmp_path / "checkpoint-2"))
    assert resumed.training_loss == resumed.metrics["train_loss"] == pytest.approx(whole.training_loss, rel=1e-4)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_loss_that_is_not_finite_stops_the_run_and_names_the_pair(tmp_path):
    model = tiny.tiny_reward_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.VOCABULARY.index("dull")] = float("nan")
    rows = [{"prompt": "the cat ", "chosen": word, "rejected": "bad"} for word in ("good one film", "dull")]
    trainer = reward_trainer(tmp_path, Dataset.from_list(rows), None, model=model)
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan after 0 .* scores nan \(chosen\) and .*cat dull <eos>'"
    ):
        trainer.train()


# --- beside TRL's trainer

SETTINGS = {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
SETTINGS |= {
    "disable_tqdm": True,
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "center_rewards_coefficient": 0.1,
}


def trained(trainer):
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.integration
@pytest.mark.parametrize("bf16, dtype", [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_reward_command_equals_trls_trainer(tmp_path, bf16, dtype):
    """The same losses and weights, in float32 and in 16 bits."""
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny.tiny_reward_model().save_pretrained(model)
    tiny.tiny_tokenizer().save_pretrained(model)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in dpo_runs.tiny_pairs(12)), encoding="utf-8")
    given = ["--model", str(model), "--dtype", dtype, "--dataset_name", str(pairs), "--test_size", "4"]
    data, options, args = reward.COMMAND.options(
        [*given, "--output_dir", str(tmp_path / "ours"), *flags(**SETTINGS, bf16=bf16, packing=False)]
    ).make()
    set_seed(args.seed)
    ours = reward.COMMAND.build(data, options, args)
    set_seed(args.seed)
    theirs = RewardTrainer(
        str(model),
        RewardConfig(str(tmp_path / "theirs"), bf16=bf16, model_init_kwargs={"dtype": dtype}, **SETTINGS),
        train_dataset=reward.load_pairs(data)["train"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    assert theirs.model.dtype == getattr(torch, dtype)
    (losses, weights), (expected, expected_weights) = trained(ours), trained(theirs)
    assert losses == expected
    assert len(losses) == 2
    assert all((weights[name] == each).all() for name, each in expected_weights.items())
