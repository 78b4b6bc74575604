"""Packed rows, groups and budgets against padded rows: the same terms, gradients and metrics; mistakes are noticed."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import four_roles
import tiny
from ppo_runs import log_lines, ppo_trainer
from trl_ext.masked import identity
from trl_ext.packing import attention, forward, segments
from trl_ext.packing.forward import PackedForward
from trl_ext.ppo.micro_batches import draw_micro_batches
from trl_ext.ppo.roles.reward_models import TokenScorer
from trl_ext.ppo.roles.rows import reading
from trl_ext.ppo.rollout import Rollout


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "mistral": {"sliding_window": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "phi3": {"sliding_window": 8},
    "olmo2": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

OF_THE_MACHINE = ("time", "memory", "tokens_per_second", "step_time")
PROMPTS = [
    "<bos>",
    "<bos> the",
    "<bos> " + "a b c d e f " * 4,
    "<bos> x y z",
    "<bos> one two",
    "<bos> the end of it all",
]


def model_of(family, auto=AutoModelForCausalLM, seed=0, **options):
    own = {name: value for name, value in SIZES.items() if family != "gpt2" or not name.startswith(("num_", "head"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(AutoConfig.for_model(family, **(own | FAMILIES[family] | options))).eval()


def answers(prompts, trainer):
    """Answers of 1 to 12 tokens, some of which a tool wrote."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    lengths = [1 + (5 * row + 11 * len(prompt)) % 12 for row, prompt in enumerate(ids)]
    written = [[7 + (3 * row + t) % 50 for t in range(length - 1)] + [2] for row, length in enumerate(lengths)]
    mask = [[int(length < 6 or t not in (2, 3)) for t in range(length)] for length in lengths]
    logprobs = [[-1.0] * length for length in lengths]
    return {"prompt_ids": ids, "completion_ids": written, "logprobs": logprobs, "env_mask": mask}


def run(folder, family="llama", packing=True, lora=False, given=None, **options):
    """Two rollouts; returns the trainer, what it logged and the gradients of every optimizer step."""
    models = {
        "model": model_of(family),
        "reward_model": model_of(family, AutoModelForSequenceClassification, seed=1, num_labels=1),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 4}),
        "rollout_func": answers,
    }
    if lora:
        models |= {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}
        if options.get("critic") == "adapter":
            models |= {
                "reward_model": None,
                "reward_funcs": lambda completions, **_: [len(c) / 9 for c in completions],
            }
    models |= given or {}
    options = {"total_episodes": 12, "gradient_accumulation_steps": 3} | options
    options = {"response_length": 12, "bf16": False, "use_cpu": True} | options
    trainer = ppo_trainer(folder, models, packing=packing, **options)
    for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
        parameter.data = parameter.data.float()  # TRL puts adapters on a 4-bit base in bfloat16
    gradients = []
    clip = trainer._clip_grad_norm

    def keep(model):
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(model)

    trainer._clip_grad_norm = keep
    trainer.train()
    return trainer, log_lines(trainer), gradients


def assert_same(one, other, tolerance=1e-5):
    (_, lines, gradients), (_, other_lines, other_gradients) = one, other
    assert len(lines) == len(other_lines) == len(gradients) > 1
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line.keys() == other_line.keys()
        for name in line:
            if not any(word in name for word in OF_THE_MACHINE):
                assert line[name] == pytest.approx(other_line[name], rel=tolerance, abs=tolerance), name
    for step, other_step in zip(gradients, other_gradients, strict=True):
        assert step.keys() == other_step.keys()
        apart = sum((step[name] - other_step[name]).square().sum() for name in step).sqrt()
        norm = sum(gradient.square().sum() for gradient in other_step.values()).sqrt()
        assert apart <= tolerance * norm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_packed_rows_give_what_padded_ones_give(tmp_path, packed_calls, family, critic):
    packed = run(tmp_path / "packed", family, critic=critic)
    assert packed_calls
    assert packed[0].reward_funcs[0].packed is not None
    assert all(rows is not None and len(rows.input_ids) == 1 for rows in packed_calls)
    padded = run(tmp_path / "padded", family, packing=False, critic=critic)
    assert padded[0].reward_funcs[0].packed is None
    assert_same(packed, padded)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "full"},
        {"kl_placement": "reward", "num_mini_batches": 2, "gradient_accumulation_steps": 2, "num_ppo_epochs": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"lora": True},
        {"lora": True, "critic": "adapter"},
        {"critic": "head", "critic_warmup_steps": 1},
        {"bf16": True},
        {"bf16": True, "family": "gemma2", "total_episodes": 6},
    ],
    ids=str,
)
def test_packed_rows_give_the_same_with(tmp_path, packed_calls, options):
    packed = run(tmp_path / "packed", **options)
    assert packed_calls
    assert all(scorer.packed is not None for scorer in packed[0].reward_funcs if isinstance(scorer, TokenScorer))
    padded = run(tmp_path / "padded", packing=False, **options)
    assert_same(packed, padded, tolerance=3e-2 if options.get("bf16") else 1e-5)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "phi3"])
def test_reward_model_under_autocast_is_packed_beyond_its_window(tmp_path, family):
    """accelerate wraps its forward in autocast; a trial within would hold scores in bfloat16 to float32's rounding."""
    judge = model_of(family, AutoModelForSequenceClassification, seed=1, num_labels=1)
    models = {"model": model_of("llama"), "reward_model": judge}
    trainer = ppo_trainer(tmp_path, models, bf16=True, use_cpu=True, kl_coef=0.0, critic="head")
    (scorer,) = trainer.reward_funcs
    assert "_original_forward" in vars(scorer.model)  # autocast is back
    packing = scorer.packed.packing
    assert packing.piecewise
    assert (packing.limit, packing.row_limit) == (None, None)


# GPT-2 has absolute positions; under a rotary embedding a sequence may begin anywhere.
MISTAKES = {
    "a sequence sees the one before it": (
        "gpt2",
        segments,
        "_pieces",
        lambda original: lambda row: (segments.Piece(sum(segment.size for segment in row), ()),),
    ),
    "positions go on through the row": (
        "gpt2",
        segments.PackedRows,
        "position_ids",
        lambda original: property(lambda self: torch.arange(self.input_ids.size(1))[None]),
    ),
    "states are taken from the next place": (
        "gpt2",
        forward,
        "pack",
        lambda original: lambda *args: moved(original(*args)),
    ),
    "scores are not capped": (
        "gemma2",
        attention,
        "_eager",
        lambda original: lambda *args: original(*args[:5], None, *args[6:]),
    ),
}


def moved(rows):
    return segments.PackedRows(rows.input_ids, rows.rows, (rows.packed_index + 1) % rows.input_ids.numel())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_trial_notices(tmp_path, monkeypatch, packed_calls, mistake):
    """With a mistake in the rows, the trial keeps them padded, so that the numbers stay right."""
    family, place, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong(vars(place)[name]))
    run(tmp_path, family, total_episodes=6, num_generations=3)
    assert not packed_calls


@pytest.mark.parametrize("mistake", MISTAKES)
def test_comparison_notices(tmp_path, monkeypatch, mistake):
    family, place, name, wrong = MISTAKES[mistake]
    padded = run(tmp_path / "padded", family, packing=False, total_episodes=6)
    monkeypatch.setattr(place, name, wrong(vars(place)[name]))
    monkeypatch.setattr(PackedForward, "switch_on", lambda self, by_mask: vars(self).update(on=True, piecewise=True))
    packed = run(tmp_path / "packed", family, total_episodes=6)
    with pytest.raises(AssertionError):
        assert_same(packed, padded)


def test_padded_rows_are_no_longer_than_the_longest_of_their_micro_batch(tmp_path, monkeypatch):
    widths, ends = [], []

    @contextmanager
    def note(*args, **kwargs):
        with reading(*args, **kwargs) as (inputs, select):
            widths.append(inputs["input_ids"].size(1))
            ends.append(inputs["attention_mask"].any(0)[[0, -1]])
            yield inputs, select

    for module in ("forward", "state_values"):
        monkeypatch.setattr(f"trl_ext.ppo.roles.{module}.reading", note)
    run(tmp_path, packing=False)
    assert len(set(widths)) > 3
    # A left-padded prompt and a right-padded answer: the longest of each decide.
    assert all(end.all() for end in ends)


def bloom(auto):
    """A model that takes no positions, so that its rows stay padded."""
    ids = {name: value for name, value in SIZES.items() if name.endswith("_id")}
    return auto.from_config(
        AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2, num_labels=1, **ids)
    )


WITHIN_A_BUDGET = {
    "equal prompts": lambda: {"train_dataset": Dataset.from_dict({"prompt": [PROMPTS[2]] * 16})},
    "a critic that pads": lambda: {"value_model": bloom(AutoModelForSequenceClassification)},
    "a reference that pads": lambda: {"ref_model": bloom(AutoModelForCausalLM)},
    "beyond a limit": dict,
}


@pytest.mark.parametrize("case", WITHIN_A_BUDGET)
def test_no_pass_reads_more_tokens_than_the_budget(tmp_path, monkeypatch, case):
    prompts = Dataset.from_dict({"prompt": ["<bos> " + "a b c " * (row % 5) for row in range(16)]})
    budgets = {"micro_batch_tokens": 48, "score_batch_tokens": 44}
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "total_episodes": 16}
    models = {"train_dataset": prompts, "rollout_func": answers} | WITHIN_A_BUDGET[case]()
    trainer = ppo_trainer(tmp_path, models, num_ppo_epochs=1, response_length=12, **sizes, **budgets)
    if case == "beyond a limit":
        trainer._packings[0].limit = 16
    read = set()

    @contextmanager
    def note(*args, **kwargs):
        with reading(*args, **kwargs) as (inputs, select):
            read.add((torch.is_grad_enabled(), inputs["input_ids"].numel()))
            yield inputs, select

    for module in ("forward", "state_values"):
        monkeypatch.setattr(f"trl_ext.ppo.roles.{module}.reading", note)
    trainer.train()
    assert 36 < max(size for learns, size in read if learns) <= 48
    assert 32 < max(size for learns, size in read if not learns) <= 44


def drawn(num_generations=1, **options):
    """The micro-batches of 24 sequences of 1 to 9 tokens in two mini-batches, all in one list, and their lengths."""
    lengths = torch.tensor([3, 9, 1, 7, 2, 8, 4, 6]).repeat(3)
    attended = torch.arange(9) < lengths[:, None]
    ids = torch.arange(24 // num_generations).repeat_interleave(num_generations).unsqueeze(1)
    rollout = Rollout.from_ids(ids, ids >= 0, torch.zeros(24, 9, dtype=torch.long), attended)
    packs = options.pop("packs", True)
    sizes = {"num_mini_batches": 2, "per_device_train_batch_size": 6, "micro_batch_tokens": None}
    sizes |= {"num_generations": num_generations, "shares_prompts": num_generations > 1, "positive_min_score": None}
    args = SimpleNamespace(**(sizes | options))
    torch.manual_seed(0)
    steps = draw_micro_batches(rollout, args, identity, torch.max, 1, packs)
    return list(itertools.chain.from_iterable(steps)), lengths


def rows_of(micro_batches):
    return [part.rows.tolist() for part in micro_batches]


def test_sequences_of_about_one_length_share_a_padded_micro_batch():
    packed, lengths = drawn()
    padded, _ = drawn(packs=False)
    for mini_batch in (slice(0, 2), slice(2, 4)):
        one, other = (torch.cat([part.rows for part in parts[mini_batch]]) for parts in (packed, padded))
        assert sorted(one.tolist()) == sorted(other.tolist())
        assert lengths[other].tolist() == sorted(lengths[other].tolist())
    assert [part.num_tokens for part in packed] == [part.num_tokens for part in padded]


def test_one_response_per_prompt_is_drawn_as_a_permutation_of_the_rollout():
    rows = list(itertools.chain(*rows_of(drawn()[0])))
    torch.manual_seed(0)
    assert rows == torch.randperm(24).tolist()


@pytest.mark.parametrize("options", [{}, {"packs": False}, {"micro_batch_tokens": 40}], ids=str)
def test_responses_to_a_prompt_stay_together(options):
    for rows in rows_of(drawn(num_generations=3, **options)[0]):
        assert [row // 3 for row in rows[::3]] == [row // 3 for row in rows[2::3]]
        assert rows[::3] == [row - row % 3 for row in rows[::3]]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_micro_batches_of_tokens_hold_every_sequence_once(packs, n):
    micro_batches, _ = drawn(num_generations=n, micro_batch_tokens=40, packs=packs)
    whole, _ = drawn(num_generations=n, per_device_train_batch_size=12, packs=True)
    assert sorted(itertools.chain(*rows_of(micro_batches))) == list(range(24))
    assert sum(part.share for part in micro_batches) == pytest.approx(2)
    mini_batches = [set(rows) for rows in rows_of(whole)]
    for part in micro_batches:
        assert any(set(part.rows.tolist()) <= mini_batch for mini_batch in mini_batches)
        assert part.num_tokens in {each.num_tokens for each in whole}
    assert len(micro_batches) <= 24 / n


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "local_rollout_forward_batch_size": 3},
        {"micro_batch_tokens": 90, "score_batch_tokens": 70},
        {"critic": "head", "micro_batch_tokens": 90},
        {"lora": True, "critic": "adapter", "family": "gemma2", "total_episodes": 6, "micro_batch_tokens": 90},
        {"kl_estimator": "full", "micro_batch_tokens": 90, "score_batch_tokens": 70},
    ],
    ids=str,
)
def test_groups_over_packed_rows_give_what_padded_ones_give(tmp_path, packed_calls, options):
    packed = run(tmp_path / "packed", num_generations=3, **options)
    assert all(segment.parent is not None for rows in packed_calls for row in rows.rows for segment in row[1::4])
    options = {name: value for name, value in options.items() if not name.endswith("_tokens")}
    assert_same(packed, run(tmp_path / "padded", num_generations=3, packing=False, **options))
    assert any("reward/best_of_n" in line for line in packed[1])


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_packed_rows_give_the_same_on_a_4_bit_base(tmp_path, packed_calls, critic):
    """Four roles on one base in NF4; the reward adapter reads packed rows, too."""
    paths = four_roles.prepare(tmp_path)
    options = {"num_generations": 3, "critic": critic, "total_episodes": 6}
    packed = run(tmp_path / "packed", given=four_roles.models(paths), micro_batch_tokens=90, **options)
    assert all(len(rows.rows[0]) > 4 for rows in packed_calls)
    assert packed[0].reward_funcs[0].packed is not None
    assert_same(packed, run(tmp_path / "padded", given=four_roles.models(paths), packing=False, **options))


def in_nf4(folder, family):
    model_of(family).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return {"model": str(folder), "quantization_config": bits}


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # of GPT-2
@pytest.mark.parametrize("in_4_bits", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("critic", ["model", "head", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family_with_groups_and_budgets_give_the_same(
    tmp_path, packed_calls, family, critic, in_4_bits
):
    options = {"lora": True, "critic": critic, "num_generations": 3, "total_episodes": 6}
    given = in_nf4(tmp_path / "base", family) if in_4_bits else {}
    budgets = {"micro_batch_tokens": 90, "score_batch_tokens": 90}
    packed = run(tmp_path / "packed", family, given=dict(given), **options, **budgets)
    assert packed_calls
    padded = run(tmp_path / "padded", family, given=dict(given), packing=False, **options)
    assert_same(packed, padded)


@pytest.mark.parametrize("packing", [True, False])
def test_budgets_give_the_same(tmp_path, packing):
    """With two mini-batches, so that the second one's old log-probabilities are read in parts too."""
    options = {"num_mini_batches": 2, "gradient_accumulation_steps": 2, "num_ppo_epochs": 2, "packing": packing}
    plain = run(tmp_path / "plain", **options)
    assert_same(run(tmp_path / "budgets", micro_batch_tokens=45, score_batch_tokens=50, **options), plain)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batch_of_which_nothing_counts_keeps_its_graph(tmp_path, packing):
    trainer = ppo_trainer(tmp_path, packing=packing)
    ids = torch.full((2, 3), 9)
    rollout = Rollout.from_ids(ids, ids > 0, torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    output = trainer._forward(trainer.model, rollout, ("log_probs", "state_values"))
    assert output.log_probs.shape == output.state_values.shape == (2, 5)
    assert output.log_probs.requires_grad
    assert output.state_values.requires_grad
