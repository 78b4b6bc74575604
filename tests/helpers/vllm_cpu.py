"""
What a real vLLM, and TRL's side of it, need on a machine without a GPU. Weights reach a server by gloo, for which GPUs
have NCCL; every request, and everything else in the engine, is TRL's and vLLM's own.

A server is started with `vllm_rows.SERVER_FLAGS`: each of its workers then imports this file.
"""

import functools
import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm import _custom_ops
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

import vllm_rows


WAIT = timedelta(seconds=60)
# oneDNN packs the weights of linear layers: those that arrive afterwards do not reach a head that is tied to the
# embeddings, and a colocated engine cannot load them at all. With this variable a server packs them all the same.
_custom_ops._supports_onednn = os.environ.get(vllm_rows.PACKS) == "1"


class Imported:
    """Adds nothing to a worker."""


# --- weights for a server


def joined(info: dict[str, Any], rank: int) -> ProcessGroupGloo:
    """The group of the trainer, which is rank 0, and the workers of a server."""
    address = (info["master_address"], info["master_port"], info["world_size"])
    return ProcessGroupGloo(TCPStore(*address, is_master=rank == 0, timeout=WAIT), rank, info["world_size"], WAIT)


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        self.gloo = joined(vars(init_info), self.parallel_config.rank + init_info.rank_offset)

    def receive_weights(self, update_info: Any, *_: Any) -> None:
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in announced:
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.gloo.broadcast(weight, 0).wait()
            self.model.load_weights([(name, weight)])


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


def send_by_gloo() -> None:
    """Let TRL's client send its weights by gloo."""
    from trl.generation import vllm_client, vllm_generation

    class Client(vllm_client.VLLMClient):
        def init_communicator(self, device: Any = 0) -> None:
            super().init_communicator("cuda")  # of which it asks the type alone

    def open_endpoint(info: dict[str, Any]) -> Any:
        return SimpleNamespace(gloo=joined(info, 0), group=SimpleNamespace())

    def produce(iterator: Any, group: Any, src: int, post_iter_func: Any) -> None:
        for item in iterator:
            group.gloo.broadcast(post_iter_func(item).contiguous(), src).wait()

    vllm_client.open_trainer_endpoint, vllm_client.packed_nccl_broadcast_producer = open_endpoint, produce
    vllm_generation.VLLMClient = Client


# --- a colocated engine


def share_engines() -> None:
    """Let TRL's colocated engines be small, and the trainers of a process share those with equal options."""
    from trl.generation import vllm_generation
    from vllm import LLM

    vllm_generation.LLM = functools.cache(
        functools.partial(LLM, kv_cache_memory_bytes=vllm_rows.KV_CACHE, enforce_eager=True)
    )
