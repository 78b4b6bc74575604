"""Make a whole model of a saved adapter and its base."""

import shlex
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from .._trl import create_model_from_path
from ..runs.facts import bits_of
from ..runs.folder import is_local, read_facts, without_place
from .loading import adapter_config, is_quantized, load_tokenizer, require_model, require_weights
from .saved_adapter import SavedAdapter, adapter_folder, put_on, require_base


SHARD = "5GB"
CARD = """\
# {name}

The adapter `{adapter}` merged into its base, `{base}`: each weight W that it adapts is now W + ΔW, in {dtype}.{bits}

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
FROM_4_BITS = (
    "The adapter was trained on the base in 4 bits, so it was merged into these very weights, taken back to {dtype} "
    "(peft#2105). What 4 bits have lost of the base stays lost, and the model is again as large as the base."
)


def adapter_to_merge(named: str, revision: str | None) -> tuple[str, Any]:
    """Return the folder and config of an adapter; `ValueError` for anything that cannot be merged."""
    folder = adapter_folder(named, revision)
    require_model(folder or named, "trl-ext merge", revision)
    config = adapter_config(folder)
    if folder is None or config is None:
        raise ValueError(
            f"{named!r} holds no adapter (there is no adapter_config.json), so there is nothing to merge. Give the "
            f"output folder of a run with `--use_peft`; a whole model can be used as it is: `--model "
            f"{shlex.quote(named)}`."
        )
    if config.is_prompt_learning:
        raise ValueError(f"{named} learns virtual tokens ({config.peft_type.value}), which no weight can hold.")
    if getattr(config, "layer_replication", None):
        raise ValueError(f"{named} reads layers of its base several times (`layer_replication`): it cannot be merged.")
    require_weights(folder, "trl-ext merge")
    require_base(folder, config)
    return folder, config


def kept_in(folder: str) -> str | None:
    """Return in how many bits the run kept the base, in the words of its `run.json`."""
    return read_facts(folder).get("facts", {}).get("quantisation")


def in_4_bits(folder: str, wanted: bool | None) -> dict[str, Any] | None:
    """Return in which 4 bits to load the base: those of the run, or NF4 where `wanted`; `None` for none."""
    known = bits_of(kept_in(folder))
    if wanted is None:
        return known
    return (known or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}) if wanted else None


def merge_adapter(
    folder: str,
    config: PeftConfig,
    dtype: torch.dtype,
    bits: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """
    Return the base of the adapter in `folder` with the adapter merged into it, in `dtype`, on the CPU. What an adapter
    adds is added in the wider dtype of `dtype` and the base's own; between two in 16 bits PEFT rounds it first.

    Args:
        bits: options of bitsandbytes for a base that the adapter was trained on in 4 bits: it is loaded so, and taken
            back to whole weights before the adapter is added.
    """
    base = str(config.base_model_name_or_path)
    source: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if config.revision:
        source["revision"] = config.revision
    saved = AutoConfig.from_pretrained(base, **source)
    is_scoring = config.task_type == "SEQ_CLS"
    kwargs = source | {"dtype": torch.promote_types(saved.dtype or dtype, dtype), "device_map": {"": "cpu"}}
    if is_scoring:
        heads = [w for name, w in load_peft_weights(folder, device="cpu").items() if name.endswith("score.weight")]
        labels = len(heads[0]) if heads else 1
        kwargs |= {"architecture": AutoModelForSequenceClassification, "num_labels": labels}
    if bits is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=kwargs["dtype"])
    model: Any = create_model_from_path(base, **kwargs)
    if is_quantized(model):
        model = model.dequantize(kwargs["dtype"])
    adapted = put_on(model, folder)
    _untie_adapted(adapted)
    return adapted.merge_and_unload(safe_merge=True).to(dtype).requires_grad_(False).eval()


def _untie_adapted(model: PeftModel) -> None:
    """Give the output layer weights of its own if it or the embedding is adapted: PEFT would merge that into both."""
    base: Any = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if (
        head is not None
        and head.weight is embedding.weight
        and any(isinstance(each, BaseTunerLayer) for each in (embedding, head))
    ):
        layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone())


def save_merged(
    model: Any, folder: str, config: PeftConfig, output: Path, from_4_bits: bool, trust_remote_code: bool = False
) -> None:
    """Write the model in safetensors of at most 5 GB each, its generation config, tokenizer or processor, and card."""
    base, dtype = str(config.base_model_name_or_path), str(model.dtype).removeprefix("torch.")
    model.save_pretrained(output, max_shard_size=SHARD)
    own = SavedAdapter(folder, config).processing_class(trust_remote_code=trust_remote_code)
    (own or load_tokenizer(folder, trust_remote_code=trust_remote_code)).save_pretrained(output)
    is_scoring = config.task_type == "SEQ_CLS"
    text = CARD.format(
        name=without_place(str(output.resolve())),
        adapter=without_place(folder),
        base=without_place(base),
        dtype=dtype,
        bits=f"\n\n{FROM_4_BITS.format(dtype=dtype)}" if from_4_bits else "",
        auto="AutoModelForSequenceClassification" if is_scoring else "AutoModelForCausalLM",
    )
    data = ModelCardData(
        library_name="transformers",
        base_model=None if is_local(base) else base,
        base_model_relation=None if is_local(base) else "finetune",  # "merge" is of several models
        pipeline_tag="text-classification" if is_scoring else "text-generation",
        tags=["trl-ext", "merged"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(output / "README.md")
