"""The rows of the table in `docs/vllm.md`, and how vLLM is started on a CPU; needs no vLLM."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


PAGE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
MEASURED = PAGE.parents[1] / "build" / "vllm.json"
HEADING = "| where | case | largest difference, nats | control, nats |\n|---|---|---|---|\n"
WHERE = {
    "colocated": "colocated",
    "server": "server",
    "two": "two processes",
    "packed": "server that packs its weights",
}

# --- how vLLM is started

PACKS = "TRL_EXT_TEST_PACKS_WEIGHTS"  # read by vllm_cpu.py
KV_CACHE = 2**27  # bytes
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # processes of one test would be bound to the same core
    "VLLM_LOGGING_LEVEL": "WARNING",
}
SERVER_FLAGS = [
    *("--weight-transfer-config", json.dumps({"backend": "gloo"})),
    *("--worker-extension-cls", "vllm_cpu.Imported"),
    *("--kv-cache-memory-bytes", str(KV_CACHE), "--enforce-eager"),
]

# --- the rows

Results = dict[str, dict[str, Any]]
IN_FLOAT32 = 1e-4
IN_16_BITS = 0.1


def of_rollouts(result: dict[str, Any]) -> float:
    return max(result["differences"])


def after_the_first(result: dict[str, Any]) -> float:
    """What a control shows in every rollout but the first."""
    return min(result["differences"][1:])


def of_sampling(name: str, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result[name][key]


@dataclass(frozen=True)
class Row:
    """
    Args:
        text: the case in words.
        group, case: of `vllm_runs.py`.
        control: the case that shows what the mistake would look like, of the same group.
        at_most: largest difference that is rounding, nats.
        reads, reads_control: the number of a case's result.
    """

    text: str
    group: str
    case: str
    control: str | None = "sent once"
    at_most: float = IN_FLOAT32
    reads: Callable[[dict[str, Any]], float] = of_rollouts
    reads_control: Callable[[dict[str, Any]], float] = after_the_first

    def difference(self, results: Results) -> float:
        return self.reads(results[self.group][self.case])

    def of_control(self, results: Results) -> float:
        return self.reads_control(results[self.group][self.control])

    def line(self, results: Results) -> str:
        control = "–" if self.control is None else f"{self.of_control(results):.2g}"
        return f"| {WHERE[self.group]} | {self.text} | {self.difference(results):.1e} | {control} |\n"


def sampling_row(name: str) -> Row:
    said = name if name == "all four" else f"`{name}`"
    numbers = of_sampling(name, "difference"), of_sampling(name, "control")
    return Row(
        f"{said} of a request, beside the stand-in of the fast tests",
        "colocated",
        "sampled",
        "sampled",
        IN_FLOAT32,
        *numbers,
    )


ROWS = [
    Row("critic a model, every weight trained", "colocated", "model, full"),
    Row("critic a head, every weight trained", "colocated", "head, full"),
    Row("critic a model, LoRA", "colocated", "model, LoRA", "sent once, LoRA"),
    Row("critic a head, LoRA", "colocated", "head, LoRA", "sent once, LoRA"),
    Row("actor, critic and reward model adapters on one base", "colocated", "adapter, LoRA", "sent once, LoRA"),
    Row("the same, from a saved adapter", "colocated", "adapter, from an adapter", "sent once, LoRA"),
    Row("head tied to the embeddings", "colocated", "tied, full"),
    Row("head tied to the embeddings, LoRA", "colocated", "tied, LoRA", "sent once, LoRA"),
    Row("second `train()`, then the best checkpoint", "colocated", "again"),
    Row("resumed from a checkpoint", "colocated", "resumed", "sent once, LoRA"),
    Row("2 responses to a prompt, 3 in evaluations, temperature 1.3", "colocated", "several"),
    Row("declared and chosen end tokens, temperature 2", "colocated", "ends", None),
    *map(sampling_row, ("top_p", "top_k", "min_p", "repetition_penalty", "all four")),
    Row("bfloat16 weights, engine in bfloat16", "colocated", "bfloat16", None, IN_16_BITS),
    Row(
        "float32, engine in float32; control: in bfloat16, as without `dtype`",
        "colocated",
        "head, full",
        "in 16 bits",
        IN_FLOAT32,
        of_rollouts,
        of_rollouts,
    ),
    Row("critic a model, every weight trained, tied head", "server", "model, full"),
    Row("critic a head, LoRA, tied head", "server", "head, LoRA", "sent once, LoRA"),
    Row(
        "adapters on one base, from a saved adapter, tied head",
        "server",
        "adapter, from an adapter",
        "sent once, LoRA",
    ),
    Row("second `train()`, then the best checkpoint", "server", "again"),
    Row("resumed from a checkpoint", "server", "resumed", "sent once, LoRA"),
    Row("2 responses to a prompt, 3 in evaluations, temperature 1.3", "server", "several"),
    Row("declared and chosen end tokens, temperature 2", "server", "ends", None),
    *(
        Row(
            f"`rollout_lag={lag}`, to the version that sampled; control: to the one that learns",
            "server",
            f"rollout_lag={lag}",
            f"rollout_lag={lag}",
            reads_control=lambda result: min(result["to the learner"][1:]),
        )
        for lag in (1, 2)
    ),
    *(
        Row(
            f"`{name}` of the model's folder; control: left out of the request",
            "server",
            "model, full",
            f"unstated {name}",
            IN_FLOAT32,
            of_rollouts,
            of_rollouts,
        )
        for name in ("temperature", "top_p", "repetition_penalty")
    ),
    Row(
        "tied head, first rollout; control: later ones, in which the head is stale",
        "packed",
        "model, full",
        "model, full",
        reads=lambda result: result["differences"][0],
    ),
    Row("server, critic a model, every weight trained", "two", "server, model, full", None),
    Row("colocated, actor, critic and reward model adapters on one base", "two", "colocated, adapter, LoRA", None),
]


def table(results: Results) -> str:
    return HEADING + "".join(row.line(results) for row in ROWS)


def main() -> None:
    """Print what `make test-vllm` has measured, and write it into the page."""
    said = table(json.loads(MEASURED.read_text(encoding="utf-8")))
    print(said)
    before, _, after = PAGE.read_text(encoding="utf-8").partition(HEADING)
    rest = after.splitlines(keepends=True)
    below = next((i for i, line in enumerate(rest) if not line.startswith("|")), len(rest))
    PAGE.write_text(before + said + "".join(rest[below:]), encoding="utf-8")


if __name__ == "__main__":
    main()
