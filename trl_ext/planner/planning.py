"""A plan: the phases of a run, what is needed, whether it fits, and what would make it fit."""

from dataclasses import dataclass

from . import memory
from .layout import Hardware, Layout
from .phases import Models, Phase, phases
from .shapes import adapter_shape, model_shape


@dataclass(frozen=True)
class ModelNames:
    """Names of the models; unset, the sizes are the actor's, and the critic's the reward model's."""

    actor: str
    reward: str | None = None
    reference: str | None = None
    critic: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run needs: `phases` on one GPU, and `host` bytes of one node's memory."""

    names: ModelNames
    layout: Layout
    hardware: Hardware
    models: Models
    phases: list[Phase]
    host: float

    @property
    def peak(self) -> Phase:
        """Return the phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def needed(self) -> float:
        """Return the bytes on one GPU, with what the allocator and the device's context take."""
        return self.peak.total * (1 + self.hardware.fragmentation) + self.hardware.context

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory and self.host <= self.hardware.host_memory


def models_of(names: ModelNames, layout: Layout) -> Models:
    """Return the sizes of the models that a layout has."""
    actor = model_shape(names.actor, with_score=layout.trainer == "reward")
    reward = names.reward or names.actor

    return Models(
        actor=actor,
        critic=model_shape(names.critic or reward, with_score=True) if layout.critic == "model" else None,
        reward=model_shape(reward, with_score=True) if layout.reward == "model" else None,
        reference=model_shape(names.reference or names.actor) if layout.reference == "model" else None,
        adapter=None if layout.method == "full" else adapter_shape(names.actor, layout.rank, layout.targets),
    )


def plan(names: ModelNames | str, layout: Layout, hardware: Hardware) -> Plan:
    """
    Plan a run from its models' configs; nothing is loaded. `names` may be that of the actor alone.

    Raises:
        ValueError: when a config cannot be read.
    """
    names = ModelNames(names) if isinstance(names, str) else names
    models = models_of(names, layout)
    return Plan(names, layout, hardware, models, phases(models, layout, hardware), _host(models, layout, hardware))


def _host(models: Models, layout: Layout, hardware: Hardware) -> float:
    """Return the bytes of one node's host memory: what DeepSpeed offloads, and frozen models that wait."""
    critic = models.critic.parameters if models.critic is not None else 0
    of_actor = models.actor.parameters if models.adapter is None else models.adapter.parameters
    base = 0.0 if models.adapter is None else memory.weight_bytes(models.actor, layout)
    host = memory.host_states(of_actor + critic, base, layout, hardware)
    away = sum(memory.weight_bytes(shape, layout) for shape in (models.reward, models.reference) if shape is not None)
    if layout.offload_parameters:
        host += away / hardware.nodes
    elif layout.offload_frozen:
        host += away * hardware.on_node
    return host
