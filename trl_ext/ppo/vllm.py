"""Give a run's vLLM the trainer's precision, and check that it fits the run before models are loaded."""

import socket
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import _trl
from ..models.loading import read_config, text_config


# What has to be equal in a server's model and the run's, which sends it weights.
SIZES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
SERVE = "`trl-ext serve RECIPE` starts a server that fits."


def engine_dtype(args: Any, model: Any) -> torch.dtype:
    """
    Return the dtype that vLLM should compute in, which is the trainer's: that of autocast, else of the weights.

    Args:
        args: a `PPOConfigX`.
        model: the actor, or the path or hub name of one that is not loaded yet.
    """
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    if not isinstance(model, str):
        return model.dtype
    dtype = (args.model_init_kwargs or {}).get("dtype", "float32")  # TRL's default
    if dtype in (None, "auto"):
        dtype = text_config(model, args).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def colocated_engines(args: Any, model: Any) -> AbstractContextManager[None]:
    """Within the context, an engine that TRL starts has the dtype of the trainer of `model`, the actor."""
    if not (args.use_vllm and args.vllm_mode == "colocate"):
        return nullcontext()
    return _trl.engines_of_dtype(dtype_name(engine_dtype(args, model)))


def server_url(args: Any) -> str:
    """Return the address of the run's server, as TRL's client has it."""
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def check_vllm(args: Any, model: Any, config: Any) -> None:
    """
    Raise `ValueError`, or `ImportError` for the version, if the run's vLLM cannot sample from the actor.

    Args:
        args: a `PPOConfigX`.
        model: the actor, or its path or hub name.
        config: the text part of its config.
    """
    _trl.require_vllm()
    if args.vllm_mode == "colocate":
        path = model if isinstance(model, str) else model.name_or_path
        if not path:
            raise ValueError(
                "A colocated vLLM loads the model itself, by the path or hub name that it was loaded from, and this "
                "actor has none. Save it, with its tokenizer, and pass the folder's path as `model`."
            )
    elif args.process_index == 0:  # the process that speaks to the server
        url = server_url(args)
        check_ports(url, args.vllm_group_port)
        check_server(_trl.server_info(url, args.vllm_server_timeout), url, args, model, config)


def check_ports(url: str, group_port: int) -> None:
    """Raise `ValueError` if another program has the port of the weights, or answers in the server's place."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind(("", group_port))
        except OSError as error:
            raise ValueError(
                f"The trainer listens at `vllm_group_port={group_port}` for the server to fetch weights, and the port "
                f"cannot be taken: {error.strerror}. Give another, such as {group_port + 1}."
            ) from error
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 501):  # TRL would ask again for ever
            raise ValueError(
                f"What answers at {url} is no vLLM server: it has no `/health` (HTTP {error.code}). Correct "
                f"`vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`. {SERVE}"
            ) from error
    except (OSError, ValueError):  # it may still be starting: TRL's client waits
        pass


def check_server(info: dict[str, Any], url: str, args: Any, model: Any, config: Any) -> None:
    """Raise `ValueError` for a server whose configuration, as it reports it, does not fit the run."""
    served = info["model_config"]
    # 1. The weights that are sent have a place
    its_config = _config_of(served["model"], args)
    sizes = {name: (getattr(its_config, name, None), getattr(config, name, None)) for name in SIZES}
    differing = [
        f"{name} is {its} there and {mine} here"
        for name, (its, mine) in sizes.items()
        if None not in (its, mine) and its != mine
    ]
    if differing:
        raise ValueError(
            f"The vLLM server at {url} has another model, {served['model']}, than the run: {', '.join(differing)}. "
            f"Restart it with the run's model. {SERVE}"
        )
    # 2. It computes as the trainer does
    its_dtype, dtype = str(served["dtype"]).removeprefix("torch."), dtype_name(engine_dtype(args, model))
    if its_dtype != dtype:
        raise ValueError(
            f"The vLLM server at {url} computes in {its_dtype} and the run in {dtype}, so that ratios of their "
            f"probabilities would not begin at 1. Restart it with `--dtype {dtype}`. {SERVE}"
        )
    if served["max_model_len"] <= args.response_length:
        raise ValueError(
            f"The vLLM server at {url} takes {served['max_model_len']} tokens, prompt and response together, and "
            f"`response_length` is {args.response_length}. Restart it with a higher `--max-model-len`. {SERVE}"
        )
    # 3. It reports what it samples by
    mode = served["logprobs_mode"]
    reads_logps = args.vllm_importance_sampling_correction or args.policy_objective == "mask"
    if reads_logps and mode != "processed_logprobs" and not (mode == "raw_logprobs" and args.temperature == 1.0):
        raise ValueError(
            f"The vLLM server runs with `--logprobs-mode {mode}`, and reports other log-probabilities than those that "
            f"it samples by at `temperature={args.temperature}`: ratios to them would be wrong. Restart it with "
            "`--logprobs-mode processed_logprobs`, or set `vllm_importance_sampling_correction=False` with "
            "`policy_objective='clip'`."
        )


def _config_of(name: str, args: Any) -> Any:
    """Return the config of a server's model; `None` if it cannot be read here, as in a folder of another machine."""
    try:
        return read_config(name, "model", trust_remote_code=args.trust_remote_code).get_text_config()
    except ValueError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that vLLM has for a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")
