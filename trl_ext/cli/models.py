"""The options of the model to start from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from trl import ModelConfig

from .. import embedded
from ..device import computes_in_bf16
from ..planner.recipe import is_local
from ..pretrained import adapter_config


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model options, with `--model` for short and a dtype that follows the device."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Model to start from: a path or a hub name. Unset: SmolLM2-135M."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the weights. Unset: float32, which a GPU computes on in bfloat16 (see --bf16); with "
            "--use_peft on a GPU bfloat16, as most weights are frozen.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def init_kwargs(self, use_cpu: bool = False) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        # Small updates of bfloat16 weights round to nothing, so weights that are trained in full are kept in float32.
        dtype = "bfloat16" if self.use_peft and computes_in_bf16(use_cpu) else "float32"
        kwargs = {"dtype": self.dtype or dtype, "revision": self.model_revision}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs


def path_of(model: ModelArguments, args: Any = None) -> str:
    """
    The model to start from; without one, SmolLM2, converted at first use.

    Raises:
        ValueError: as `require_model` does.
    """
    named = model.model_name_or_path or getattr(args, "sft_model_path", None)
    if named is None:
        return str(embedded.smollm2())
    require_model(named, "--model" if model.model_name_or_path else "--sft_model_path", model.model_revision)
    return named


def require_judges(reward_model: str | None, value_model: str | None) -> None:
    """
    Raises:
        ValueError: for one that is given and is no model, as `require_model` does.
    """
    for what, path in {"--reward_model_path": reward_model, "--value_model": value_model}.items():
        if path is not None:
            require_model(path, what)


def require_model(path: str, what: str, revision: str | None = None, with_base: bool = False) -> None:
    """
    Looks for the config of a model, or of an adapter, and loads nothing else.

    Args:
        path: a folder, or a hub name.
        what: it is, for the error.
        with_base: whether an adapter's base is needed, too.

    Raises:
        ValueError: when there is none, here or on the hub.
    """
    adapter = adapter_config(path)
    if adapter is not None:
        if with_base and adapter.base_model_name_or_path:
            require_model(adapter.base_model_name_or_path, f"the base of the adapter {path}", adapter.revision)
        return
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"{path} ({what}) holds no model: there is no config.json and no adapter_config.json in it. Give the "
                "folder that a model was saved to."
            )
        return
    if is_local(path):
        raise ValueError(f"There is no folder {path} ({what}). Give the folder that a model was saved to.")
    try:
        PretrainedConfig.get_config_dict(path, revision=revision)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} ({what}) is no folder here, and no model of that name came from the hub. Give the folder that a "
            f"model was saved to, or a hub name; one that is not in the hub's cache needs a network. The hub: {reason}"
        ) from error
