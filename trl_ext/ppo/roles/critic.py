"""
The critic V(s): built, attached to the actor as a submodule, split off when the actor is saved, restored.

The three kinds have the same methods, so that only the code that builds a critic knows its kind: `attach` makes it a
submodule of the actor, in one engine and optimizer; `settle` tries out how the model is read; `values_at` gives state
values (N,) at the N True `positions` (B, L - 1); `save_pretrained` and `restore` write and load a folder.
"""

import copy
import fnmatch
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..._trl import create_model_from_path
from ...models.fingerprint import is_same, why_unknown
from ...models.loading import base_of, is_quantized, read_config, restore_weights
from ...models.noise import disable_noise
from ...models.precision import keep_4_bit_differentiable
from ...models.probe import in_mode, probe_rows
from ...models.scoring_head import trunk_of
from ...models.sharding import copy_of, copy_weights, fill_zeros, is_partitioned
from ...models.trainable import lend
from .adapters import CRITIC, REWARD, cast_adapter, restore_adapter, save_adapter, stand_on
from .state_values import StateValues, last_linear


logger = logging.get_logger(__name__)

Groups = Sequence[Sequence[int]]

ATTRIBUTE = CRITIC
FOLDER = "critic"
POLICY = "policy.json"  # the policy that a critic was pretrained on, beside it


class ValueHead(nn.Module):
    """
    A linear map from the actor's trunk states (N, H) to state values (N,), in float32 and 0 at the start.

    Actor and critic share the trunk, as in Schulman 2017 (arXiv:1707.06347, §5, eq. 9).
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return state values (N,), in the unit of the returns, from trunk states (N, H)."""
        weight, bias = self.score.weight.float(), self.score.bias.float()
        return nn.functional.linear(states.float(), weight, bias).squeeze(-1)

    needs_states = True  # of the actor's trunk, at the scored positions
    stops_gradient = False  # of the value loss, before the actor's trunk
    packing = None  # it reads no rows
    loading_lines = 'from trl_ext import ValueHead\n\ncritic = ValueHead.from_pretrained(f"{folder}/critic")'

    def values_at(self, positions: Tensor, states: Tensor, groups: Groups, **inputs: Any) -> Tensor:
        return self(states.detach() if self.stops_gradient else states)

    def attach(self, actor: Any, checkpointing: dict[str, Any] | None) -> None:
        _add_to(actor, self)

    def settle(self, packs: bool, shares: bool, autocast: Callable) -> None:
        """Do nothing: the actor's states need no trial."""

    def restore(self, folder: str | Path) -> None:
        self.load_state_dict(ValueHead.from_pretrained(folder).state_dict())

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `model.safetensors` and `config.json` for `from_pretrained`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in (state_dict or self.state_dict()).items()}
        save_file(tensors, Path(folder) / SAFE_WEIGHTS_NAME)
        (Path(folder) / "config.json").write_text(json.dumps({"hidden_size": self.score.in_features}))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ValueHead":
        """Load what `save_pretrained` wrote; raise `FileNotFoundError` when the folder holds no value head."""
        tensors = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
        head = cls(**json.loads((Path(folder) / "config.json").read_text()), dtype=tensors["score.weight"].dtype)
        head.load_state_dict(tensors)
        return head


class ValueModel(nn.Module):
    """
    A critic that is a model: a sequence classification model with one label, read at every position.

    Args:
        model: e.g. `LlamaForSequenceClassification`; its trunk and its `score` head are used as they are.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.values = StateValues(model, "the critic")
        self.packing = self.values.packing

    needs_states = False  # of the actor's trunk, at the scored positions
    loading_lines = (
        "from transformers import AutoModelForSequenceClassification\n\n"
        'critic = AutoModelForSequenceClassification.from_pretrained(f"{folder}/critic")'
    )

    def values_at(self, positions: Tensor, states: Tensor | None, groups: Groups, **inputs: Any) -> Tensor:
        return self.values.at(positions, groups, **inputs)

    def attach(self, actor: Any, checkpointing: dict[str, Any] | None) -> None:
        _add_to(actor, self)

    def settle(self, packs: bool, shares: bool, autocast: Callable) -> None:
        self.values.settle(packs, shares, autocast)

    def restore(self, folder: str | Path) -> None:
        model: Any = self.model
        if hasattr(model, "from_pretrained"):
            restore_weights(model, folder)
        else:
            model.load_state_dict(load_file(Path(folder) / SAFE_WEIGHTS_NAME))

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """
        Write a folder that `AutoModelForSequenceClassification` loads. A user's own class without `save_pretrained`
        gets `model.safetensors`, and `config.json` if its config is one of transformers'.
        """
        tensors = _of_model(state_dict)
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(folder, state_dict=tensors)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = self.model.state_dict() if tensors is None else tensors
        # Cloned, as a file cannot hold one tensor under two names.
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, Path(folder) / SAFE_WEIGHTS_NAME)
        if isinstance(self.model.config, PretrainedConfig):
            self.model.config.save_pretrained(folder)


class ValueAdapter(nn.Module):
    """
    A critic that is an adapter with a score head on the actor's base.

    Args:
        model: a `PeftModel` around a sequence classification model, as `critic_adapter` makes it.
    """

    def __init__(self, model: PeftModel):
        super().__init__()
        self.model = model
        self.values = StateValues(model.get_base_model(), "the critic")
        self.packing = self.values.packing

    needs_states = False  # of the actor's trunk, at the scored positions
    loading_lines = (
        "from peft import AutoPeftModelForSequenceClassification\n\n"
        'critic = AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/critic", num_labels=1)'
    )

    def values_at(self, positions: Tensor, states: Tensor | None, groups: Groups, **inputs: Any) -> Tensor:
        return self.values.at(positions, groups, **inputs)

    def attach(self, actor: Any, checkpointing: dict[str, Any] | None) -> None:
        """
        Become a submodule of the actor's wrapper, on the actor's base.

        Args:
            checkpointing: options of gradient checkpointing, which the Trainer sets for the actor's modules alone;
                None without it.
        """
        cast_adapter(self, actor)
        stand_on(actor, self, ATTRIBUTE)
        if checkpointing is not None:
            model: Any = self.model.get_base_model()
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(checkpointing or None)

    def settle(self, packs: bool, shares: bool, autocast: Callable) -> None:
        self.values.settle(packs, shares, autocast)

    def restore(self, folder: str | Path) -> None:
        restore_adapter(self.model, folder)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that `AutoPeftModelForSequenceClassification` loads, and `value_model` takes."""
        save_adapter(self.model, folder, _of_model(state_dict))


Critic = ValueHead | ValueModel | ValueAdapter


def _of_model(state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the tensors of a critic under their names in its `model`."""
    if state_dict is None:
        return None
    return {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}


def check_value_model(model: Any) -> None:
    """Raise `ValueError` for a model that writes text, is quantised, or has several labels."""
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        raise ValueError(
            f"The value model is a {type(model).__name__}, which writes text and has no score head. Pass a sequence "
            "classification model with one label, or `critic='head'` for a value head on the actor's trunk."
        )
    if is_quantized(model):
        raise ValueError(
            "The critic would be a quantised model, which cannot be trained. Pass a `value_model` in full precision, "
            "or `critic='head'` for a value head on the actor's trunk."
        )
    if not hasattr(model, "config"):
        raise ValueError(
            f"The value model {type(model).__name__} has no `config`: give it one (`vocab_size`, `num_labels=1`, "
            "`pad_token_id`), or choose `critic='head'` for a value head on the actor's trunk."
        )
    _check_single_value(getattr(model.config, "num_labels", 1))


def is_value_head(folder: Any) -> bool:
    """Return whether a folder holds what `ValueHead.save_pretrained` wrote."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text()) if isinstance(folder, str) else None
    except (OSError, ValueError):  # no folder, or a damaged config, which is said where the model is loaded
        return False
    return isinstance(config, dict) and config.keys() == {"hidden_size"}


def check_pretrained(folder: str, kind: str, policy: Callable[[], dict[str, str | None]]) -> None:
    """
    Raise `ValueError` for a critic that `trl-ext critic` has pretrained on another `policy` than the run's: a head
    reads the states of its trunk, and every critic has learned what that policy's responses are worth. Where the two
    cannot be compared, warn. A critic without `policy.json` was not pretrained on one.
    """
    file = Path(folder) / POLICY
    if not file.is_file():
        return
    then, now = json.loads(file.read_text(encoding="utf-8")), policy()
    same = is_same(then, now)
    if same:
        return
    of_another = (
        "a value head that reads the states of another trunk says nothing" if kind == "head" else
        "another policy's responses have other values"
    )  # fmt: skip
    if same is None:
        logger.warning(
            f"Whether the critic in {folder} (`value_model`) was pretrained on this run's actor is unknown: "
            f"{why_unknown(then, now)}. If it was not, {of_another}; `value/explained_variance_mc` shows it."
        )
        return
    way_out = "" if kind == "head" else f"; or, to let this one learn the difference in PPO, remove {file}"
    raise ValueError(
        f"The critic in {folder} (`value_model`) was pretrained on {then['name']}, whose weights are not those of the "
        f"actor {now['name']}: {str(then['weights'])[:12]}… against {str(now['weights'])[:12]}… It would mislead the "
        f"actor: {of_another}. Pretrain one on this actor with `trl-ext critic`{way_out}."
    )


def check_value_checkpoint(path: str, trust_remote_code: bool = False) -> None:
    """Raise `ValueError`, from the config alone, for a score head of several labels; without one it gets one."""
    if is_value_head(path):
        raise ValueError(f"The folder {path} (`value_model`) holds a value head: choose `critic='head'`.")
    config = read_config(path, "value_model", trust_remote_code=trust_remote_code)
    if "ForSequenceClassification" in (config.architectures or [""])[0]:
        _check_single_value(config.num_labels)


def _check_single_value(num_labels: int) -> None:
    if num_labels != 1:
        raise ValueError(
            f"The value model has {num_labels} labels; a state has one value. Load it with `num_labels=1`."
        )


def build_critic(
    kind: str,
    actor: PreTrainedModel,
    value_model: Any,
    reward_model: PreTrainedModel | None,
    init_kwargs: dict[str, Any],
) -> ValueHead | ValueModel:
    """
    Build the critic of a run.

    Args:
        kind: "head", new or saved in the folder `value_model`; or "model": `value_model`, else a copy of the reward
            model, else a copy of the actor's trunk with a new head. For "adapter" see `critic_adapter`.
        actor: the causal language model, before PEFT wraps it, or a `PeftModel`.
        reward_model: the reward model, if it reads the actor's token ids, else `None`.
        init_kwargs: keyword arguments of `from_pretrained` for a `value_model` that is a path.
    """
    if kind == "head":
        floats = (p.dtype for p in actor.parameters() if p.is_floating_point())
        head = ValueHead(_width_of_states(actor), dtype=next(floats, torch.float32))
        if value_model is not None:
            saved = ValueHead.from_pretrained(value_model)
            if saved.score.in_features != head.score.in_features:
                raise ValueError(
                    f"The value head in {value_model} (`value_model`) reads states of width "
                    f"{saved.score.in_features}, and the actor's trunk has {head.score.in_features}. Give a head of "
                    "this actor, or none."
                )
            head.load_state_dict(saved.state_dict())
        return head
    if isinstance(value_model, str):
        value_model = create_model_from_path(
            value_model, architecture=AutoModelForSequenceClassification, num_labels=1, **init_kwargs
        )
    elif value_model is None and reward_model is not None:
        _refuse_quantized(reward_model, "reward model")
        value_model = copy_of(reward_model)
    elif value_model is None:
        value_model = _copy_of_trunk(actor)
    if is_peft_model(value_model):
        value_model = value_model.merge_and_unload()
    of_actor = {id(parameter) for parameter in actor.parameters()}
    if any(id(parameter) in of_actor for parameter in value_model.parameters()):
        raise ValueError(
            "The value model shares parameters with the actor, which its steps would move. Pass a model of its own, "
            "or choose `critic='head'` for a value head on the actor's trunk."
        )
    check_value_model(value_model)
    value_model.requires_grad_(True)
    disable_noise(value_model)
    return ValueModel(value_model)


@torch.no_grad()
def _width_of_states(actor: Any) -> int:
    """Return the width H of the trunk's last states; some families, such as OPT, project them once more."""
    base = base_of(actor)
    if is_partitioned(base):  # nothing can be run: DeepSpeed keeps the shape of the head's weight
        return base.get_output_embeddings().weight.ds_shape[-1]
    trunk = trunk_of(base)
    keep_4_bit_differentiable(base)
    with in_mode(trunk, training=False):
        return trunk(input_ids=probe_rows(trunk)[-1], use_cache=False).last_hidden_state.size(-1)


def _copy_of_trunk(actor: PreTrainedModel) -> PreTrainedModel:
    _refuse_quantized(actor, "actor's trunk")
    if hasattr(actor, "merge_and_unload"):
        actor = copy_of(actor).merge_and_unload()
    config = copy.deepcopy(actor.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=actor.dtype)
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence classification model for {type(actor).__name__}, so the critic cannot copy "
            "its trunk. Pass a `value_model`, or `critic='head'` for a value head on the actor's trunk."
        ) from error
    lacking = sorted(model.base_model.state_dict().keys() - actor.base_model.state_dict().keys())
    if lacking:  # BERT's pooler, which reads the first token
        raise ValueError(
            f"{type(model).__name__} makes its score by weights that the trunk of {type(actor).__name__} lacks "
            f"({', '.join(lacking)}), so the critic cannot copy it. Choose `critic='head'` for a value head on the "
            "actor's trunk."
        )
    copy_weights(actor.base_model, model.base_model)
    for parameter in last_linear(model, StateValues(model, "the critic").trunk).parameters():
        fill_zeros(parameter)
    return model


def _refuse_quantized(model: Any, name: str) -> None:
    if is_quantized(model):
        raise ValueError(
            f"`critic='model'` would copy the {name}, which is quantized and cannot be trained. Pass a `value_model`, "
            "or `critic='head'` for a value head on the actor's trunk, or `critic='adapter'` for an adapter on it."
        )


def _add_to(actor: PreTrainedModel | PeftModel, critic: nn.Module) -> None:
    base = base_of(actor)
    lend(base, ATTRIBUTE, critic.to(base.device))


def freeze(critic: nn.Module, patterns: Sequence[str]) -> None:
    """
    Freeze the parameters of a critic whose names match a pattern of `fnmatch`.

    Raises:
        ValueError: for a pattern that matches no trained parameter, and when none is left to be trained.
    """
    names = {name.removeprefix("model."): p for name, p in critic.named_parameters() if p.requires_grad}
    listed = f"It trains {', '.join(list(names)[:12])}{', …' if len(names) > 12 else ''}."
    frozen = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"`freeze_critic` has {pattern!r}, which is the name of none of the critic's parameters. {listed}"
            )
        frozen.update(matched)
    if frozen and len(frozen) == len(names):
        raise ValueError(
            f"`freeze_critic={list(patterns)}` freezes the whole critic, which would never learn. {listed}"
        )
    for name in frozen:
        names[name].requires_grad_(False)


def generating_parameters(model: nn.Module, *attached: nn.Module) -> list[nn.Parameter]:
    """
    Return the parameters that `model` generates with: not those of adapters that are switched off, nor those that only
    the modules in `attached`, such as the critic, have. A base that these share with the actor is included.
    """
    modules = list(_outside(model, attached))
    unused = {id(p) for layer in modules if isinstance(layer, BaseTunerLayer) for p in _switched_off(layer)}
    parameters = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    return [parameter for key, parameter in parameters.items() if key not in unused]


def _outside(module: nn.Module, attached: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if child not in attached:
            yield from _outside(child, attached)


def _switched_off(layer: BaseTunerLayer) -> Iterator[nn.Parameter]:
    """Yield the parameters of adapters that are not active in a layer."""
    for kind in layer.adapter_layer_names:
        for name, part in getattr(layer, kind).items():
            if name not in layer.active_adapters:
                yield from [part] if isinstance(part, nn.Parameter) else part.parameters()


def split_state_dict(
    model: nn.Module, critic: nn.Module, state_dict: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the actor's tensors under their names, and the critic's under its own, without a reward adapter's."""
    prefix = next(name for name, module in model.named_modules() if module is critic) + "."
    actor = {name: tensor for name, tensor in state_dict.items() if not name.startswith((prefix, f"{REWARD}."))}
    of_critic = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    return actor, of_critic
