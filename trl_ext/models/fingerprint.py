"""
A fingerprint of weights on disk, by which the base of an adapter is recognised.

A name says little: folders are moved, and a base that has been trained further keeps its name. The files on disk are
the same whether a run loads them in 4 bits, bfloat16 or float32. The fingerprint does not see weights that a program
changes after loading them. The same weights in another dtype or under other tensor names count as another base; the
same weights in other shards do not.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


FILE = "base_model.json"
ROWS = 8  # that are read of each matrix; vectors are read whole


def weights_fingerprint(path: str, revision: str | None = None) -> str | None:
    """Return the SHA-256 of name, dtype, shape and some rows of every tensor; `None` without safetensors files."""
    digests = {}
    for file in _weight_files(path, revision):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                rows = weights.get_slice(name)
                whole = weights.get_tensor(name) if len(rows.get_shape()) < 2 else None
                digests[name] = _digest(rows.get_dtype(), rows.get_shape(), rows if whole is None else whole)
    return _of_all(digests)


def model_fingerprint(model: str | nn.Module, revision: str | None = None) -> str | None:
    """
    Return the fingerprint of the weights in a folder or, of a model in memory, of its tensors as they are. The two
    differ for the same weights, since a model in memory may have been changed.
    """
    if isinstance(model, str):
        return weights_fingerprint(model, revision)
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return _of_all({name: _digest(str(tensor.dtype), list(tensor.shape), tensor) for name, tensor in tensors.items()})


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
