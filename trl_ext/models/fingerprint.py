"""
A fingerprint of weights, by which the base of an adapter, and the policy of a pretrained critic, are recognised.

A name says little: folders are moved, and a base that has been trained further keeps its name. The files on disk are
the same whether a run loads them in 4 bits, bfloat16 or float32, so they are read where a path is given. The same
weights in another dtype or under other tensor names count as another base; the same weights in other shards do not. A
model in memory may have been changed since it was loaded: its tensors are read, and compared with those of another in
memory only.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .sharding import is_partitioned


FILE = "base_model.json"
ADAPTER = "adapter_model.safetensors"
ROWS = 8  # that are read of each matrix; vectors are read whole
# What an adapter's config says of its place and its versions, and not of what it computes.
OF_NO_EFFECT = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "parent_library"}
OF_NO_EFFECT |= {"peft_version", "task_type", "lora_dropout"}
# How weights were read; two fingerprints can be compared where they were read in the same way.
FROM_FILES, IN_MEMORY, WITH_ADAPTER = "from files", "in memory", "in memory, with an adapter"


def weights_fingerprint(path: str, revision: str | None = None) -> str | None:
    """Return the SHA-256 of name, dtype, shape and some rows of every tensor; `None` without safetensors files."""
    return _of_all(_digests(_weight_files(path, revision)))


def adapter_fingerprint(folder: str, base: str | None, revision: str | None = None) -> str | None:
    """
    Return the fingerprint of the model that an adapter in a folder makes of `base`, a folder or hub name: of the
    adapter's tensors, of its config and of the base's weights; `None` if not all of them are there as safetensors.
    """
    file, config = Path(folder) / ADAPTER, Path(folder) / "adapter_config.json"
    of_base = base_fingerprint(folder, None) or (weights_fingerprint(base, revision) if base else None)
    if of_base is None or not file.is_file():
        return None
    # PEFT writes sets in any order, and a later version adds options, which are empty where they are not used.
    options = {
        name: sorted(value, key=str) if isinstance(value, list) else value
        for name, value in json.loads(config.read_text()).items()
        if value and name not in OF_NO_EFFECT
    }
    return _of_all(_digests([str(file)]) | {"base": of_base, "config": json.dumps(options, sort_keys=True)})


def _digests(files: list[str]) -> dict[str, str]:
    digests = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                rows = weights.get_slice(name)
                whole = weights.get_tensor(name) if len(rows.get_shape()) < 2 else None
                digests[name] = _digest(rows.get_dtype(), rows.get_shape(), rows if whole is None else whole)
    return digests


def module_fingerprint(model: nn.Module, adapter: str | None = None) -> str | None:
    """
    Return the fingerprint of the tensors of a model in memory, as they are; `None` if they are partitioned, or not in
    memory. Of the adapters of a `PeftModel` only `adapter`, by default the active one, counts.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    config = ""
    if isinstance(model, PeftModel):
        name = adapter or model.active_adapter
        others = model.peft_config.keys() - {name}
        wrappers = {name, "base_layer", "original_module"}  # an idle adapter wraps layers too
        parts = {key: key.split(".") for key in tensors if not others & set(key.split("."))}
        tensors = {".".join(part for part in of if part not in wrappers): tensors[key] for key, of in parts.items()}
        # What an adapter computes depends on its scale, which is not among its tensors.
        scales = [scale for layer in _tuned(model) if isinstance(scale := getattr(layer, "scaling", None), dict)]
        config = str([scale[name] for scale in scales if name in scale])
    if is_partitioned(model) or any(tensor.is_meta for tensor in tensors.values()):
        return None
    digests = {name: _digest(str(tensor.dtype), list(tensor.shape), tensor) for name, tensor in tensors.items()}
    return _of_all(digests | ({"config": config} if config else {}))


def _tuned(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def identity_of(
    model: str | nn.Module, name: str, revision: str | None = None, adapter: str | None = None
) -> dict[str, str | None]:
    """
    Return what a model is known by, for JSON: its `name`, its `weights`, `None` where there are none to read, and how
    these were `read`.

    Args:
        model: a folder or hub name, or a model in memory.
        adapter: of a folder or hub name, the folder of the adapter on it; of a `PeftModel` the adapter's name.
    """
    if isinstance(model, str):
        of_files = weights_fingerprint(model, revision)
        weights = of_files if adapter is None else adapter_fingerprint(adapter, model, revision)
        return {"name": name, "weights": weights, "read": FROM_FILES}
    read = WITH_ADAPTER if _tuned(model) else IN_MEMORY
    return {"name": name, "weights": module_fingerprint(model, adapter), "read": read}


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Return whether two identities are of the same weights; `None` where these cannot be compared."""
    if one["weights"] is None or other["weights"] is None or one["read"] != other["read"]:
        return None
    return one["weights"] == other["weights"]


def why_unknown(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return, for two identities that cannot be compared, why: to be shown."""
    for each in (one, other):
        if each["weights"] is None:
            return f"what {each['name']} is cannot be read {each['read']}"
    return f"the weights of {one['name']} were read {one['read']}, and those of {other['name']} {other['read']}"


def _of_all(digests: dict[str, str]) -> str | None:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else None


def _digest(dtype: str, shape: list[int], rows: Any) -> str:
    """Return the digest of a tensor, of which `rows` gives rows: of a whole vector, or of evenly spaced rows."""
    digest = hashlib.sha256(f"{dtype} {shape}".encode())
    if len(shape) < 2:
        parts = [rows]
    else:
        parts = [rows[row : row + 1] for row in sorted({i * shape[0] // ROWS for i in range(ROWS)})]
    for part in parts:
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weight_files(path: str, revision: str | None) -> list[str]:
    index = _find(path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        whole = _find(path, SAFE_WEIGHTS_NAME, revision)
        return [] if whole is None else [whole]
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [file for shard in shards if (file := _find(path, shard, revision)) is not None]


def _find(path: str, name: str, revision: str | None) -> str | None:
    try:
        return cached_file(path, name, revision=revision)
    except OSError:
        return None


def save_base_fingerprint(folders: Iterable[str | Path], base: str | None, revision: str | None = None) -> None:
    """Write the fingerprint of `base` into the folders that hold an adapter, if its weights are on disk."""
    of_adapters = [Path(folder) for folder in folders if (Path(folder) / "adapter_config.json").exists()]
    fingerprint = weights_fingerprint(base, revision) if base and of_adapters else None
    if fingerprint is None:
        return
    for folder in of_adapters:
        (folder / FILE).write_text(json.dumps({"name": base, "weights": fingerprint}, indent=2) + "\n")


def base_fingerprint(folder: str | Path, base: str | None) -> str | None:
    """Return the fingerprint written beside an adapter, else that of the folder `base`; `None` without either."""
    file = Path(folder) / FILE
    if file.exists():
        return json.loads(file.read_text())["weights"]
    return weights_fingerprint(base) if base and Path(base).is_dir() else None
