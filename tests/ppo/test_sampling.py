"""
Responses are sampled from the distribution that is scored, at `temperature`: expected tokens are drawn one at a time
from the model's plain forward, by the same random numbers.
"""

import json
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig, WatermarkingConfig

import tiny
from fake_vllm import vllm
from ppo_runs import logged, ppo_config, ppo_run, ppo_trainer


pytestmark = pytest.mark.integration

PROMPTS = ["the cat", "what is a good book", "dog"]
LENGTH = 6
SHARED = {"temperature": 1.3, "response_length": LENGTH}
ENDS = [tiny.VOCABULARY.index("<eos>"), *range(40, 48)]  # that the actor declares
# What may come with a model, all of which transformers 5 adds to a call that leaves it `None`.
ADDED = {
    "min_p": 0.5,
    "top_h": 0.2,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.5,
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(10, 60)),
    "begin_suppress_tokens": list(range(10, 60)),
    "bad_words_ids": [[token] for token in range(10, 60)],
    "sequence_bias": [[[token], -20.0] for token in range(10, 60)],
    "forced_eos_token_id": 2,
    "min_new_tokens": LENGTH,
    "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 9.0,
    "watermarking_config": WatermarkingConfig(greenlist_ratio=0.1, bias=20.0),
    "max_time": 1e-9,
    "num_return_sequences": 2,
    "stop_strings": ["cat"],
    "token_healing": True,
}
# What a call of GRPO states itself.
STATED = {"do_sample": False, "temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 9.0}


@torch.no_grad()
def drawn_one_by_one(model, prompts, seed):
    """The responses that a slow loop draws; ended ones draw on, so that the others' random numbers are the same."""
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(seed)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    starts = [len(row) for row in rows]
    for _ in range(LENGTH):
        logits = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
        drawn = torch.multinomial((logits / SHARED["temperature"]).softmax(-1), 1)
        rows = [[*row, token.item()] for row, token in zip(rows, drawn, strict=True)]
    responses = [row[start:] for row, start in zip(rows, starts, strict=True)]
    lengths = [next((i + 1 for i, token in enumerate(ids) if token in ENDS), LENGTH) for ids in responses]
    return [ids[:length] for ids, length in zip(responses, lengths, strict=True)]


def actor():
    model = tiny.tiny_actor()
    model.generation_config.eos_token_id = ENDS
    return model


def sampled(trainer, seed):
    torch.manual_seed(seed)
    return trainer._generate(PROMPTS)[1]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return ppo_trainer(tmp_path_factory.mktemp("sampling"), {"model": actor()}, **SHARED)


@pytest.fixture
def own_config(trainer):
    """A generation config of the actor, for a test to change."""
    before = trainer.model.generation_config
    trainer.model.generation_config = GenerationConfig.from_dict(before.to_dict())
    yield trainer.model.generation_config
    trainer.model.generation_config = before


@pytest.mark.parametrize("name", [*ADDED, *STATED])
def test_options_that_came_with_the_model_change_no_token(trainer, own_config, name):
    setattr(own_config, name, (ADDED | STATED)[name])
    assert sampled(trainer, seed=1) == drawn_one_by_one(trainer.model, PROMPTS, seed=1)
    assert trainer.model.generation_config is own_config  # it is saved with the model


@pytest.mark.parametrize("name", ADDED)
def test_control_without_the_guard_the_models_options_change_tokens(trainer, own_config, name, monkeypatch):
    """Without the guard, other tokens are sampled by `generate` alone, or generation fails."""
    setattr(own_config, name, ADDED[name])
    monkeypatch.setattr(trainer, "_trunk_of_samples", None)
    monkeypatch.setattr(trainer, "_own_distribution", nullcontext)
    try:
        responses = [sampled(trainer, seed) for seed in (1, 2)]
    except (ValueError, RuntimeError):
        return
    assert responses != [drawn_one_by_one(trainer.model, PROMPTS, seed) for seed in (1, 2)]


SPOILT = {
    "do_sample": True,
    "min_p": 0.5,
    "num_beams": 2,
    "suppress_tokens": list(range(10, 40)),
    "min_new_tokens": LENGTH,
}


def spoilt_actor():
    model = actor()
    model.generation_config.update(**SPOILT)
    return model


def test_options_of_an_adapters_model_change_no_token(tmp_path):
    """Options of the base model, and of a config that the wrapper has itself."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = ppo_trainer(tmp_path, {"model": spoilt_actor(), "peft_config": lora}, **SHARED)
    expected = drawn_one_by_one(actor(), PROMPTS, seed=1)  # a new adapter changes nothing
    assert sampled(trainer, seed=1) == expected
    trainer.model.generation_config = GenerationConfig(min_p=0.9)
    assert sampled(trainer, seed=1) == expected
    assert trainer.model.generation_config.min_p == 0.9


def run_of(folder, model, **options):
    """A run that evaluates and shows samples; the texts of all responses in it, and the printed tables."""
    seen = []

    def note(completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    models = {"model": model, "reward_model": None, "reward_funcs": note, "eval_dataset": tiny.tiny_prompts(4, seed=2)}
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "num_sample_generations": 2}
    return seen, ppo_run(folder, models, **SHARED, **evaluating, **options)


def test_rollouts_evaluations_and_sample_tables_are_those_of_a_plain_model(tmp_path, capsys):
    spoilt, trainer = run_of(tmp_path / "spoilt", spoilt_actor())
    tables = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    plain, _ = run_of(tmp_path / "plain", actor())
    assert spoilt == plain
    assert len(plain) == 8 + 2 * 4 + 2 * 4  # two rollouts, two evaluations, two tables
    assert tables
    assert tables == [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert SPOILT.items() <= saved.items()


def test_rollout_function_that_generates_samples_from_the_policy(tmp_path, monkeypatch):
    """With no options at all, where transformers would take the most probable token or the best 50."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def roll(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        torch.manual_seed(1)
        (answer,) = trainer.model.generate(torch.tensor(ids))[:, len(ids[0]) :].tolist()
        return {"prompt_ids": ids, "completion_ids": [answer], "logprobs": [[0.0] * len(answer)]}

    trainer = ppo_trainer(tmp_path, {"model": spoilt_actor(), "rollout_func": roll}, **SHARED)
    assert trainer._generate(PROMPTS[:1])[1] == drawn_one_by_one(actor(), PROMPTS[:1], seed=1)


# --- options of the run


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"top_k": None},  # transformers' default is 50
        {"top_k": -1},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"vllm_structured_outputs_regex": "ab", "use_vllm": True},
    ],
    ids=str,
)
def test_option_that_samples_from_another_distribution_is_refused(tmp_path, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"`{name}={value!r}` may change what is sampled.*lower `temperature`"):
        ppo_config(tmp_path, **options)


SAID_OTHERWISE = {"do_sample", "temperature", "num_return_sequences"}
OF_VLLM = {"seed", "logit_bias", "presence_penalty", "min_tokens", "stop", "allowed_token_ids", "structured_outputs"}


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["dict", "json"])
@pytest.mark.parametrize("name", sorted({*ADDED, *STATED, *OF_VLLM} - SAID_OTHERWISE))
def test_generation_kwargs_that_sample_from_another_distribution_are_refused(tmp_path, name, form):
    with pytest.raises(ValueError, match=rf"`generation_kwargs` holds \['{name}'\].*may change what is sampled"):
        ppo_config(tmp_path, generation_kwargs=form({name: 1, "use_cache": True}))


@pytest.mark.parametrize("options", [{}, {"generation_kwargs": {"cache_implementation": "quantized"}}], ids=str)
def test_cache_in_few_bits_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="`cache_implementation='quantized'` may change"):
        ppo_config(tmp_path, **(options or {"cache_implementation": "quantized"}))


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.0},
        {"cache_implementation": "static"},
        {"generation_kwargs": {"use_cache": False}},
        {"generation_kwargs": '{"use_cache": true, "cache_implementation": "dynamic"}'},
    ],
    ids=str,
)
def test_option_of_how_tokens_are_computed_changes_none(tmp_path, options):
    trainer = ppo_trainer(tmp_path, {"model": spoilt_actor()}, **SHARED, **options)
    assert sampled(trainer, seed=1) == drawn_one_by_one(actor(), PROMPTS, seed=1)


@torch.no_grad()
def test_continuous_batching_samples_from_the_distribution_that_is_scored(tmp_path):
    """First tokens are as frequent as the plain forward says, and not as it says at another temperature."""
    cache = {"num_blocks": 600, "max_batch_tokens": 512}
    options = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    trainer = ppo_trainer(tmp_path, {"model": spoilt_actor()}, **(SHARED | {"response_length": 1}), **options)
    torch.manual_seed(0)
    first = torch.tensor([ids[0] for ids in trainer._generate(["the cat"] * 2048)[1]])
    logits = actor()(**tiny.tiny_tokenizer()("the cat", return_tensors="pt")).logits[0, -1]
    seen = torch.bincount(first, minlength=len(logits))
    # In units of its standard deviation, how far chi² is above its mean, the degrees of freedom
    off = []
    for temperature in (SHARED["temperature"], 1.0):
        expected = (logits / temperature).softmax(-1) * len(first)
        degrees = len(logits) - 1
        off.append((((seen - expected) ** 2 / expected).sum().item() - degrees) / (2 * degrees) ** 0.5)
    assert off[0] < 3 < 6 < off[1], off


# --- vLLM, which reads sampling options of the model's folder where a request does not state them


FOLDER = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.3, "repetition_penalty": 3.0}
DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_samples_from_the_distribution_that_is_scored(tmp_path, mode):
    with vllm(folder=FOLDER) as sampler:
        trainer = ppo_run(tmp_path, use_vllm=True, vllm_mode=mode, temperature=1.3)
    assert max(logged(trainer, DIFFERENCE)) < 1e-4
    neutral = {"temperature": 1.3, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(neutral.items() <= request.items() for request in sampler.requests)


@pytest.mark.parametrize("name", FOLDER)
def test_control_an_option_that_is_not_stated_shows(tmp_path, name):
    """The server then uses the option in the model's folder, as vLLM does."""
    with vllm(folder=FOLDER):
        trainer = ppo_trainer(tmp_path, use_vllm=True, vllm_mode="server", temperature=1.3, max_steps=1)
        client = trainer.vllm_generation.vllm_client
        ask = client.generate
        client.generate = lambda **options: ask(**{key: value for key, value in options.items() if key != name})
        trainer.train()
    assert logged(trainer, DIFFERENCE)[0] > 1e-2


@pytest.mark.parametrize(
    "logprobs_mode, temperature, correction, objective, is_refused",
    [
        ("raw_logprobs", 1.3, True, "clip", True),
        ("raw_logprobs", 1.0, True, "clip", False),
        ("raw_logprobs", 1.3, False, "clip", False),
        ("raw_logprobs", 1.3, False, "mask", True),
        ("processed_logits", 1.0, True, "clip", True),
        ("processed_logprobs", 1.3, True, "clip", False),
        ("processed_logprobs", 1.3, False, "mask", False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_server_that_reports_other_log_probabilities_is_refused(
    tmp_path, logprobs_mode, temperature, correction, objective, is_refused
):
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": correction}
    options |= {"policy_objective": objective}
    with vllm(server={"logprobs_mode": logprobs_mode}):
        if not is_refused:
            ppo_trainer(tmp_path, temperature=temperature, **options)
            return
        with pytest.raises(ValueError, match=f"--logprobs-mode {logprobs_mode}.*--logprobs-mode processed_logprobs"):
            ppo_trainer(tmp_path, temperature=temperature, **options)
