"""Pairs in packed rows against TRL's trainer: the same losses, gradients and metrics; mistakes that this notices."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import dpo_runs
import tiny
from trl_ext import RewardConfigX, RewardTrainerX
from trl_ext.packing import segments
from trl_ext.packing.forward import PackedForward
from trl_ext.packing.scores import PackedScores
from trl_ext.packing.segments import PackedRows, Segment


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "sliding_window": 6},
}
NOT_GPT2 = ("num_", "hidden_size", "intermediate_size", "max_position")
MARGINS = [0.3, 0.0, 1.0, 0.5, 0.1, 0.2, 0.0, 0.7]


def model_of(family, **options):
    sizes = {k: v for k, v in dpo_runs.SIZES.items() if family != "gpt2" or not k.startswith(NOT_GPT2)}
    config = AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, {}) | {"num_labels": 1} | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = "eager" if family == "gemma2" else None
        return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).float().eval()


def pairs():
    """Among them: one sequence that goes on where the other ends, one end token alone, no common beginning."""
    rows = dpo_runs.tiny_pairs(8).to_list()
    for side, text in (("chosen", "good dog"), ("rejected", "the cat was bad")):
        rows[4][side] = text
    return Dataset.from_list([row | {"margin": margin} for row, margin in zip(rows, MARGINS, strict=True)])


def trainer_of(folder, side=(RewardTrainerX, RewardConfigX), model=None, given=None, **options):
    """Two steps of plain gradient descent on batches of four pairs."""
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2, "logging_steps": 1}
    defaults |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "center_rewards_coefficient": 0.1}
    defaults |= {"bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer_class, config_class = side
    return trainer_class(
        model_of("llama") if model is None else model,
        config_class(str(folder), **(defaults | options)),
        train_dataset=pairs(),
        eval_dataset=pairs(),
        processing_class=tiny.tiny_tokenizer(),
        **(given or {}),
    )


def run(*args, **options):
    """Train and evaluate; returns the log lines, and the gradients of both steps."""
    trainer, kept = trainer_of(*args, **options), dpo_runs.KeepGradients()
    trainer.add_callback(kept)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history, kept.steps


def trls(folder, *args, **options):
    return run(folder, (RewardTrainer, RewardConfig), *args, **options)


def assert_same(one, other, tolerance=1e-5):
    (lines, gradients), (other_lines, other_gradients) = one, other
    assert len(gradients) == len(other_gradients) == 2
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line.keys() - {"eval_pairs"} == other_line.keys()
        for name, value in other_line.items():
            if not any(word in name for word in ("runtime", "per_second", "total_flos")):
                assert line[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for step, other_step in zip(gradients, other_gradients, strict=True):
        assert dpo_runs.gradient_difference(step, other_step) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pairs_train_as_trls_trainer_does(tmp_path, packed_calls, caplog, family):
    ours = run(tmp_path / "ours", model=model_of(family))
    assert "Rows" not in caplog.text
    assert len(packed_calls) == 4  # two steps and two batches of the evaluation
    assert all(len(rows.rows) == 1 for rows in packed_calls)
    assert_same(ours, trls(tmp_path / "trls", model=model_of(family)))


WITH = {
    "bf16": {"bf16": True},
    "gradient checkpointing off": {"gradient_checkpointing": False},
    "a multiple of tokens": {"pad_to_multiple_of": 8},
    "LoRA": {},
}


@pytest.mark.parametrize("case", WITH)
def test_packed_pairs_train_the_same_with(tmp_path, packed_calls, case):
    def given():
        lora = LoraConfig(r=2, init_lora_weights=False, modules_to_save=["score"], task_type="SEQ_CLS")
        return {"peft_config": lora} if case == "LoRA" else {}

    ours = run(tmp_path / "ours", given=given(), **WITH[case])
    assert len(packed_calls) == 4
    assert_same(ours, trls(tmp_path / "trls", given=given(), **WITH[case]), 3e-2 if case == "bf16" else 1e-5)


# Where rows stay padded: one line says why, and the numbers are TRL's


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 6}
PADDED = "Rows are padded for the reward model, not packed: "
REASONS = {  # family, its options, those of the run, what the log says
    "ALiBi": ("bloom", {"n_layer": 2, "n_head": 2}, {}, PADDED + "BloomModel takes no `position_ids`"),
    "dropout": ("llama", {"attention_dropout": 0.3}, {"disable_dropout": False}, PADDED + "dropout is active (`dis"),
    "dropout that is no layer": (
        "llama",
        {"attention_dropout": 0.3},
        {},
        PADDED + "dropout is active, in layers that",
    ),
    "torch.compile": ("llama", {}, {"torch_compile": True}, PADDED + "`torch_compile`"),
    "rotary embedding": (
        "llama",
        {"rope_parameters": DYNAMIC},
        {},
        "Rows of the reward model are packed in batches whose sequences have at most 6 tokens",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_log_says_why_rows_stay_padded(tmp_path, caplog, case):
    family, of_model, options, reason = REASONS[case]
    trainer = trainer_of(tmp_path, model=model_of(family, **of_model), **options)
    assert len([line for line in caplog.messages if line.startswith(reason)]) == 1, caplog.messages
    assert trainer._scores.packing.on == (case == "rotary embedding")


def test_batch_that_is_too_long_goes_trls_way(tmp_path, packed_calls):
    ours = run(tmp_path / "ours", model=model_of("llama", rope_parameters=DYNAMIC))
    assert packed_calls == [None] * 4
    assert_same(ours, trls(tmp_path / "trls", model=model_of("llama", rope_parameters=DYNAMIC)))


def test_packing_is_switched_off(tmp_path, caplog):
    assert not trainer_of(tmp_path, packing=False)._scores.packing.on
    assert "Rows" not in caplog.text


def test_sequence_beyond_the_positions_is_the_models_own_error(tmp_path):
    with pytest.raises(IndexError, match="index out of range"):
        run(tmp_path, model=model_of("gpt2", n_positions=12))


# What is noticed


def sees_its_sibling(right):
    """The rejected sequence goes on where the chosen one ends."""
    return lambda row: right(tuple(Segment(size, None if p is None else i - 1) for i, (size, p) in enumerate(row)))


def starts_at_0(right):
    def positions(rows):
        of_rows = [torch.cat([torch.arange(segment.size) for segment in row]) for row in rows.rows]
        return torch.nn.utils.rnn.pad_sequence(of_rows, batch_first=True)

    return property(positions)


def one_token_early(right):
    return lambda *args: (right(*args) - 1).clamp(min=0)


MISTAKES = {
    "a segment sees its sibling": (segments, "_pieces", sees_its_sibling),
    "a position starts at 0": (PackedRows, "position_ids", starts_at_0),
    "the score of the wrong token": (PackedScores, "_last_token", one_token_early),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_trial_notices(tmp_path, monkeypatch, mistake):
    place, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong(vars(place)[name]))
    packing = trainer_of(tmp_path)._scores.packing
    assert not packing.piecewise
    assert packing.on == (name == "_pieces")  # a mask over the row needs no pieces


@pytest.mark.parametrize("mistake", MISTAKES)
def test_comparison_notices(tmp_path, monkeypatch, mistake):
    expected = trls(tmp_path / "trls")
    place, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong(vars(place)[name]))
    monkeypatch.setattr(PackedForward, "switch_on", lambda self: vars(self).update(on=True, piecewise=True))
    with pytest.raises(AssertionError):
        assert_same(run(tmp_path / "ours"), expected)
