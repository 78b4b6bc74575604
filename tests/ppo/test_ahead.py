"""Rollouts that a vLLM server is asked for before they are due, with the stand-in as the server."""

import asyncio
import os
import signal
import threading
import time
from itertools import islice

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

import tiny
from fake_vllm import vllm
from ppo_runs import log_lines, logged, ppo_config, ppo_trainer, returned_by
from trl_ext.ppo.ahead.beside import RewardsBeside
from trl_ext.ppo.ahead.rows import rows_ahead
from trl_ext.ppo.ahead.server import ServerQueue
from trl_ext.runs.signals import StoppedBySignal


pytestmark = pytest.mark.integration

LAG, DIFFERENCE = "sampling/rollout_lag", "sampling/sampling_logp_difference/max"
SERVER = {"use_vllm": True, "vllm_mode": "server", "learning_rate": 1e-2, "num_sample_generations": 0}
OF_TIME = ("time", "_per_second", "memory/")


def numbers(trainer, but_not=()):
    """The log without what a clock or the memory says."""
    return [
        {key: value for key, value in line.items() if not any(part in key for part in (*OF_TIME, *but_not))}
        for line in trainer.state.log_history
    ]


def stream():
    return IterableDataset.from_generator(lambda: iter(tiny.tiny_prompts(16)))


@pytest.mark.parametrize(
    "lag, versions", [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2]), (9, [0] * 5)]
)
def test_rollouts_are_sampled_with_the_weights_of_so_many_rollouts_ago(tmp_path, lag, versions):
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, **SERVER, rollout_lag=lag, total_episodes=20)
        trainer.train()
    assert sampler.versions == versions
    assert sampler.calls.count("load") == 5
    lags = [float(rollout - version) for rollout, version in enumerate(versions)]
    assert logged(trainer, LAG) == (lags if lag else [])
    for difference, of_rollout in zip(logged(trainer, DIFFERENCE), lags, strict=True):
        assert (difference < 1e-4) == (of_rollout == 0)


@pytest.mark.parametrize("source", [lambda: tiny.tiny_prompts(10), stream], ids=["dataset", "stream"])
def test_without_learning_all_lags_give_the_same_numbers(tmp_path, source):
    """Over more than two passes over the data: rows, random numbers and the log are those of lag 0."""
    runs = {}
    for lag in (0, 1, 2):
        with vllm() as sampler:
            options = {**SERVER, "learning_rate": 0.0, "rollout_lag": lag, "total_episodes": 28, "num_generations": 2}
            trainer = ppo_trainer(tmp_path / str(lag), {"train_dataset": source()}, **options)
            trainer.train()
            runs[lag] = numbers(trainer, [LAG]), sampler.asked, torch.get_rng_state()
    log, asked, state = runs[0]
    assert len(asked) == 7
    for lag in (1, 2):
        assert runs[lag][0] == log
        assert runs[lag][1] == asked
        assert torch.equal(runs[lag][2], state)


def test_server_generates_the_next_rollout_while_one_is_learned_from(tmp_path):
    """Its answer waits for the optimizer's step: a run that waited for it before would not go on."""
    learned = threading.Event()
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, **SERVER, rollout_lag=1)
        close = trainer._close_optimizer_step

        def closing():
            close()
            learned.set()

        trainer._close_optimizer_step = closing
        in_time = []
        sampler.delay = lambda: in_time.append(len(sampler.versions) == 1 or learned.wait(20))
        trainer.train()
    assert in_time == [True, True]
    (wait, _), (idle, _) = logged(trainer, "time/server_wait"), logged(trainer, "time/server_idle")
    assert wait > 0
    assert idle > 0


@pytest.mark.parametrize("objective", ["clip", "mask"])
def test_ratio_is_to_the_policy_that_sampled(tmp_path, objective):
    """Both policies' log-probabilities come from copies of the actor, by a plain forward pass."""
    corrects = {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_correction": objective == "clip",
        "policy_objective": objective,
    }
    kept = []
    with vllm():
        trainer = ppo_trainer(tmp_path, **SERVER, **corrects, rollout_lag=1, total_episodes=12, kl_coef=0.0)
        rollouts = returned_by(trainer, "_generate_and_score_completions")
        score = trainer._score_with_models

        def keep(rollout):
            actor = tiny.tiny_actor()
            actor.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if "critic" not in k})
            kept.append(actor)
            score(rollout)

        trainer._score_with_models = keep
        trainer.train()

    assert logged(trainer, LAG) == [0.0, 1.0, 1.0]

    def logps(actor, rollout):
        inputs = rollout.model_inputs()
        inputs.pop("labels")
        with torch.no_grad():
            logits = actor(**inputs).logits.log_softmax(-1)
        width = rollout.response_ids.size(1)
        return logits[:, -width - 1 : -1].gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)

    for i, rollout in enumerate(rollouts):
        sampled, now = logps(kept[max(0, i - 1)], rollout), logps(kept[i], rollout)
        mask = rollout.mask
        if objective == "mask":
            torch.testing.assert_close(rollout.sampling_logps[mask], sampled[mask], rtol=1e-4, atol=1e-5)
        else:
            expected = (now - sampled).exp().clamp(max=3.0)
            torch.testing.assert_close(rollout.importance_sampling_ratio[mask], expected[mask], rtol=1e-4, atol=1e-5)
            assert (i == 0) == torch.allclose(expected[mask], torch.ones(()), atol=1e-3)


@pytest.mark.parametrize(
    "stops_at, lag, source",
    [
        pytest.param(2, 1, lambda: tiny.tiny_prompts(10), id="between two rollouts of a dataset"),
        pytest.param(3, 2, lambda: tiny.tiny_prompts(10), id="within a rollout of a dataset"),
        pytest.param(3, 1, stream, id="within a rollout of a stream"),
        pytest.param(2, 2, stream, id="between two rollouts of a stream"),
    ],
)
def test_resumed_run_goes_on_with_what_was_in_flight(tmp_path, lag, stops_at, source):
    """What the server had been asked for is in the checkpoint, answered; the log and the requests go on as without."""
    options = {**SERVER, "rollout_lag": lag, "total_episodes": 16, "save_strategy": "steps", "save_steps": stops_at}
    with vllm() as sampler:
        whole = ppo_trainer(tmp_path, {"train_dataset": source()}, **options)
        whole.train()
    asked = stops_at // 2 + stops_at % 2 + lag
    with vllm(begun=asked) as resumed_sampler:
        trainer = ppo_trainer(tmp_path, {"train_dataset": source()}, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stops_at}"))
    assert resumed_sampler.asked == sampler.asked[asked:]
    assert numbers(trainer)[:-1] == numbers(whole)[:-1]
    assert logged(trainer, LAG) == logged(whole, LAG)


@pytest.mark.parametrize("answers", [True, False], ids=["in time", "too late"])
@pytest.mark.parametrize("comes", ["while the rollout before is learned from", "while the trainer waits"])
def test_signal_saves_what_is_in_flight_or_says_that_it_is_asked_for_again(
    tmp_path, monkeypatch, caplog, comes, answers
):
    """The third request, of four, is answered after the signal: at once, or not before the run has ended."""
    monkeypatch.setattr("trl_ext.ppo.ahead.rollouts.AFTER_SIGNAL", 20.0 if answers else 0.3)
    options = {**SERVER, "rollout_lag": 1, "total_episodes": 16, "save_on_signal": True}
    with vllm() as sampler:
        whole = ppo_trainer(tmp_path / "whole", **options)
        whole.train()
    sent, ended, overslept = threading.Event(), threading.Event(), []
    with vllm() as stopped_sampler:
        trainer = ppo_trainer(tmp_path, **options)
        is_waiting, note, step = comes == "while the trainer waits", trainer._note_step_end, trainer.training_step

        def noting():
            if trainer.state.global_step == 4 and is_waiting:
                sent.set()
            note()

        def learning(*args):
            if trainer.state.global_step == 3 and not is_waiting:
                os.kill(os.getpid(), signal.SIGTERM)
                sent.set()
            return step(*args)

        def in_flight():
            if len(stopped_sampler.versions) == 3:
                assert sent.wait(20)
                if is_waiting:
                    os.kill(os.getpid(), signal.SIGTERM)
                if not answers:
                    overslept.append(ended.wait(20))

        trainer._note_step_end, trainer.training_step, stopped_sampler.delay = noting, learning, in_flight
        try:
            with pytest.raises(StoppedBySignal) as stop:
                trainer.train()
            assert not overslept
        finally:
            ended.set()
    assert stop.value.checkpoint == tmp_path / "checkpoint-4"
    kept = 3 if answers else 2
    said = "Of 1 rollouts that vLLM was asked for ahead, 1 cannot be saved: the 0.3 s that a save waits after a signal"
    assert (said in caplog.text) is not answers
    with vllm(begun=kept) as resumed_sampler:
        resumed = ppo_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=True)
    assert resumed_sampler.asked == sampler.asked[kept:]
    assert logged(resumed, LAG) == [0.0, 1.0, 1.0 if answers else 0.0, 1.0]
    assert (numbers(resumed)[:-1] == numbers(whole)[:-1]) is answers


def test_error_of_the_server_is_the_runs_and_a_resumed_run_asks_again(tmp_path, caplog):
    options = {**SERVER, "rollout_lag": 1, "total_episodes": 16, "save_strategy": "steps", "save_steps": 4}
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, **options)

        def fails():
            if len(sampler.versions) == 3:
                raise ConnectionError("the server is gone")

        sampler.delay = fails
        with pytest.raises(ConnectionError, match="the server is gone"):
            trainer.train()
    assert trainer.state.global_step == 4  # the rollout before it was learned from
    assert "Of 1 rollouts that vLLM was asked for ahead, 1 cannot be saved: the server has failed" in caplog.text
    with vllm(begun=2) as resumed_sampler:
        resumed = ppo_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=True)
    assert resumed_sampler.asked[0] == sampler.asked[2]
    assert logged(resumed, LAG) == [0.0, 1.0, 0.0, 1.0]


def test_steps_that_are_left_out_ask_for_the_same(tmp_path):
    """With `target_kl`: the rollout's other steps pass, and the next one's rows and weights are as without a lag."""
    runs = {}
    for lag in (0, 1):
        with vllm() as sampler:
            options = {"rollout_lag": lag, "total_episodes": 16, "num_ppo_epochs": 3, "target_kl": 1e-9}
            trainer = ppo_trainer(tmp_path / str(lag), **SERVER, **options)
            trainer.train()
            runs[lag] = sampler.asked, sampler.versions
        assert sum(logged(trainer, "policy/steps_left_out")) >= 4
    assert runs[1][0] == runs[0][0]
    assert (runs[0][1], runs[1][1]) == ([0, 1, 2, 3], [0, 0, 1, 2])


def test_first_evaluation_and_the_best_model_have_their_own_weights(tmp_path):
    """A reward that falls with every step makes the first checkpoint the best one."""

    def falls(completions, trainer_state, **kwargs):
        return [float(-trainer_state.global_step)] * len(completions)

    models = {"reward_funcs": falls, "reward_model": None, "eval_dataset": tiny.tiny_prompts(2, seed=3)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward/score", "greater_is_better": True}
    when = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with vllm() as sampler:
        options = {"rollout_lag": 1, "total_episodes": 12, "eval_on_start": True, "num_generations_eval": 1}
        trainer = ppo_trainer(tmp_path, models, **SERVER, **options, **best, **when)
        trainer.train()
        assert trainer.state.best_global_step == 2
        trainer.evaluate()
        sent = dict(sampler.model.named_parameters())
    assert sampler.versions == [0, 0, 0, 1, 1, 2, 3, 4]  # of evaluations the first, fourth, seventh and the two last
    assert max(logged(trainer, f"eval_{DIFFERENCE}")) < 1e-4
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(sent[name], tensor), name


def test_second_run_evaluations_and_an_early_end_have_their_own_weights(tmp_path):
    """What an ended run has left in flight is waited for, and is no part of the next run."""
    held_out = {"eval_dataset": tiny.tiny_prompts(2, seed=3)}
    options = {**SERVER, "rollout_lag": 1, "total_episodes": 12, "eval_strategy": "steps", "eval_steps": 3}
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, held_out, **options)
        trainer.train()
        assert max(logged(trainer, f"eval_{DIFFERENCE}")) < 1e-4
        versions = list(sampler.versions)
        end = trainer._close_optimizer_step

        def ends_early():
            end()
            trainer.control.should_training_stop = True

        trainer._close_optimizer_step = ends_early
        trainer.train()
        assert len(trainer._ahead.queue) == 1  # of three rollouts two were asked for, and one was learned from
        trainer._close_optimizer_step = end
        trainer.train()
        assert max(logged(trainer, f"eval_{DIFFERENCE}")) < 1e-4
    assert logged(trainer, LAG) == [0.0, 1.0, 1.0]
    assert logged(trainer, DIFFERENCE)[0] < 1e-4 < logged(trainer, DIFFERENCE)[1]
    assert versions == [0, 0, 1, 2, 4]  # three rollouts, of which the first two have the first weights; evaluations


def test_error_of_the_server_is_told_once(tmp_path):
    """It is back: an evaluation has nothing to do with what a run has left in flight."""
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, {"eval_dataset": tiny.tiny_prompts(2, seed=3)}, **SERVER, rollout_lag=1)

        def fails():
            if len(sampler.versions) == 2:
                raise ConnectionError("the server is gone")

        sampler.delay = fails
        with pytest.raises(ConnectionError):
            trainer.train()
        sampler.delay = lambda: None
        assert trainer.evaluate()[f"eval_{DIFFERENCE}"] < 1e-4


@pytest.mark.parametrize("save_on_signal", [False, True])
def test_time_in_which_the_trainer_waits_is_logged_as_that(tmp_path, save_on_signal):
    """Also where it waits to note the step's end, which a signal may have to go back to."""
    with vllm() as sampler:
        options = {"rollout_lag": 1, "total_episodes": 12, "save_on_signal": save_on_signal}
        trainer = ppo_trainer(tmp_path, **SERVER, **options)
        sampler.delay = lambda: time.sleep(1.0)
        trainer.train()
    _, *waits = logged(trainer, "time/server_wait")
    _, *generating = logged(trainer, "time/generate")
    assert min(waits) > 0.3
    assert all(phase >= 0.9 * wait for phase, wait in zip(generating, waits, strict=True))


def test_stream_that_workers_read_in_another_order_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.ppo.trainer.load_roles", None)
    shards = IterableDataset.from_generator(
        lambda of: ({"prompt": text} for text in of), gen_kwargs={"of": ["a", "b"]}
    )
    with pytest.raises(ValueError, match=r"2 workers read a stream of 2 shards.*`dataloader_num_workers` to 1 or 0"):
        ppo_trainer(tmp_path, {"train_dataset": shards}, **SERVER, rollout_lag=1, dataloader_num_workers=2)


def test_rows_that_change_when_read_again_are_an_error(tmp_path):
    draws = iter(range(100))
    words = tiny.VOCABULARY[5:]
    changing = IterableDataset.from_generator(lambda: ({"prompt": words[next(draws) % 20]} for _ in range(16)))
    with vllm():
        trainer = ppo_trainer(tmp_path, {"train_dataset": changing}, **SERVER, rollout_lag=1)
        with pytest.raises(ValueError, match=r"other rows when it is read a second time.*`rollout_lag=0`"):
            trainer.train()


def test_options_changed_on_resuming_are_sampled_with(tmp_path, caplog):
    """What was asked for with the old ones is asked for again, and the log says so; with lag 0 too."""
    options = {**SERVER, "rollout_lag": 1, "total_episodes": 12, "save_strategy": "steps", "save_steps": 2}
    for changed, said in ({"temperature": 2.0}, "with other temperature"), ({"rollout_lag": 0}, "is dropped"):
        with vllm():
            ppo_trainer(tmp_path / str(changed), **options).train()
        with vllm() as sampler:
            trainer = ppo_trainer(tmp_path / str(changed), **(options | changed))
            trainer.train(resume_from_checkpoint=str(tmp_path / str(changed) / "checkpoint-2"))
        assert said in caplog.text
        assert {request["temperature"] for request in sampler.requests} == {changed.get("temperature", 1.0)}


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "needs a vLLM server.*`use_vllm=False`"),
        ({"use_vllm": True}, "needs a vLLM server.*`vllm_mode='colocate'`"),
        (SERVER | {"vllm_importance_sampling_correction": False}, "samples of an older policy"),
        (SERVER | {"rollout_lag": -1}, "`rollout_lag`"),
    ],
    ids=str,
)
def test_lag_without_a_server_or_a_correction_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        ppo_config(tmp_path, **({"rollout_lag": 1} | options))


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_takes_part_in_sampling_cannot_be_asked_ahead(tmp_path, monkeypatch, name):
    monkeypatch.setattr("trl_ext.ppo.trainer.load_roles", None)
    given = {name: [len] if name == "tools" else len}
    with pytest.raises(ValueError, match=f"`rollout_lag=1` asks .* `{name}` takes part"):
        ppo_trainer(tmp_path, given, **SERVER, rollout_lag=1)


@pytest.mark.distributed
def test_two_processes_ask_for_the_same_and_are_resumed(of_two_processes):
    measured = of_two_processes["ahead"]
    for source in ("dataset", "stream"):
        then, ahead = measured[source, 0], measured[source, 1]
        assert ahead["asked"] == then["asked"]
        assert ahead["log"] == then["log"]
        assert ahead["lags"] == [0.0, 1.0, 1.0]
    assert measured["resumed"]["asked"] == measured["whole"]["asked"][2:]
    assert measured["resumed"]["log"] == measured["whole"]["log"]
    assert measured["whole"]["log"][2]["sampling/sampling_logp_difference/max"] > 1e-2


# --- reward functions, while reference and critic score


def counts(completions, log_extra, log_metric, **kwargs):
    log_extra("words", [len(text.split()) for text in completions])
    log_metric("batch", float(len(completions)))
    return [len(text) / 10 for text in completions]


async def slow_counts(completions, log_extra, **kwargs):
    await asyncio.sleep(0.01)
    log_extra("words", [-1 for _ in completions])
    return [None if i == 0 else float(len(text.split())) for i, text in enumerate(completions)]


def by_token(completion_ids, **kwargs):
    return [[token % 3 / 10 for token in ids] for ids in completion_ids]


@pytest.mark.parametrize(
    "options",
    [
        {"kl_placement": "reward", "num_mini_batches": 2, "mask_truncated_completions": True},
        {"kl_estimator": "full", "reward_timeout": 30.0, "reward_max_retries": 1},
        {"policy_objective": "mask", "vllm_importance_sampling_correction": False, "num_mini_batches": 2},
        {"policy_objective": "mask", "vllm_importance_sampling_correction": False, "target_kl": 9.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_rewards_asked_beside_the_models_are_those_of_asking_in_turn(tmp_path, options):
    """Functions of each kind and a model: log, table of completions and the rollout are the same numbers."""
    functions = [slow_counts, counts, by_token]  # GRPO asks async ones last
    if "reward_timeout" in options:  # which makes all of them async, and GRPO's order that of their answers
        functions = [counts, slow_counts, by_token]
    runs = {}
    for lag in (0, 1):
        with vllm(noise=0.05):
            settings = {**SERVER, "learning_rate": 0.0, "rollout_lag": lag, "log_completions": True}
            models = {"reward_funcs": functions, "reward_model": tiny.tiny_reward_model()}
            trainer = ppo_trainer(tmp_path / str(lag), models, **(settings | options))
            trainer.train()
        shown = repr(
            [
                trainer._logs["completion"],
                trainer._logs["advantages"],
                *map(dict, (trainer._logs["rewards"], trainer._logs["extra"])),
            ]
        )
        runs[lag] = numbers(trainer, [LAG]), shown, trainer.run_state.rollout.tensors()
    assert len(logged(trainer, "time/reward_wait")) == 2
    assert runs[1][0] == runs[0][0]
    assert runs[1][1] == runs[0][1]
    assert runs[1][2].keys() == runs[0][2].keys()
    for name, tensor in runs[0][2].items():
        assert torch.equal(runs[1][2][name].nan_to_num(), tensor.nan_to_num()), name
    assert {"rewards/counts/mean", "rewards/by_token/std", "batch"} <= trainer.state.log_history[0].keys()


def test_reward_function_runs_while_reference_and_critic_score(tmp_path):
    """It answers only once they have; a run that waited for it before would not go on."""
    scored, in_time = threading.Event(), []

    def waits(completions, **kwargs):
        in_time.append(scored.wait(20))
        return [0.5] * len(completions)

    with vllm():
        trainer = ppo_trainer(
            tmp_path, {"reward_funcs": waits, "reward_model": None}, **SERVER, rollout_lag=1, max_steps=1
        )
        score = trainer._score_with_models

        def scoring(rollout):
            score(rollout)
            scored.set()

        trainer._score_with_models = scoring
        trainer.train()
    assert in_time == [True]


def test_what_a_failed_run_has_scored_is_no_part_of_an_evaluation(tmp_path):
    """The function fails after reference and critic have scored."""
    fails = [True]

    def broken(completions, **kwargs):
        if fails:
            raise ConnectionError("the reward server is down")
        return [0.5] * len(completions)

    models = {"reward_funcs": broken, "reward_model": None, "eval_dataset": tiny.tiny_prompts(2, seed=3)}
    with vllm():
        trainer = ppo_trainer(tmp_path, models, **SERVER, rollout_lag=1, kl_coef=0.0)
        with pytest.raises(ConnectionError):
            trainer.train()
        fails.clear()
        rollouts = returned_by(trainer, "_collect_held_out")
        trainer.evaluate()
    assert [rollout.old_values for rollout in rollouts] == [None]  # an evaluation without a KL asks no critic


@pytest.mark.parametrize("fails", ["a function", "the critic"])
def test_reward_functions_that_have_not_begun_are_not_asked_once_the_run_has_failed(tmp_path, fails):
    asked, failed, before = [], threading.Event(), set(threading.enumerate())

    def first(completions, **kwargs):
        asked.append("first")
        if fails == "a function":
            raise ConnectionError("the reward server is down")
        assert failed.wait(20)
        return [0.5] * len(completions)

    def second(completions, **kwargs):
        asked.append("second")
        return [0.5] * len(completions)

    async def third(completions, **kwargs):
        await asyncio.sleep(0.0 if fails == "a function" else 20.0)
        asked.append("third")
        return [0.5] * len(completions)

    models = {"reward_funcs": [first, second, third], "reward_model": None}
    with vllm():
        trainer = ppo_trainer(tmp_path, models, **SERVER, rollout_lag=1)
        if fails == "the critic":
            next(trainer.critic.parameters()).data.fill_(torch.nan)
        with pytest.raises(ConnectionError if fails == "a function" else FloatingPointError):
            trainer.train()
        failed.set()
        for thread in set(threading.enumerate()) - before - {trainer.async_loop_thread}:
            thread.join(20)
    assert "second" not in asked
    assert ("third" in asked) is (fails == "a function")


def test_thread_of_reward_functions_is_on_the_gpu_of_its_process(monkeypatch):
    """A new thread is on the first GPU, whatever the process has chosen; seen with a stand-in for CUDA."""
    chosen = threading.local()
    chosen.device = 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(chosen, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(chosen, "device", device))
    beside = RewardsBeside({0: lambda completions, **kwargs: [float(torch.cuda.current_device())]}, None)
    sources = [None]
    beside.ask(sources, lambda: sources[0](completions=[""], log_extra=print, log_metric=print))
    (answer,) = beside.answering([None])
    assert answer() == [1.0]


@pytest.mark.parametrize(
    "answer, said", [(float("inf"), "The reward 'fails' is inf"), (None, "reward server is down")]
)
def test_error_of_a_reward_function_in_a_thread_is_the_runs(tmp_path, answer, said):
    def fails(completions, **kwargs):
        if answer is None:
            raise ConnectionError("the reward server is down")
        return [answer] * len(completions)

    with vllm():
        trainer = ppo_trainer(tmp_path, {"reward_funcs": fails, "reward_model": None}, **SERVER, rollout_lag=1)
        with pytest.raises((FloatingPointError, ConnectionError), match=said):
            trainer.train()


# --- mistakes that these tests notice


def test_control_weights_that_are_sent_while_the_server_generates_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(ServerQueue, "wait", lambda self: None)
    with vllm() as sampler:
        trainer = ppo_trainer(tmp_path, **SERVER, rollout_lag=1)
        sampler.delay = lambda: time.sleep(0.1 * len(sampler.versions))
        with pytest.raises(AssertionError, match="while it generates"):
            trainer.train()


def test_control_rows_of_another_rollout_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.ppo.ahead.rollouts.rows_ahead", lambda *args: islice(rows_ahead(*args), 1, None))
    with vllm():
        trainer = ppo_trainer(tmp_path, **SERVER, rollout_lag=1, num_train_epochs=1, total_episodes=None)
        with pytest.raises(ValueError, match="other rows"):
            trainer.train()
    assert log_lines(trainer) == []
