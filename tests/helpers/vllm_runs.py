"""
Runs that are sampled by a real vLLM, in the environment of `make test-vllm`, and how far its log-probabilities are
from the trainer's. `python vllm_runs.py GROUP FOLDER` runs a group of cases and writes what came of it.
"""

import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import four_roles
import ppo_runs
import tiny


DIFFERENCE = "sampling/sampling_logp_difference/max"
WIDTH = {"hidden_size": 64}  # heads of 32, the smallest that vLLM has on a CPU
# Options in the folder that the engine loads, which must not reach what is sampled.
OF_FOLDER = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.3, "repetition_penalty": 3.0}
# What vLLM samples from, where it is not the full distribution; the last cuts in three ways at once.
SAMPLING = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "all four": {"top_p": 0.8, "top_k": 6, "min_p": 0.05, "repetition_penalty": 1.3},
}
Result = dict[str, Any]


def prepare(folder: Path) -> None:
    """Write the models of every case: a base, with a head of its own or tied, and adapters on it; a wider one."""
    tiny.save_tiny(folder / "wide", hidden_size=128)
    for name, tied in {"untied": False, "tied": True}.items():
        paths = four_roles.prepare(folder / name, tie_word_embeddings=tied, **WIDTH)
        (Path(paths["base"]) / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "eos_token_id": 2} | OF_FOLDER)
        )


def whole(paths: dict[str, str], **given: Any) -> dict[str, Any]:
    """Arguments of a trainer that trains a whole model."""
    return {"model": paths["base"], "reward_model": tiny.tiny_reward_model(**WIDTH), **given}


def with_lora(paths: dict[str, str], **given: Any) -> dict[str, Any]:
    return whole(paths, peft_config=four_roles.lora(), **given)


def on_base(paths: dict[str, str], start: bool = False, **given: Any) -> dict[str, Any]:
    """Arguments of a trainer whose reward model, and critic if it is an adapter, are adapters on the actor's base."""
    return four_roles.models(paths, start, quantization=None, **given)


class Runs:
    """
    The trainers of one group of cases.

    Args:
        folder: of `prepare`, with the models that the engine has.
        scratch: where runs are written.
        options: of every trainer of the group: where its engine is.
    """

    def __init__(self, folder: Path, scratch: Path, **options: Any):
        self.paths = {name: str(folder / part) for name, part in four_roles.FOLDERS.items()}
        self.scratch, self.options, self.count = scratch, options, 0

    def trainer(self, models: dict[str, Any], **options: Any) -> Any:
        self.count += 1
        settings = {"use_vllm": True, "learning_rate": 1e-2, "total_episodes": 12, "num_sample_generations": 0}
        settings |= {"use_cpu": True, "bf16": False, "vllm_group_port": 20000 + os.getpid() % 5000 + self.count}
        output = options.pop("output_dir", self.scratch / f"run-{self.count}")
        return ppo_runs.ppo_trainer(output, models, **(settings | self.options | options))

    def rollouts(self, models: dict[str, Any], once: bool = False, **options: Any) -> Result:
        """The largest difference in each of three rollouts, with weights sent before each, or before the first."""
        trainer = self.trainer(models, **options)
        before = ppo_runs.snapshot(trainer.model)
        if once:
            sync = trainer.vllm_generation.sync_weights
            trainer.vllm_generation.sync_weights = lambda: sync() if trainer.state.global_step == 0 else None
        trainer.train()
        moved = ppo_runs.changed(trainer.model, before)
        roles = {"critic" if "critic" in name else "actor" for name in moved}
        return {"differences": ppo_runs.logged(trainer, DIFFERENCE), "learned": sorted(roles)}

    # ---- What a run does beside its rollouts ----

    def again(self) -> Result:
        """A second `train()`, and an evaluation with the weights of a checkpoint that is not the last."""
        held_out = {"eval_dataset": tiny.tiny_prompts(4, seed=3)}
        saves = {"save_strategy": "steps", "save_steps": 2}
        trainer = self.trainer(whole(self.paths, **held_out), **saves, total_episodes=8)
        differences = []
        for _ in range(2):
            trainer.train()
            differences += ppo_runs.logged(trainer, DIFFERENCE)
        trainer.state.best_model_checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-2")
        trainer._load_best_model()
        return {"differences": [*differences, trainer.evaluate()[f"eval_{DIFFERENCE}"]]}

    def resumed(self) -> Result:
        """A run that goes on from a checkpoint, while the engine has the weights of another run."""
        saves = {"save_strategy": "steps", "save_steps": 2, "output_dir": self.scratch / "resumed"}
        self.trainer(with_lora(self.paths), critic="head", **saves).train()
        self.rollouts(whole(self.paths), total_episodes=4)
        trainer = self.trainer(with_lora(self.paths), critic="head", **saves)
        trainer.train(resume_from_checkpoint=str(self.scratch / "resumed" / "checkpoint-2"))
        differences = [
            line[DIFFERENCE] for line in trainer.state.log_history if line["step"] > 2 if DIFFERENCE in line
        ]
        return {"differences": differences}

    @torch.no_grad()
    def ahead(self, lag: int) -> Result:
        """How far rollouts asked ahead are from the policy that sampled them, and from the one that learns."""
        asks = {"rollout_lag": lag, "policy_objective": "mask", "vllm_importance_sampling_correction": False}
        trainer = self.trainer(whole(self.paths), **asks, total_episodes=16)
        result: Result = {"differences": [], "to the learner": []}
        versions: list[dict[str, torch.Tensor]] = []
        score = trainer._score_with_models

        def compare(rollout: Any) -> None:
            versions.append(ppo_runs.snapshot(trainer.model))
            for name, age in (("differences", lag), ("to the learner", 0)):
                write(trainer.model, versions[max(0, len(versions) - 1 - age)])
                logps = trainer._read(trainer.model, rollout, ("log_probs",)).log_probs
                difference = (logps - rollout.sampling_logps)[rollout.mask].abs().max().item()
                result[name].append(difference)
            score(rollout)  # the version that is written last is the one that learns

        trainer._score_with_models = compare
        with torch.enable_grad():
            trainer.train()
        return result | {"lags": ppo_runs.logged(trainer, "sampling/rollout_lag")}

    def several(self) -> Result:
        """Two responses to each prompt, three in each of two evaluations."""
        held_out = {"eval_dataset": tiny.tiny_prompts(3, seed=3)}
        evaluates = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
        options = {"num_generations": 2, "num_generations_eval": 3, "temperature": 1.3}
        trainer = self.trainer(whole(self.paths, **held_out), total_episodes=8, **evaluates, **options)
        trainer.train()
        best, mean = (ppo_runs.logged(trainer, f"eval_reward/{name}") for name in ("best_of_n", "score"))
        held_out = ppo_runs.logged(trainer, f"eval_{DIFFERENCE}")
        return {
            "differences": ppo_runs.logged(trainer, DIFFERENCE) + held_out,
            "groups": trainer.run_state.rollout.groups(),
            "evaluations": len(held_out),
            "answers differ": all(high > low for high, low in zip(best, mean, strict=True)),
        }

    def ends(self) -> Result:
        """Where responses end: at the tokens that model and tokenizer declare, or at a token of the options."""
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.eos_token = "cat"
        declared = {tiny.VOCABULARY.index("<eos>"), tiny.VOCABULARY.index("cat")}
        result: Result = {"differences": []}
        for name, ends, given in (
            ("declared", declared, {"processing_class": tokenizer}),
            ("chosen", {30}, {}),
        ):
            chosen = {"stop_token_id": 30} if name == "chosen" else {}
            trainer = self.trainer(
                whole(self.paths, **given), response_length=60, temperature=2.0, total_episodes=4, **chosen
            )
            trainer.train()
            rollout = trainer.run_state.rollout
            responses = [response for _, response in ppo_runs.sequences(rollout)]
            result["differences"] += ppo_runs.logged(trainer, DIFFERENCE)
            result[name] = {
                "ends": sorted(trainer.eos_token_ids) == sorted(ends),
                "inside": sum(token in ends for response in responses for token in response[:-1]),
                "ended": [response[-1] in ends for response in responses],
                "lengths": [len(response) for response in responses],
                "has_eos": rollout.has_eos.tolist(),
                "tokens": sorted({token for response in responses for token in response}),
            }
        return result

    def unstated(self, name: str) -> Result:
        """The control of `OF_FOLDER`: a request that leaves out an option is sampled with that of the folder."""
        trainer = self.trainer(whole(self.paths), temperature=1.3, total_episodes=4)
        client = trainer.vllm_generation.vllm_client
        client._post = leaving_out(name, client._post)
        trainer.train()
        return {"differences": ppo_runs.logged(trainer, DIFFERENCE)}

    def precision(self) -> Result:
        """The dtype of the engine that is started for a trainer."""
        ways = {
            "float32": {},
            "bfloat16": {"model_init_kwargs": {"dtype": "bfloat16"}},
            "autocast": {"bf16": True},
        }
        trainers = {name: self.trainer(whole(self.paths), **options) for name, options in ways.items()}
        engines = {name: each.vllm_generation.llm.llm_engine for name, each in trainers.items()}
        return {"engines": {name: str(engine.model_config.dtype) for name, engine in engines.items()}}

    def in_16_bits(self) -> Result:
        """The control: the engine's dtype is left to vLLM, as TRL leaves it."""
        with mock.patch("trl_ext.ppo.trainer.colocated_engines", return_value=nullcontext()):
            return self.rollouts(whole(self.paths), critic="head")

    def with_critic(self) -> Result:
        """What the engine says of a critic that is sent with the actor."""
        with mock.patch("trl_ext._trl.exclude_from_weight_sync"):
            trainer = self.trainer(whole(self.paths))
        try:
            trainer.train()
        except Exception as error:  # of vLLM, which does not know the name
            return {"error": f"{type(error).__name__}: {error}"}
        return {"error": ""}

    def refused(self) -> Result:
        """What is said of a server that does not fit, before a model is loaded."""
        wide = {"model": str(Path(self.paths["base"]).parents[1] / "wide" / "actor")}
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            cases = {
                "model": (whole(self.paths) | wide, {}),
                "dtype": (whole(self.paths), {"model_init_kwargs": {"dtype": "bfloat16"}}),
                "length": (whole(self.paths), {"response_length": 110}),
                "port": (whole(self.paths), {"vllm_group_port": taken.getsockname()[1]}),
            }
            return {name: self.error_of(*case) for name, case in cases.items()}

    def error_of(self, models: dict[str, Any], options: dict[str, Any]) -> str:
        with mock.patch("trl_ext.ppo.trainer.load_roles", side_effect=AssertionError("a model is loaded")):
            try:
                self.trainer(models, **options)
            except ValueError as error:
                return str(error)
        return ""

    @torch.no_grad()
    def sampled(self) -> Result:
        """
        For each of `SAMPLING`, how far the engine's log-probabilities are from those that the stand-in of the fast
        tests would give, and from those of the full distribution.
        """
        from vllm import SamplingParams

        from fake_vllm import processed

        trainer = self.trainer(whole(self.paths))
        trainer.vllm_generation.sync_weights()
        prompts = [trainer.processing_class(text)["input_ids"] for text in tiny.tiny_prompts(6, seed=5)["prompt"]]
        result = {}
        for name, options in SAMPLING.items():
            request = SamplingParams(temperature=1.3, max_tokens=12, logprobs=0, ignore_eos=True, seed=3, **options)
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            outputs = trainer.vllm_generation.llm.generate(inputs, request, use_tqdm=False)
            differences, plain = [], []
            for ids, output in zip(prompts, outputs, strict=True):
                sampled = list(output.outputs[0].token_ids)
                logits = trainer.model(torch.tensor([ids + sampled])).logits[0]
                for i, token in enumerate(sampled):
                    said = output.outputs[0].logprobs[i][token].logprob
                    before = ids + sampled[:i]
                    expected = processed(logits[len(before) - 1], before, 1.3, **options)
                    differences.append(abs(said - expected.log_softmax(0)[token].item()))
                    plain.append(abs(said - (logits[len(before) - 1] / 1.3).log_softmax(0)[token].item()))
            result[name] = {"difference": max(differences), "control": max(plain)}
        return result


@torch.no_grad()
def write(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def leaving_out(name: str, post: Callable[..., Any]) -> Callable[..., Any]:
    """`post` of TRL's client, without one option of the request."""

    def without(url: str, json: dict[str, Any] | None = None, **others: Any) -> Any:
        return post(url, json={key: value for key, value in (json or {}).items() if key != name}, **others)

    return without


# --- groups of cases: each is one process, or two


def colocated(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    runs = Runs(folder / "untied", scratch, vllm_mode="colocate")
    tied = Runs(folder / "tied", scratch / "tied", vllm_mode="colocate")
    paths = runs.paths
    yield "model, full", lambda: runs.rollouts(whole(paths))
    yield "head, full", lambda: runs.rollouts(whole(paths), critic="head")
    yield "model, LoRA", lambda: runs.rollouts(with_lora(paths))
    yield "head, LoRA", lambda: runs.rollouts(with_lora(paths), critic="head")
    yield "adapter, LoRA", lambda: runs.rollouts(on_base(paths), critic="adapter")
    yield "adapter, from an adapter", lambda: runs.rollouts(on_base(paths, start=True), critic="adapter")
    yield "sent once", lambda: runs.rollouts(whole(paths), once=True)
    yield "sent once, LoRA", lambda: runs.rollouts(with_lora(paths), critic="head", once=True)
    yield "again", runs.again
    yield "resumed", runs.resumed
    yield "several", runs.several
    yield "ends", runs.ends
    yield "sampled", runs.sampled
    yield "tied, full", lambda: tied.rollouts(whole(tied.paths))
    yield "tied, LoRA", lambda: tied.rollouts(with_lora(tied.paths), critic="head")
    yield "precision", runs.precision
    in_bf16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
    yield "bfloat16", lambda: runs.rollouts(whole(paths), critic="head", **in_bf16)
    yield "in 16 bits", runs.in_16_bits
    yield "with the critic", runs.with_critic


def server(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """With a server that has the tied model."""
    runs = Runs(folder / "tied", scratch, vllm_mode="server", vllm_server_base_url=os.environ["SERVER"])
    paths = runs.paths
    yield "model, full", lambda: runs.rollouts(whole(paths))
    yield "head, LoRA", lambda: runs.rollouts(with_lora(paths), critic="head")
    yield "adapter, from an adapter", lambda: runs.rollouts(on_base(paths, start=True), critic="adapter")
    yield "sent once", lambda: runs.rollouts(whole(paths), once=True)
    yield "sent once, LoRA", lambda: runs.rollouts(with_lora(paths), critic="head", once=True)
    yield "again", runs.again
    yield "resumed", runs.resumed
    yield "several", runs.several
    yield "ends", runs.ends
    for lag in (1, 2):
        yield f"rollout_lag={lag}", functools.partial(runs.ahead, lag)
    for name in ("temperature", "top_p", "repetition_penalty"):
        yield f"unstated {name}", functools.partial(runs.unstated, name)
    yield "refused", runs.refused


def packed(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """With a server that packs its weights: the tied head keeps the first ones."""
    runs = Runs(folder / "tied", scratch, vllm_mode="server", vllm_server_base_url=os.environ["SERVER"])
    yield "model, full", lambda: runs.rollouts(whole(runs.paths))


def two(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """In each of two processes: an engine beside each, or one server."""
    served = {"vllm_mode": "server", "vllm_server_base_url": os.environ["SERVER"]}
    beside = Runs(folder / "untied", scratch, vllm_mode="colocate")
    apart = Runs(folder / "tied", scratch / "tied", **served)
    yield "server, model, full", lambda: apart.rollouts(whole(apart.paths), total_episodes=24)
    yield (
        "colocated, adapter, LoRA",
        lambda: beside.rollouts(on_base(beside.paths), critic="adapter", total_episodes=24),
    )


GROUPS = {"colocated": colocated, "server": server, "packed": packed, "two": two}


def main(group: str, folder: Path) -> None:
    """Run the cases of a group; the first process writes what came of each as soon as it has ended."""
    import vllm_cpu

    vllm_cpu.share_engines()
    vllm_cpu.send_by_gloo()
    results = {}
    for name, case in GROUPS[group](folder, folder / f"runs-{group}"):
        begun = time.monotonic()
        results[name] = case() | {"seconds": round(time.monotonic() - begun, 1)}
        if int(os.environ.get("RANK", 0)) == 0:
            (folder / f"{group}.json").write_text(json.dumps(results, indent=1))
            print(name, results[name], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
