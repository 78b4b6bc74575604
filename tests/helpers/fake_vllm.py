"""
Stand-ins for vLLM: a colocated engine and the client of a server, as strict as vLLM. They sample from a tiny actor of
their own, made of nothing but the weights that they are sent, and note every call.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from trl.generation import vllm_generation

import tiny


class Sampler:
    """
    The model inside vLLM.

    Args:
        noise: standard deviation of what its log-probabilities are off by, as kernels of their own would have it.
        unavailable: every so many tokens the log-probability is NaN; 0 for never.
        folder: sampling options in the `generation_config.json` of the folder that it was loaded from.
        server: what a server reports of its model, where it is not what the tiny models have.
        begun: generations before these, of a run that is resumed, so that random numbers go on.

    Attributes:
        versions: of each generation, how often weights were sent before, from 0.
        asked: the prompts of each generation.
        delay: called by a server before it answers.
    """

    def __init__(
        self,
        noise: float = 0.0,
        unavailable: int = 0,
        model: nn.Module | None = None,
        folder: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        begun: int = 0,
    ):
        self.begun, self.versions, self.asked = begun, [], []
        self.delay: Callable[[], None] = lambda: None
        self.is_generating = False
        self.folder, self.server = folder or {}, server or {}
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []  # the sampling options of each generation
        self.errors: list[list[float]] = []  # of each response: reported minus true log-probability, per token
        self.noise, self.unavailable = noise, unavailable
        self.model = (model or tiny.tiny_actor(9)).requires_grad_(False).eval()
        self.forget()

    def forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.fill_(torch.nan)

    def load(self, named: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
        """Takes weights by name; an unknown name or another shape is an error, as in vLLM."""
        mine, taken = dict(self.model.named_parameters()), []
        for name, tensor in named:
            assert mine[name].shape == tensor.shape
            mine[name].copy_(tensor)
            taken.append(name)
        return taken

    def sample(self, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], list[float]]]:
        """A response to each prompt, and its log-probabilities after temperature."""
        assert not any(parameter.isnan().any() for parameter in self.model.parameters()), "weights are missing"
        self.requests.append(options)
        self.versions.append(self.calls.count("load") - 1)
        self.asked.append(prompts)
        generator = torch.Generator().manual_seed(self.begun + len(self.requests))
        return [self._respond(prompt, generator, **options) for prompt in prompts]

    def _respond(
        self,
        prompt: list[int],
        generator: torch.Generator,
        *,
        max_tokens: int,
        temperature: float,
        stop_token_ids: list[int] = (),
        ignore_eos: bool = False,
        **others: Any,
    ) -> tuple[list[int], list[float]]:
        allowed = {"n", "logprobs", *PENALTIES_AND_CUTS}
        assert others.keys() <= allowed, f"this stand-in does not know {others.keys() - allowed}"
        stops = {*stop_token_ids, *([] if ignore_eos else [self.model.config.eos_token_id])}
        ids, logps, errors = list(prompt), [], []
        while len(logps) < max_tokens and not (logps and ids[-1] in stops):
            logits = processed(self.model(torch.tensor([ids])).logits[0, -1], ids, temperature, **others)
            ids.append(torch.multinomial(logits.softmax(0), 1, generator=generator).item())
            errors.append(self.noise * torch.randn((), generator=generator).item())
            missing = self.unavailable and len(logps) % self.unavailable == 0
            logps.append(math.nan if missing else logits.log_softmax(0)[ids[-1]].item() + errors[-1])
        self.errors.append(errors)
        return ids[len(prompt) :], logps


PENALTIES_AND_CUTS = ("top_p", "top_k", "min_p", "repetition_penalty")


def processed(
    logits: torch.Tensor,
    ids: list[int],
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    **others: Any,
) -> torch.Tensor:
    """(V,) logits of the next token as vLLM samples from them: penalties, temperature, then what is cut off."""
    seen = torch.unique(torch.tensor(ids))
    penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = logits.index_copy(0, seen, penalised[seen]) / temperature
    probabilities = logits.softmax(0)
    logits = logits.masked_fill(probabilities < min_p * probabilities.max(), -math.inf)
    order = logits.argsort(descending=True)
    if top_k > 0:
        logits = logits.index_fill(0, order[top_k:], -math.inf)
    ranked = logits[order].softmax(0)  # top_p is a share of what the others have left
    return logits.index_fill(0, order[ranked.cumsum(0) - ranked >= top_p], -math.inf)


class Engine:
    """Plays `vllm.LLM`."""

    def __init__(self, sampler: Sampler, **options: Any):
        self.sampler, self.options = sampler, options
        self.asleep: set[str] = set()
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker, model_config=SimpleNamespace(max_model_len=128))
        sampler.calls.append("start")

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" not in self.asleep
        self.sampler.load(iter(named))
        if self.sampler.calls[-1] != "load":
            self.sampler.calls.append("load")

    def reset_prefix_cache(self) -> None:
        self.sampler.calls.append("reset")

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.asleep, f"{tags} are awake"
        self.asleep -= set(tags)
        self.sampler.calls.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        assert level == 2
        self.asleep = {"weights", "kv_cache"}
        self.sampler.forget()
        self.sampler.calls.append("sleep")

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        assert not self.asleep
        self.sampler.calls.append("generate")
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        answers = self.sampler.sample(ids, **vars(sampling_params))
        return [self._output(prompt, *answer) for prompt, answer in zip(ids, answers, strict=True)]

    @staticmethod
    def _output(prompt: list[int], ids: list[int], logps: list[float]) -> Any:
        per_token = [{token: SimpleNamespace(logprob=logp, rank=1)} for token, logp in zip(ids, logps, strict=True)]
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=per_token)])


class Client:
    """Plays `trl.generation.vllm_client.VLLMClient`, and the server behind it."""

    def __init__(self, sampler: Sampler, **options: Any):
        self.sampler, self.options = sampler, options
        sampler.calls.append("connect")

    def init_communicator(self, device: Any) -> None:
        self.sampler.calls.append("join")

    def get_server_info(self) -> dict[str, Any]:
        reported = {"model": "/nowhere", "dtype": "torch.float32", "max_model_len": 128}
        return {"model_config": reported | {"logprobs_mode": "processed_logprobs"} | self.sampler.server}

    def update_named_params(self, metadata: list[tuple], named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert not self.sampler.is_generating, "weights are sent to a server while it generates"
        self.sampler.calls.append("load")
        assert self.sampler.load(named_params) == [name for name, _, _ in metadata]

    def reset_prefix_cache(self) -> None:
        self.sampler.calls.append("reset")

    def generate(self, prompts: list[list[int]], features: Any, n: int, generation_kwargs: dict, **options: Any):
        self.sampler.calls.append("generate")
        repeated = [prompt for prompt in prompts for _ in range(n)]
        assert options.pop("structured_outputs_regex", None) is None
        # An option that a request does not state is the folder's.
        assert not self.sampler.is_generating, "requests of a trainer come one after the other"
        self.sampler.is_generating = True
        try:
            answers = self.sampler.sample(repeated, n=n, **(self.sampler.folder | options | generation_kwargs))
            self.sampler.delay()
        finally:
            self.sampler.is_generating = False
        return {
            "prompt_ids": prompts,
            "completion_ids": [ids for ids, _ in answers],
            # A server writes JSON, which has no NaN.
            "logprobs": [[[None if math.isnan(logp) else logp] for logp in logps] for _, logps in answers],
        }


@contextmanager
def vllm(**options: Any) -> Iterator[Sampler]:
    """Within the context, TRL finds vLLM installed: the stand-ins above, around the sampler that it yields."""
    sampler = Sampler(**options)
    names = {
        "is_vllm_available": lambda: True,
        "LLM": lambda **kwargs: Engine(sampler, **kwargs),
        "SamplingParams": SimpleNamespace,
        "VLLMClient": lambda **kwargs: Client(sampler, **kwargs),
    }
    with (
        mock.patch.multiple(vllm_generation, create=True, **names),
        mock.patch("trl_ext.ppo.vllm.check_ports"),  # the stand-in listens at none
        mock.patch.dict(os.environ),  # TRL sets RANK and others for vLLM; outside they are as before
    ):
        yield sampler
