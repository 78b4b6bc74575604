"""
`DPOTrainerX` gives TRL's numbers to 1e-5: two optimizer steps of both trainers on the same data, models and seed, in
float32; losses, every metric that TRL logs, and the first gradient by its norm.
"""

import functools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import dpo_runs
import pair_forwards
import tiny
from trl_ext.dpo.config import LOSS_TYPES


TOLERANCE = 1e-5
TIMES = ("runtime", "per_second", "time", "total_flos")

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every architecture of the proof as a folder, from which a trainer can take actor and copied reference."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2", "mistral", "gemma2"):
        dpo_runs.tiny_model(name).save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    return folder


def measured(tmp_path, side, models, options):
    """Log lines, the first gradient, and the trainer."""
    keep = dpo_runs.KeepGradients()
    models = {key: value() if callable(value) else value for key, value in models.items()}
    trainer = dpo_runs.dpo_trainer(tmp_path, models | {"callbacks": [keep]}, side, **options)
    trainer.train()
    return dpo_runs.lines(trainer), keep.steps[0], trainer


def differences(ours, theirs, undecided=False):
    """The largest relative difference of a logged number, with its name, and that of the first gradient, by norm."""
    lines, gradient, _ = ours
    trl_lines, trl_gradient, _ = theirs
    assert len(lines) == len(trl_lines) == 2
    worst = (0.0, "")
    for step, (mine, line) in enumerate(zip(lines, trl_lines, strict=True)):
        missing = {key for key in line if key not in mine and not key.endswith(TIMES)}
        assert not missing, f"not logged: {missing}"
        for key, number in line.items():
            if not key.endswith(TIMES) and not (undecided and step == 0 and key == "rewards/accuracies"):
                # What is nearly 0, such as a reward, counts as 0.1: there float32 has digits after the point.
                worst = max(worst, (abs(mine[key] - number) / max(abs(number), 0.1), key))
    return worst, dpo_runs.gradient_difference(gradient, trl_gradient)


def both(name, **options):
    """Arguments of the constructor: an actor and another reference."""
    return {
        "model": lambda: dpo_runs.tiny_model(name, **options),
        "ref_model": lambda: dpo_runs.tiny_model(name, seed=1, **options),
    }


def assert_equals_trl(tmp_path, models=None, sharing=True, undecided=False, tolerance=TOLERANCE, **options):
    models = models or {}
    with dpo_runs.not_at_the_start():
        ours = measured(tmp_path / "ours", dpo_runs.OURS, models, options)
    theirs = measured(tmp_path / "theirs", dpo_runs.TRLS, models, options)
    worst, of_gradient = differences(ours, theirs, undecided)
    assert worst[0] < tolerance, worst
    assert of_gradient < tolerance
    assert [forward.packing.on for forward in ours[2]._forwards] == [sharing] * len(ours[2]._forwards)


# Loss types


def smoothing(loss_type):
    return {"exo_pair": 1e-2, "robust": 0.1, "aot": 0.1}.get(loss_type, 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type_equals_trl(tmp_path, loss_type):
    assert_equals_trl(tmp_path, loss_type=[loss_type], label_smoothing=smoothing(loss_type))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "loss_type": ["ipo"]},
        {"use_weighting": True},
        {"use_weighting": True, "loss_type": ["ipo", "apo_zero"]},  # TRL 1.16's own hinge loss fails with weights
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_type": ["discopop"], "discopop_tau": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid_norm"], "ld_alpha": 0.5},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"pad_to_multiple_of": 16},
    ],
    ids=str,
)
def test_option_equals_trl(tmp_path, options):
    assert_equals_trl(tmp_path, **options)


# Where the reference comes from, for each architecture


def reference_modes(folder, name):
    """Arguments of the constructor and options of the config."""
    path = str(folder / name)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)  # adapters that already do something
    alone = both(name) | {"ref_model": None}
    precomputed = {"precompute_ref_log_probs": True}
    return {
        "given": (both(name), {}),
        "copied": ({"model": path, "ref_model": None}, {}),
        "adapter off": (alone | {"peft_config": lora}, {}),
        "adapter ref": (alone | {"model": lambda: dpo_runs.with_adapter(dpo_runs.tiny_model(name))}, {}),
        "precomputed": (both(name), precomputed),
        "precomputed from the actor": (alone, precomputed),
    }


MODES = ["given", "copied", "adapter off", "adapter ref", "precomputed", "precomputed from the actor"]


@pytest.mark.parametrize(
    "name, mode",
    [*((name, mode) for name in ("llama", "gemma2") for mode in MODES), ("qwen2", "given"), ("mistral", "copied")],
)
def test_reference_equals_trl(tmp_path, saved, name, mode):
    models, options = reference_modes(saved, name)[mode]
    if name == "gemma2" and mode == "copied":
        options = options | {"model_init_kwargs": {"attn_implementation": "eager"}}
    # Precomputed in other batches than trained on, the reference differs from the actor by rounding.
    assert_equals_trl(tmp_path, models, undecided=mode == "precomputed from the actor", **options)


@pytest.mark.parametrize(
    "name, mode, checkpointing",
    [
        *(("llama", "given", how) for how in ({"use_reentrant": True}, {"use_reentrant": False}, None)),
        *(("llama", "adapter off", {"use_reentrant": how}) for how in (True, False)),
        ("gemma2", "given", {"use_reentrant": False}),
    ],
)
def test_gradient_checkpointing_equals_trl(tmp_path, saved, name, mode, checkpointing):
    models, options = reference_modes(saved, name)[mode]
    options = options | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    assert_equals_trl(tmp_path, models, **options)


# In 16 bits: no further from TRL's numbers than rounding has moved these


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    """TRL's run of an architecture in float32, once."""

    @functools.cache
    def run(name):
        return measured(tmp_path_factory.mktemp(name), dpo_runs.TRLS, both(name), {})

    return run


@pytest.mark.parametrize("name", ["llama", "mistral_short_window", "gemma2", "mixtral"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_equals_trl_within_rounding(tmp_path, in_float32, name, weights):
    models = {
        "model": lambda: dpo_runs.tiny_model(name).to(weights),
        "ref_model": lambda: dpo_runs.tiny_model(name, seed=1).to(weights),
    }
    ours = measured(tmp_path / "ours", dpo_runs.OURS, models, {"bf16": True})
    theirs = measured(tmp_path / "theirs", dpo_runs.TRLS, models, {"bf16": True})
    assert [forward.packing.on for forward in ours[2]._forwards] == [True, True]
    assert [forward.packing.limited_by for forward in ours[2]._forwards] == [[], []]
    (worst, name_of_worst), of_gradient = differences(ours, theirs, undecided=True)
    (rounding, _), of_gradient_by_rounding = differences(theirs, in_float32(name), undecided=True)
    assert of_gradient < 2 * of_gradient_by_rounding < 0.5
    assert worst < 2 * rounding < 0.5, name_of_worst


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_shares_rows_for_an_adapter_and_for_a_precomputed_reference(tmp_path, saved, weights):
    for mode in ("adapter off", "precomputed"):
        models, options = reference_modes(saved, "llama")[mode]
        models = models | {"model": lambda: dpo_runs.tiny_model().to(weights)}
        with dpo_runs.not_at_the_start():  # the adapter does something already
            ours = measured(tmp_path / mode, dpo_runs.OURS, models, options | {"bf16": True})
        theirs = measured(tmp_path / mode, dpo_runs.TRLS, models, options | {"bf16": True})
        worst, of_gradient = differences(ours, theirs, undecided=True)
        assert all(forward.packing.on for forward in ours[2]._forwards)
        assert worst[0] < 3e-2, worst
        assert of_gradient < 3e-2


# Data


def prompts_of_one_token():
    return dpo_runs.tiny_pairs(prompt=(1, 1))


def truncated():
    """Some fit, some lose their end or beginning; without the pair that is cut before its completions differ."""
    return dpo_runs.tiny_pairs(16, prompt=(1, 9)).filter(lambda _, i: i != 3, with_indices=True)


def only_eos():
    rows = dpo_runs.tiny_pairs().to_list()
    for i, row in enumerate(rows):
        row["chosen" if i % 2 else "rejected"] = "<eos>"
        row["rejected" if i % 2 else "chosen"] = "one two" if i < 4 else "cat"
    return Dataset.from_list(rows)


def long_beginning():
    rows = dpo_runs.tiny_pairs().to_list()
    for i, row in enumerate(rows):
        beginning = "the cat and the dog of the old house " * (1 + i % 3)
        row |= {"chosen": beginning + "good", "rejected": beginning + "bad" * (i % 2) + " awful"}
    return Dataset.from_list(rows)


def implicit_prompts():
    """Without a `prompt`: TRL takes it from the beginning of both."""
    rows = dpo_runs.tiny_pairs().to_list()
    return Dataset.from_list([{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows])


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "data, options",
    [
        (prompts_of_one_token, {}),
        (truncated, {"max_length": 8}),
        (truncated, {"max_length": 8, "truncation_mode": "keep_end"}),
        (only_eos, {}),
        (long_beginning, {}),
        (long_beginning, {"loss_type": ["ipo"], "ld_alpha": 0.5}),
        (dpo_runs.tiny_chats, {}),
        (implicit_prompts, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_data_equals_trl(tmp_path, data, options):
    """On Gemma 2, whose rows are read with a mask, where completions of no word or with a long beginning are."""
    name = "gemma2" if data in (only_eos, long_beginning) else "llama"
    assert_equals_trl(tmp_path, both(name) | {"train_dataset": data()}, **options)


def test_evaluation_equals_trl(tmp_path):
    """Also with a last batch that is smaller, and with precomputed references."""
    for options in ({}, {"precompute_ref_log_probs": True}):
        results = []
        for side in (dpo_runs.OURS, dpo_runs.TRLS):
            models = {"eval_dataset": dpo_runs.tiny_pairs(10, seed=5)}
            trainer = dpo_runs.dpo_trainer(tmp_path, models, side, **options)
            trainer.evaluate()
            results.append(dpo_runs.lines(trainer, "eval_loss")[0])
        ours, theirs = results
        compared = [key for key in theirs if not key.endswith(TIMES) and "_per_" not in key]
        assert "eval_rewards/accuracies" in compared
        assert {key: ours[key] for key in compared} == pytest.approx({key: theirs[key] for key in compared}, rel=1e-5)


# Models that cannot share, and a mistake


@pytest.mark.parametrize("name", ["mamba", "mistral_short_window", "gemma2_short_window"])
def test_models_that_cannot_share_and_sequences_beyond_a_window_equal_trl(tmp_path, name):
    assert_equals_trl(tmp_path, both(name), sharing=name.endswith("window"))


@pytest.mark.parametrize("size, accumulation", [(4, 1), (2, 2)])
def test_mixture_of_experts_with_its_auxiliary_loss_equals_trl(tmp_path, size, accumulation):
    """The load-balancing loss is of the tokens in TRL's rows, without padding: what pairs share counts twice."""
    models = {"model": lambda: dpo_runs.tiny_model("mixtral", router_aux_loss_coef=0.5, output_router_logits=True)}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    assert_equals_trl(tmp_path, models, **sizes)


def test_control_an_unnoticed_mistake_in_the_layout_shows_here(tmp_path, monkeypatch):
    theirs = measured(tmp_path / "theirs", dpo_runs.TRLS, {}, {})
    pair_forwards.tails_come_late(monkeypatch)
    worst, of_gradient = differences(measured(tmp_path / "ours", dpo_runs.OURS, {}, {}), theirs)
    assert worst[0] > 1e-3
    assert of_gradient > 1e-3
