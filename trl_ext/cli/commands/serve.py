"""
Start the vLLM server that a recipe of PPO samples with: its model, host, port and precision, and what weights need.

    trl-ext serve my_ppo.yaml
    trl-ext serve my_ppo.yaml --vllm_server_port 8001 --dry_run      # print the command, to run it elsewhere
    trl-ext serve my_ppo.yaml -- --gpu-memory-utilization 0.8        # behind --, flags of `vllm serve`

The recipe is a path or the name of an installed one, and flags of `trl-ext ppo` override it. For training it has
`use_vllm: true` and `vllm_mode: server`, and `trl-ext ppo --config my_ppo.yaml` waits for the server. Without a host
in the recipe the server listens on this machine alone, because whoever reaches it can change its weights.
"""

import os
import shlex
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import usage_errors
from ..flags import CommandParser


if TYPE_CHECKING:
    from ..options import Options


def arguments() -> CommandParser:
    parser = CommandParser("serve", __doc__)
    parser.usage = "%(prog)s RECIPE [--dry_run] [options of trl-ext ppo] [-- flags of vllm serve]"
    parser.add_argument("recipe", metavar="RECIPE", help="recipe of PPO: a path, or the name of an installed one")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the command and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    given, flags = arguments().parse_known_args(words[:cut])
    from ..._trl import require_vllm  # late, with what they import: `--help` need not wait for it
    from . import ppo

    with usage_errors(lambda text: text.replace("--config ", "")):
        ppo_run = ppo.COMMAND.options(["--config", given.recipe, *flags])
    with usage_errors(ppo_run.wording):
        model, options = server_of(ppo_run)
    options += words[cut + 1 :]
    print(f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.join([model, *options])}", flush=True)
    if given.dry_run:
        return
    with usage_errors():
        require_vllm()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # TRL sends weights through endpoints that exist with it alone
    # The module takes the same flags as `vllm serve`, which builds of vLLM under another name do not have.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    os.execv(sys.executable, server)


def server_of(given: "Options") -> tuple[str, list[str]]:
    """Return model and flags of the `vllm serve` that fits the run that `trl-ext ppo` makes of these options."""
    from ...ppo.roles.inputs import resolve
    from ...ppo.vllm import dtype_name, engine_dtype, server_url
    from ..models import path_of

    _, model, args = given.make(deepspeed=None)
    path, is_adapter = path_of(model, args, "ppo")
    args.model_init_kwargs = model.init_kwargs(args.use_cpu, is_adapter) | (args.model_init_kwargs or {})
    args, actor = resolve(args, model=path, reward_funcs=None)  # of an adapter its base, into which it is merged
    revision = args.model_init_kwargs.get("revision")
    url = urlsplit(server_url(args))
    options = {
        "host": "127.0.0.1" if url.hostname == "0.0.0.0" else url.hostname,
        "port": url.port or {"https": 443}.get(url.scheme, 80),
        "dtype": dtype_name(engine_dtype(args, actor.model)),
        "weight-transfer-config": '{"backend": "nccl"}',
        "logprobs-mode": "processed_logprobs",
        "max-model-len": args.vllm_max_model_length,
        "tensor-parallel-size": args.vllm_tensor_parallel_size if args.vllm_tensor_parallel_size > 1 else None,
        "revision": None if revision == "main" else revision,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return str(actor.model), [*words, *(["--trust-remote-code"] if args.trust_remote_code else [])]
