"""The runs of PPO on two processes that take long, in one launch: four roles, vLLM, and frozen models that wait."""

import four_roles
import frozen_layouts
import tiny
import vllm_layouts
import zero_runs


ENGINES = [(vllm_layouts, "ddp"), (vllm_layouts, "zero3"), (frozen_layouts, "ddp"), (frozen_layouts, "zero2")]


def prepare(folder):
    """Writes the models."""
    for name in ("roles", "vllm", "frozen"):
        (folder / name).mkdir()
    four_roles.prepare(folder / "roles")
    tiny.save_tiny(folder / "vllm")
    frozen_layouts.save(folder / "frozen")


def measure(folder):
    measured = {"four roles": four_roles.measure(folder / "roles")}
    for runs, engine in ENGINES:
        name = runs.__name__.removesuffix("_layouts")
        with zero_runs.launched({}):
            measured[f"{name}, {engine}"] = runs.measure(folder / name, engine)
    return measured
