"""The options of the model to start from."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from .. import embedded
from ..device import computes_in_bf16
from ..pretrained import check_no_adapter, require_model


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
        ValueError: as `require_model` does, and for an adapter without its base.
    """
    named = model.model_name_or_path or getattr(args, "sft_model_path", None)
    if named is None:
        return str(embedded.smollm2())
    require_model(named, "--model" if model.model_name_or_path else "--sft_model_path", model.model_revision)
    check_no_adapter(named, "model")
    return named


def require_judges(reward_model: str | None, value_model: str | None) -> None:
    """
    Raises:
        ValueError: for one that is given and is no model, as `require_model` does.
    """
    for what, path in {"--reward_model_path": reward_model, "--value_model": value_model}.items():
        if path is not None:
            require_model(path, what)
