"""Add up who holds what, by phase: generate, score, learn; and within learning the moment at which most is held."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import memory
from .layout import Hardware, Layout
from .memory import Usage
from .optimizers import Learned
from .shapes import AdapterShape, ModelShape


ROLES = ("actor", "critic", "reward", "reference")


@dataclass(frozen=True)
class Models:
    """
    The sizes of a run's models; `None` where a role has no weights of its own. `adapter` is that of the actor, and of
    every role that is an adapter on its base.
    """

    actor: ModelShape
    critic: ModelShape | None = None
    reward: ModelShape | None = None
    reference: ModelShape | None = None
    adapter: AdapterShape | None = None


@dataclass(frozen=True)
class Phase:
    """
    The fullest `moment` of a phase, "generate", "score" or "learn": bytes on one GPU by role, without those that hold
    nothing, and bytes of no role, such as those of vLLM.
    """

    name: str
    moment: str
    roles: dict[str, Usage]
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(usage.total for usage in self.roles.values()) + self.other


def phases(models: Models, layout: Layout, hardware: Hardware) -> list[Phase]:
    """
    Return the phases of one step: PPO generates, scores and learns; the others learn, DPO with its
    reference inside.
    """
    run = _Run(models, layout, hardware)
    if layout.trainer != "ppo":
        return [run.learn()]
    return [run.generate(), run.score(), run.learn()]


class _Run:
    """What the three phases have in common."""

    def __init__(self, models: Models, layout: Layout, hardware: Hardware):
        self.models, self.layout, self.hardware = models, layout, hardware
        self.adapter: Any = models.adapter  # wherever the layout has one
        self.vllm = memory.vllm(models.actor, layout, hardware)
        self.vllm_beside = 0.0 if layout.vllm_sleeps else self.vllm  # while the others score and learn
        self.learned: dict[str, int] = {}  # parameters, by role
        self.trained = self._trained()
        shapes = [models.actor, *([models.critic] if layout.critic == "model" and models.critic else [])]
        self.engine = memory.zero_buffers(shapes, layout, hardware) + memory.fsdp_buffers(shapes, layout, hardware)
        self.tile = memory.head_tile(models.actor, layout.scored_tokens, hardware.is_cpu)
        self.kept_logits = memory.kept_logits(models.actor, layout.scored_tokens, layout, hardware.is_cpu)

    # ---- What is there all the time ----

    def _trained(self) -> dict[str, Usage]:
        """Return the states of actor and critic, without what a step adds; gradients are those of a whole step."""
        models, layout = self.models, self.layout
        whole = memory.element(layout)
        of_head = models.actor.hidden + 1  # a row and a bias
        head = Learned(of_head, of_head, of_head)

        def states(role: str, frozen: float, trained: Learned, size: int = whole) -> Usage:
            self.learned[role] = trained.parameters
            return memory.trained_states(frozen, trained, size, layout, self.hardware)

        if layout.method == "full":
            roles = {"actor": states("actor", 0, models.actor.learned)}
        else:
            base = memory.weight_bytes(models.actor, layout, 4 if layout.method == "qlora" else 16)
            roles = {"actor": states("actor", base, self.adapter.learned, memory.adapter_element(layout, "actor"))}
        if layout.critic == "model" and models.critic is not None:
            roles["critic"] = states("critic", 0, models.critic.learned)
        elif layout.critic == "adapter":
            trained = self.adapter.learned + head
            roles["critic"] = states("critic", 0, trained, memory.adapter_element(layout, "critic"))
        elif layout.critic == "head":
            roles["critic"] = states("critic", 0, head)
        return roles

    def frozen(self, role: str) -> float:
        """Return the bytes of a frozen role's weights while they are on the GPU."""
        kind, shape = getattr(self.layout, role), getattr(self.models, role)
        if kind == "adapter":
            # An adapter that is switched off costs nothing; a reward adapter has weights and a score head.
            return memory.adapter_element(self.layout, role) * self.adapter.parameters if role == "reward" else 0.0
        if kind == "none" or shape is None:
            return 0.0
        bits = getattr(self.layout, f"{role}_bits")
        size = memory.weight_bytes(shape, self.layout, bits)
        if not self.layout.shards_weights or bits < 16:
            return size
        kept = memory.kept_gathered(shape, self.layout, self.hardware)
        return 0.0 if self.layout.offload_parameters else size / self.hardware.gpus + kept

    def base(self, active: str | None = None) -> dict[str, Usage]:
        """Return the roles at rest, without gradients; an offloaded one is there only while it is `active`."""
        roles = {name: replace(states, gradients=0.0) for name, states in self.trained.items()}
        roles["actor"] += Usage(buffers=self.engine)
        for role in ("reward", "reference"):
            away = self.layout.offload_frozen and getattr(self.layout, role) == "model" and role != active
            if self.frozen(role) and not away:
                roles[role] = Usage(self.frozen(role))
        return roles

    # ---- Phases ----

    def generate(self) -> Phase:
        layout, shape = self.layout, self.models.actor
        roles = self.base()
        if layout.vllm_share:
            return Phase("generate", "vLLM samples", roles, self.vllm)
        gathered = 0.0
        if layout.zero_stage == 3 and layout.gather_for_generation:
            whole = memory.weight_bytes(shape, layout)
            gathered = whole if layout.offload_parameters else whole * (1 - 1 / self.hardware.gpus)
        elif layout.fsdp and self.hardware.gpus > 1:  # its share stays beside the whole
            of_critic = self.models.critic if layout.critic == "model" else None
            gathered = memory.gathered_to_generate(shape, self.adapter, of_critic, layout) - self.engine
        roles["actor"] += Usage(
            activations=memory.forward_activations(shape, layout.rollout * layout.prompt, layout),
            kv_cache=memory.kv_cache(shape, layout.rollout, layout.length, layout),
            logits=memory.SAMPLING_COPIES * 4.0 * layout.rollout * shape.vocab,
            buffers=memory.cast_buffers(shape, layout) + gathered,
        )
        return Phase("generate", "the last token is sampled", roles)

    def score(self) -> Phase:
        """Return the fullest moment: one model at a time reads the rollout."""
        layout, choices = self.layout, []
        tokens, of_answers = layout.scoring
        for role in ("critic", "reward", "reference"):
            kind = getattr(layout, role)
            if kind == "none":
                continue
            shape = getattr(self.models, role) if kind == "model" else self.models.actor
            reading = Usage(activations=memory.forward_activations(shape, tokens, layout))
            if role == "reference":
                tile = memory.head_tile(shape, of_answers, self.hardware.is_cpu)
                reading += Usage(logits=tile)
            if role == "reward":
                reading += Usage(kv_cache=memory.kv_cache(shape, 1, tokens, layout))
            if role == "critic" or kind == "adapter":
                reading += Usage(buffers=memory.cast_buffers(shape, layout))
            else:
                reading += Usage(buffers=memory.fsdp_buffers([shape], layout, self.hardware))
            roles = self.base(active=role)
            roles[role] = roles.get(role, Usage()) + reading
            choices.append(Phase("score", f"the {role} reads the rollout", roles, self.vllm_beside))
        return max(choices, key=lambda phase: phase.total)

    def learn(self) -> Phase:
        # The fused AdamW needs nothing beside states and gradients; DeepSpeed gathers 16-bit weights in a bucket.
        step = self._moment("the optimizer steps", Usage(), Usage(), lambda role: self.trained[role].gradients)
        moments = [self._forward_end(), self._head_backward(), self._backward_end(), step]
        return max(moments, key=lambda phase: phase.total)

    # ---- Moments of learning ----

    def _moment(self, name: str, actor: Usage, critic: Usage, gradients: Callable[[str], float]) -> Phase:
        roles = self.base()
        if self.layout.trainer == "dpo" and self.frozen("reference"):
            roles["reference"] = Usage(self.frozen("reference"))
        for role in self.trained:
            roles[role] += Usage(gradients=gradients(role))
        roles["actor"] += actor
        if "critic" in roles:
            roles["critic"] += critic
        return Phase("learn", name, roles, self.vllm_beside)

    def _held_gradients(self, role: str) -> float:
        """Return the gradients of earlier micro-batches; none if a step has one micro-batch."""
        if self.layout.fsdp:
            return memory.accumulated_gradients(self.learned[role], self.layout)
        held = self.layout.accumulation > 1 or self.layout.zero_stage > 0
        return self.trained[role].gradients if held else 0.0

    def _learner(self, role: str) -> tuple[ModelShape, AdapterShape | None]:
        """Return whose trunk a role learns through; a critic's adapter goes through the actor's base."""
        if role == "critic" and self.layout.critic == "model" and self.models.critic is not None:
            return self.models.critic, None
        return self.models.actor, None if self.layout.method == "full" else self.models.adapter

    def _forward_end(self) -> Phase:
        """Add up the end of the forward pass: all activations are kept; in DPO the reference reads the same rows."""
        layout, reads = self.layout, 0.0
        if layout.trainer == "dpo" and layout.reference != "none":
            reads = memory.forward_activations(self.models.actor, layout.learned_tokens, layout) + self.tile
            if layout.fsdp and self.models.reference is not None and self.hardware.gpus > 1:  # TRL gathers it at once
                reads += memory.compute_bytes(layout) * self.models.reference.parameters
        shape, adapter = self._learner("actor")
        trunk = memory.trunk_activations(shape, layout, adapter)
        actor = Usage(activations=trunk + reads, logits=self.kept_logits, buffers=memory.cast_buffers(shape, layout))
        critic = Usage()
        if "critic" in self.trained and layout.critic != "head":
            shape, adapter = self._learner("critic")
            trunk = memory.trunk_activations(shape, layout, adapter)
            backward = memory.backward_activations(shape, layout, adapter)
            critic = Usage(activations=trunk + backward, buffers=memory.cast_buffers(shape, layout))
        return self._moment("the forward pass ends", actor, critic, self._held_gradients)

    def _head_backward(self) -> Phase:
        """Add up the LM head's backward pass: the critic, last in the forward pass, has its gradients already."""
        layout = self.layout
        shape, adapter = self._learner("actor")
        trunk = memory.trunk_activations(shape, layout, adapter)
        actor = Usage(
            gradients=memory.head_gradient(shape, layout, self.hardware.is_cpu),
            activations=trunk + memory.backward_activations(shape, layout, adapter),
            logits=self.kept_logits + self.tile,
            buffers=memory.cast_buffers(shape, layout),
        )

        def gradients(role: str) -> float:
            return self.trained[role].gradients if role == "critic" else self._held_gradients(role)

        head = "score" if layout.trainer == "reward" else "LM"
        return self._moment(f"the backward pass of the {head} head ends", actor, Usage(), gradients)

    def _backward_end(self) -> Phase:
        """Add up the end of the backward pass: every gradient exists; a tied embedding's is added to the head's."""
        shape, adapter = self._learner("actor")
        layout = self.layout
        embedding = shape.hidden * shape.vocab * memory.element(layout) if layout.method == "full" else 0.0
        beside = embedding if shape.tied or layout.accumulation > 1 else 0.0
        backward = memory.backward_activations(shape, layout, adapter)
        actor = Usage(gradients=beside, activations=backward)
        return self._moment("the backward pass ends", actor, Usage(), lambda role: self.trained[role].gradients)
