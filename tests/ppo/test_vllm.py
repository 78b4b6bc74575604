"""TRL's own code between the trainer and a stand-in for vLLM, which samples from what it is sent and nothing else."""

import math
import socket
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen2Config
from trl import GRPOConfig, GRPOTrainer

import four_roles
import tiny
from fake_vllm import vllm
from ppo_runs import (
    changed,
    logged,
    ppo_config,
    ppo_run,
    ppo_trainer,
    response_lengths,
    returned_by,
    sequences,
    snapshot,
)
from trl_ext import _trl
from trl_ext.ppo.rollout import MicroBatch
from trl_ext.ppo.vllm import check_ports, dtype_name, engine_dtype


pytestmark = pytest.mark.integration

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
# Bounds between which some ratios of the noisy engine lie and some do not, for tokens and for sequences.
BOUNDS = {"max": (None, 1.1), "min": (0.9, None), "both": (0.9, 1.1)}
DIFFERENCE = "sampling/sampling_logp_difference"


# --- the weights


@pytest.mark.parametrize(
    "mode, critic, peft",
    [("colocate", "model", False), ("server", "head", False), ("colocate", "head", True), ("server", "model", True)],
)
def test_responses_are_sampled_from_the_actor_as_it_is_then(tmp_path, mode, critic, peft):
    """In each rollout vLLM's log-probabilities are the trainer's, so what it was sent is the actor, adapter merged."""
    with vllm() as sampler:
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        models = {"peft_config": lora} if peft else {}
        trainer = ppo_trainer(
            tmp_path, models, use_vllm=True, vllm_mode=mode, critic=critic, learning_rate=1e-2, total_episodes=12
        )
        before = snapshot(trainer.model)
        trainer.train()
    assert max(logged(trainer, f"{DIFFERENCE}/max")) < 1e-4
    assert any("critic" not in name for name in changed(trainer.model, before))
    assert (sampler.calls.count("load"), sampler.calls.count("generate")) == (3, 3)
    assert {type(module).__name__ for module in trainer.model.modules()} & {"ValueHead", "ValueModel"}  # it is back


def test_control_an_actor_that_was_not_sent_shows(tmp_path):
    with vllm():
        trainer = ppo_trainer(tmp_path, use_vllm=True, learning_rate=1e-2)
        sync = trainer.vllm_generation.sync_weights
        trainer.vllm_generation.sync_weights = lambda: sync() if trainer.state.global_step == 0 else None
        trainer.train()
    first, second = logged(trainer, f"{DIFFERENCE}/max")
    assert first < 1e-4 < 1e-2 < second


def test_second_run_and_best_model_are_sent_anew(tmp_path):
    """Both begin at a step for which vLLM already has weights, but other ones."""
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, use_vllm=True, learning_rate=1e-2, total_episodes=4)
        trainer.train()
        trainer.train()
        assert sampler.calls.count("load") == 2
        assert max(logged(trainer, f"{DIFFERENCE}/max")) < 1e-4
        trainer.save_model(str(tmp_path / "best"))
        trainer.state.best_model_checkpoint = str(tmp_path / "best")
        trainer.state.global_step = trainer._last_loaded_step
        trainer._load_best_model()
        trainer._generate([tiny.tiny_prompts(1)["prompt"][0]])
        assert sampler.calls.count("load") == 3


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("start", [False, True], ids=["new adapter", "from an adapter"])
def test_of_four_roles_on_one_base_the_actor_is_sent(tmp_path, mode, start):
    """Its adapter is merged into weights that critic and reward model share, and taken out again."""
    paths = four_roles.prepare(tmp_path)
    models = four_roles.models(paths, start, quantization=None)
    with vllm(model=tiny.tiny_actor()):
        trainer = ppo_trainer(
            tmp_path / "run",
            models,
            use_vllm=True,
            vllm_mode=mode,
            critic="adapter",
            learning_rate=1e-2,
            total_episodes=12,
        )
        before = snapshot(trainer.model)
        trainer.train()
    differences = logged(trainer, f"{DIFFERENCE}/max")
    assert len(differences) == 3
    assert max(differences) < 1e-4
    assert any(".critic" in name or name.startswith("critic") for name in changed(trainer.model, before))


# --- what an engine has to be


@pytest.mark.parametrize(
    "weights, options, dtype",
    [
        (torch.float32, {}, "float32"),
        (torch.bfloat16, {}, "bfloat16"),
        (torch.float32, {"bf16": True}, "bfloat16"),
        (torch.float32, {"fp16": True}, "float16"),
        ("a folder", {}, "float32"),
        ("a folder", {"model_init_kwargs": {"dtype": "float16"}}, "float16"),
        ("a folder", {"model_init_kwargs": {"dtype": "auto"}}, "bfloat16"),
    ],
    ids=str,
)
def test_engine_computes_in_the_dtype_of_the_trainer(tmp_path, weights, options, dtype):
    """Also where it is not loaded yet; the folder's weights are bfloat16, which TRL loads as float32."""
    args = ppo_config(tmp_path, use_cpu=True, use_vllm=True)
    vars(args).update(options)  # float16 is refused on a CPU
    model = tiny.tiny_actor().to(torch.bfloat16 if weights == "a folder" else weights)
    if weights == "a folder":
        model.save_pretrained(tmp_path / "saved")
        model = str(tmp_path / "saved")
    assert dtype_name(engine_dtype(args, model)) == dtype


def test_colocated_engine_is_started_in_that_dtype(tmp_path):
    actor = tiny.tiny_actor().bfloat16()
    actor.name_or_path = "tiny"
    with vllm():
        trainer = ppo_trainer(tmp_path, {"model": actor}, use_vllm=True, use_cpu=True)
    assert trainer.vllm_generation.llm.options["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "server, options, said",
    [
        ({"model": "other"}, {}, "vocab_size is 65 there and 64 here, num_hidden_layers is 3 there and 2 here"),
        ({"model": "qwen"}, {}, "model_type is qwen2 there and llama here\\. Restart"),
        ({"dtype": "torch.bfloat16"}, {}, "computes in bfloat16 and the run in float32.*`--dtype float32`"),
        ({"max_model_len": 40}, {"response_length": 40}, "takes 40 tokens.*`response_length` is 40"),
    ],
    ids=["model", "family", "dtype", "length"],
)
def test_server_that_does_not_fit_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, server, options, said):
    monkeypatch.setattr("trl_ext.ppo.trainer.load_roles", None)
    monkeypatch.chdir(tmp_path)
    tiny.tiny_config(vocab_size=65, num_hidden_layers=3).save_pretrained("other")
    same = {name: value for name, value in tiny.tiny_config().to_dict().items() if name != "model_type"}
    Qwen2Config(**same).save_pretrained("qwen")
    with vllm(server=server) as sampler, pytest.raises(ValueError, match=f"{said}.*`trl-ext serve RECIPE`"):
        ppo_trainer(tmp_path, use_vllm=True, vllm_mode="server", **options)
    assert sampler.calls == ["connect"]


def test_server_that_is_not_there_is_an_error_with_the_way_out(monkeypatch):
    """By TRL's own client."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=r"can't be reached at http://127.0.0.1:9 .*`trl-ext serve RECIPE`"):
        _trl.server_info("http://127.0.0.1:9", timeout=0)


def test_port_of_another_program_is_refused():
    """For the weights, or in the server's place, where TRL would ask for ever; a port that nobody has is free."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"`vllm_group_port={port}` .*cannot be taken.* such as {port + 1}"):
            check_ports("http://127.0.0.1:9", port)
    check_ports("http://127.0.0.1:9", port)
    other = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # which answers with HTTP 501
    Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match=r"is no vLLM server.*HTTP 501.*`vllm_server_port`"):
            check_ports(f"http://127.0.0.1:{other.server_port}", port)
    finally:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_that_is_not_installed_or_of_another_version_is_refused_first(tmp_path, monkeypatch, mode):
    def is_another(*_):
        warnings.warn("TRL currently supports vLLM versions from 0.22.0 to 0.31.0. You have 0.99.", stacklevel=2)
        return True

    monkeypatch.setattr("trl_ext.ppo.trainer.load_roles", None)
    with pytest.raises(ImportError, match=r"`use_vllm` needs vLLM.*pip install"):
        ppo_trainer(tmp_path, use_vllm=True, vllm_mode=mode)
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", is_another)
    with pytest.raises(ImportError, match=r"from 0.22.0 to 0.31.0. You have 0.99.*pip install"):
        ppo_trainer(tmp_path, use_vllm=True, vllm_mode=mode)


def test_actor_of_no_folder_cannot_be_loaded_by_a_colocated_engine(tmp_path):
    with vllm(), pytest.raises(ValueError, match=r"loads the model itself.*Save it"):
        ppo_trainer(tmp_path, {"model": tiny.tiny_actor()}, use_vllm=True)


# --- sleep


def test_colocated_engine_sleeps_while_models_score_and_learn(tmp_path):
    states = []
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, use_vllm=True, vllm_enable_sleep_mode=True)
        engine = trainer.vllm_generation.llm
        trainer.model.register_forward_pre_hook(lambda *_: states.append(set(engine.asleep)))
        trainer.train()
    wake = ["wake weights", "load", "reset", "wake kv_cache"]
    assert sampler.calls == ["start", "sleep", *wake, "generate", "sleep", *wake, "generate", "sleep"]
    assert states
    assert all(state == {"weights", "kv_cache"} for state in states)


def test_without_sleep_mode_the_engine_stays_awake(tmp_path):
    with vllm() as sampler:
        ppo_run(tmp_path, use_vllm=True)
    assert sampler.calls == ["start", "load", "reset", "generate", "load", "reset", "generate"]


# --- what ends a response


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_declared_end_tokens_are_the_engines(tmp_path, mode):
    """The tokenizer's end token too, which vLLM would not know from the model's folder."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = "cat"
    with vllm() as sampler:
        trainer = ppo_run(tmp_path, {"processing_class": tokenizer}, use_vllm=True, vllm_mode=mode, max_steps=1)
    (request,) = sampler.requests
    declared = {tiny.VOCABULARY.index("<eos>"), tiny.VOCABULARY.index("cat")}
    assert set(request["stop_token_ids"]) == set(trainer.eos_token_ids) == declared
    assert request["ignore_eos"]


@pytest.mark.parametrize("mode, options", [("colocate", {"stop_token": "eos"}), ("server", {"stop_token_id": 30})])
def test_only_the_stop_token_ends_a_response(tmp_path, mode, options):
    stop = options.get("stop_token_id", tiny.VOCABULARY.index("<eos>"))
    with vllm() as sampler:
        trainer = ppo_run(
            tmp_path, use_vllm=True, vllm_mode=mode, response_length=60, max_steps=1, temperature=2.0, **options
        )
    assert [request["stop_token_ids"] for request in sampler.requests] == [[stop]]
    rollout = trainer.run_state.rollout
    responses = [response for _, response in sequences(rollout)]
    assert any(response[-1] == stop for response in responses)
    assert all(stop not in response[:-1] for response in responses)
    assert rollout.has_eos.tolist() == [response[-1] == stop for response in responses]
    assert all(response[-1] == stop or len(response) == 60 for response in responses)
    if stop == 30:  # the end token is a token like others
        assert any(tiny.VOCABULARY.index("<eos>") in response for response in responses)


@pytest.mark.parametrize("name", ["max_tokens", "n", "logprobs", "stop_token_ids", "ignore_eos"])
def test_option_of_vllm_that_another_option_sets_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`generation_kwargs` holds \['{name}'\]"):
        ppo_config(tmp_path, use_vllm=True, generation_kwargs={name: 3})


# --- the mismatch between vLLM's probabilities and the trainer's


def correction(mode, bounds):
    low, high = BOUNDS[bounds]
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_several_responses_to_a_prompt_stand_side_by_side(tmp_path, mode):
    """
    Two to each prompt in training, three in an evaluation. A server is sent a prompt of training once, and one of an
    evaluation, whose batches may end within a group, once for each response.
    """
    held_out = {"eval_dataset": tiny.tiny_prompts(3, seed=3)}
    evaluation = {
        "num_generations_eval": 3,
        "per_device_eval_batch_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    with vllm() as sampler:
        trainer = ppo_run(tmp_path, held_out, use_vllm=True, vllm_mode=mode, num_generations=2, **evaluation)
    assert trainer.run_state.rollout.groups() == [[0, 1], [2, 3]]
    assert {request.get("n") for request in sampler.requests} == ({1, 2} if mode == "server" else {1})
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    best, mean = (logged(trainer, f"eval_reward/{name}") for name in ("best_of_n", "score"))
    assert all(high > low for high, low in zip(best, mean, strict=True))
    assert len(sampler.errors) == 2 * 4 + 2 * 3 * 3 + 2 * 3  # two rollouts, two evaluations, two tables of samples


def rows():
    """Prompts in pairs, as GRPO has them with two generations."""
    return [{"prompt": prompt} for prompt in tiny.tiny_prompts(2)["prompt"] for _ in range(2)]


def ppo_with_vllm(folder, **options):
    terms = {"kl_coef": 0.0, "vf_coef": 0.0, "ent_coef": 0.0, "num_sample_generations": 0}
    trainer = ppo_trainer(folder, use_vllm=True, **(terms | options))
    trainer.model.train()
    return trainer


def grpo_with_vllm(folder, **options):
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_completion_length=6,
        use_vllm=True,
        vllm_mode="colocate",
        loss_type="bnpo",
        bf16=False,
        use_cpu=True,
        report_to="none",
        **options,
    )
    trainer = GRPOTrainer(
        tiny.tiny_actor(),
        response_lengths,
        args=args,
        train_dataset=tiny.tiny_prompts(4),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.model.train()
    return trainer


def ratio_by_hand(errors, mode, low, high):
    """Return the ratio of each token, from the errors of the engine's log-probabilities."""
    if mode.startswith("sequence"):
        errors = [sum(errors)] * len(errors)
    ratios = [math.exp(-error) for error in errors]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if mode.endswith("mask"):
        return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
    return [min(max(ratio, low), high) for ratio in ratios]


@pytest.mark.parametrize(
    "mode, bounds", [*((mode, "both") for mode in MODES), ("token_truncate", "max"), ("sequence_mask", "min")]
)
def test_correction_is_grpos_on_the_same_tensors(tmp_path, mode, bounds):
    """Ratio, loss and gradient equal those of GRPO's own code; the ratio also those of a calculation by hand."""
    options = correction(mode, bounds)
    # 1. The same responses of the same engine
    with vllm(noise=0.1) as sampler:
        trainer = ppo_with_vllm(tmp_path / "ppo", **options)
        rollout = trainer._generate_and_score_completions(rows())
    with vllm(noise=0.1):
        grpo = grpo_with_vllm(tmp_path / "grpo", **options)
        batch = grpo._generate_and_score_completions(rows())
    assert torch.equal(rollout.response_ids, batch["completion_ids"])
    # 2. The ratio
    mask = rollout.mask
    ratio = rollout.importance_sampling_ratio
    torch.testing.assert_close(ratio, batch["importance_sampling_ratio"])
    for row, errors in enumerate(sampler.errors):
        expected = torch.tensor(ratio_by_hand(errors, mode, *BOUNDS[bounds]))
        torch.testing.assert_close(ratio.expand_as(mask)[row][mask[row]], expected, rtol=1e-4, atol=1e-5)
    bounded = ratio[mask] if mode.startswith("token") else ratio
    assert not torch.allclose(bounded, torch.ones(()), atol=1e-2)
    # 3. The loss, for advantages per token and a policy that has moved since it sampled
    torch.manual_seed(0)
    advantages = torch.randn(mask.shape) + 0.5
    old_logps = rollout.old_logps - 0.3 * torch.rand(mask.shape)
    batch |= {"advantages": advantages, "old_per_token_logps": old_logps}
    rollout.advantages, rollout.old_logps = advantages, old_logps
    rollout.old_values = rollout.returns = torch.zeros(mask.shape)
    grpo.current_gradient_accumulation_steps = 1
    theirs = grpo._compute_loss(grpo.model, batch)
    theirs.backward()
    part = MicroBatch(rollout, torch.arange(len(rollout)), num_tokens=mask.sum().item(), share=1.0)
    mine = trainer._compute_loss(trainer.model, part)
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in grpo.model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert abs(theirs.item()) > 1e-2


@pytest.mark.parametrize("engine, mode", [("colocate", "token_mask"), ("server", "sequence_truncate")])
def test_probability_that_vllm_does_not_give_is_not_corrected(tmp_path, mode, engine):
    """vLLM may answer NaN for a token; its ratio is 1, and the run goes on."""
    with vllm(noise=0.1, unavailable=1):
        trainer = ppo_run(tmp_path, use_vllm=True, vllm_mode=engine, vllm_importance_sampling_mode=mode, max_steps=1)
    ratio = trainer.run_state.rollout.importance_sampling_ratio.expand_as(trainer.run_state.rollout.mask)
    assert torch.equal(ratio[trainer.run_state.rollout.mask], torch.ones_like(ratio[trainer.run_state.rollout.mask]))
    assert math.isfinite(logged(trainer, "loss")[0])


@pytest.mark.parametrize("more", [{}, {"old_kl_coef": 0.1}, {"kl_placement": "reward"}, {"target_kl": 9.0}], ids=str)
def test_mask_takes_the_ratio_to_what_vllm_sampled_by(tmp_path, more):
    """In the first pass it is the engine's error; π_old is read only for what asks for it."""
    options = {"policy_objective": "mask", "vllm_importance_sampling_correction": False, "cliprange": 0.1}
    with vllm(noise=0.1) as sampler:
        trainer = ppo_trainer(tmp_path, use_vllm=True, max_steps=2, learning_rate=1e-2, **(options | more))
        reads = returned_by(trainer, "_read")
        trainer.train()
    first, _ = [line for line in trainer.state.log_history if "loss" in line]
    ratios = [math.exp(-error) for errors in sampler.errors for error in errors]
    assert first["policy/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    masked = sum(not 0.9 <= ratio <= 1.1 for ratio in ratios)
    assert first["policy/clip_fraction"] == pytest.approx(masked / len(ratios))
    assert 0 < masked < len(ratios)
    rollout = trainer.run_state.rollout
    early = [read.log_probs for read in reads if read.log_probs is not None and read.state_values is not None]
    assert bool(early) == ("kl_placement" in more)
    assert (first["policy/approx_kl"] == 0.0) == bool(more)
    assert torch.equal(rollout.old_logps, rollout.sampling_logps) == (not more)


def test_mask_goes_on_where_vllm_gives_no_probability(tmp_path):
    options = {"policy_objective": "mask", "vllm_importance_sampling_correction": False}
    with vllm(unavailable=2):
        trainer = ppo_run(tmp_path, use_vllm=True, num_ppo_epochs=3, max_steps=3, **options)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) and line["policy/ratio_max"] < 2 for line in lines)
    assert "kl/ref" not in lines[0], "no response has every number"


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_difference_to_vllm_in_an_evaluation_is_averaged_over_tokens_not_batches(tmp_path, mode):
    """Five prompts in batches of 2, 2 and 1; the stand-in knows what it has reported wrongly."""
    options = {"per_device_eval_batch_size": 2, "use_vllm": True, "vllm_importance_sampling_mode": mode}
    options |= {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 1e-6}
    with vllm(noise=0.3, unavailable=4) as sampler:
        trainer = ppo_trainer(tmp_path, {"eval_dataset": tiny.tiny_prompts(5, seed=3)}, response_length=9, **options)
        metrics = trainer.evaluate()
    assert len(sampler.errors) == 5
    known = [[error for i, error in enumerate(errors) if i % 4] for errors in sampler.errors]
    every = [abs(error) for errors in known for error in errors]
    assert metrics[f"eval_{DIFFERENCE}/mean"] == pytest.approx(sum(every) / len(every), rel=1e-3)
    assert metrics[f"eval_{DIFFERENCE}/max"] == pytest.approx(max(every), rel=1e-3)
    if mode == "token_truncate":  # 1 where nothing was reported
        ratios = [math.exp(-error) if i % 4 else 1.0 for errors in sampler.errors for i, error in enumerate(errors)]
    else:
        ratios = [math.exp(-sum(errors)) for errors in known]
    ratio = "eval_sampling/importance_sampling_ratio"
    assert metrics[f"{ratio}/mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    assert metrics[f"{ratio}/min"] == pytest.approx(min(ratios), rel=1e-3)
    assert metrics[f"{ratio}/max"] == pytest.approx(max(ratios), rel=1e-3)
