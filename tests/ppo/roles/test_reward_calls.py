"""Reward functions that ask a real server on this machine: slow, down, in trouble, and several at once."""

import asyncio
import json
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ppo_runs import ppo_run, ppo_trainer, snapshot
from trl_ext.ppo.roles import reward_calls
from trl_ext.runs.failures import RunError


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Judge(ThreadingHTTPServer):
    """Scores texts by their words. `troubles`: what becomes of the next requests, each a status or seconds to wait."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.troubles, self.asked, self.now, self.most, self.lock = [], [], 0, 0, threading.Lock()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        judge = self.server
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked.append(texts)
            judge.now += 1
            judge.most = max(judge.most, judge.now)
            trouble = judge.troubles.pop(0) if judge.troubles else None
        if isinstance(trouble, float):
            time.sleep(trouble)
        with judge.lock:
            judge.now -= 1
        if isinstance(trouble, int):
            return self.send_error(trouble)
        body = json.dumps([len(text.split()) / 10 for text in texts]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # whoever asked has gone
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(reward_calls, "FIRST_PAUSE", 0.01)


def asks(url, is_async=False):
    def judged(completions, log_metric, log_extra, **kwargs):
        log_metric("asked", 1.0)
        log_extra("words", [len(text.split()) for text in completions])
        request = urllib.request.Request(url, json.dumps(completions).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    async def judged_async(**kwargs):
        return await asyncio.to_thread(judged, **kwargs)

    return judged_async if is_async else judged


def run(folder, judge, is_async=False, **options):
    return ppo_run(folder, {"reward_model": None, "reward_funcs": asks(judge.url, is_async)}, **options)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "troubles, limits",
    [
        ([], {"reward_timeout": 20.0}),
        ([503, 500], {"reward_max_retries": 2}),
        ([0.6], {"reward_max_retries": 1, "reward_timeout": 0.3}),
        ([503, 0.6], {"reward_max_retries": 2, "reward_timeout": 0.3, "reward_max_concurrency": 2}),
    ],
    ids=["in time", "in trouble", "late", "one by one"],
)
def test_run_goes_on_as_with_a_server_that_answers_at_once(tmp_path, judge, is_async, troubles, limits):
    plain = run(tmp_path / "plain", judge, log_completions=True)
    judge.asked.clear()
    judge.troubles[:] = troubles
    patient = run(tmp_path / "patient", judge, is_async, log_completions=True, **limits)
    assert all(torch.equal(weight, snapshot(plain.model)[name]) for name, weight in snapshot(patient.model).items())
    one_by_one = "reward_max_concurrency" in limits
    assert {len(texts) for texts in judge.asked} == ({1} if one_by_one else {4})
    assert len(judge.asked) == (8 if one_by_one else 2) + len(troubles)
    # What a try that failed has logged is not there.
    assert list(patient._logs["extra"]["words"]) == list(plain._logs["extra"]["words"])


def test_no_more_are_asked_at_once_than_the_option_says(tmp_path, judge):
    for at_once in (1, 3):
        judge.most, judge.troubles[:] = 0, [0.05] * 4
        run(tmp_path, judge, reward_max_concurrency=at_once, max_steps=1)
        assert judge.most == at_once


@pytest.mark.parametrize(
    "troubles, limits, said",
    [
        ([500] * 9, {"reward_max_retries": 2}, "3 times in a row at step 1, the last time with HTTPError: .*500"),
        ([1.0], {"reward_timeout": 0.1}, "once at step 1, the last time with no answer within 0.1 s"),
        ([500] * 9, {"reward_max_concurrency": 2}, "once at step 1, the last time with HTTPError"),
    ],
    ids=["in trouble", "late", "one by one"],
)
def test_server_that_stays_down_ends_the_run_which_goes_on_once_it_is_back(
    tmp_path, judge, caplog, troubles, limits, said
):
    options = {"save_strategy": "steps", "save_steps": 1, "num_ppo_epochs": 1, "total_episodes": 12} | limits
    models = {"reward_model": None, "reward_funcs": asks(judge.url)}
    whole = ppo_run(tmp_path / "whole", models, **options)
    trainer = ppo_trainer(tmp_path / "run", models, **options)
    step = trainer.training_step

    def then_down(*args, **kwargs):
        judge.troubles[:] = troubles if trainer.state.global_step == 1 else []
        return step(*args, **kwargs)

    trainer.training_step = then_down
    with pytest.raises(RunError, match=f"The reward function 'judged' has failed {said}") as failed:
        trainer.train()
    assert failed.value.__notes__[0].startswith("checkpoint-1 is complete: `resume_from_checkpoint=")
    retries = limits.get("reward_max_retries", 0)
    assert caplog.text.count("It is asked again in") == retries
    judge.troubles.clear()
    again = ppo_trainer(tmp_path / "run", models, **options)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(weight, snapshot(whole.model)[name]) for name, weight in snapshot(again.model).items())


def test_function_that_cannot_be_asked_for_one_response_is_named(tmp_path):
    def two(completions, **kwargs):
        return [0.0, 1.0]

    with pytest.raises(ValueError, match=r"reward function 'two' is asked for one response at a time.* \[0.0, 1.0\]"):
        ppo_run(tmp_path, {"reward_model": None, "reward_funcs": two}, reward_max_concurrency=2, max_steps=1)
