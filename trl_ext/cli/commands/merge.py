"""
Make a whole model of an adapter and its base, for programs that take no adapter, or to train a new adapter on top.

    trl-ext merge out --output_dir out-merged
    trl-ext merge me/adapter --output_dir merged --dtype float32     # an adapter of the hub

The output folder, which must be empty, gets the model in safetensors of at most 5 GB, tokenizer, generation config and
a card. The base is loaded on the CPU. An adapter that was trained on a base in 4 bits is merged into these weights,
taken back to whole ones, because they are what it has learned to correct; `run.json` beside it says so. Of a PPO run
the actor is merged; the critic stays in `critic/`. A reward model's adapter becomes a whole reward model.
"""

import shlex
from pathlib import Path

from ..errors import usage_errors
from ..flags import CommandParser
from ..wording import Wording


def arguments() -> CommandParser:
    parser = CommandParser("merge", __doc__)
    parser.add_argument("adapter", help="a folder with an adapter, or a hub name")
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="empty folder for the model")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="data type of the weights")
    bits = "merge into the base as 4 bits (NF4) keep it; unset: as the adapter's run.json says"
    values = ("True", "False", "true", "false")
    parser.add_argument("--load_in_4bit", nargs="?", const="True", choices=values, metavar="BOOL", help=bits)
    parser.add_argument("--revision", metavar="TEXT", help="revision of an adapter of the hub")
    code = "run the base's own code from the hub"
    parser.add_argument("--trust_remote_code", action="store_true", default=None, help=code)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    given = parser.parse_args(argv)
    import torch  # late, with what follows: `--help` need not wait for it

    from ...models.merging import FROM_4_BITS, adapter_to_merge, in_4_bits, kept_in, merge_adapter, save_merged

    with usage_errors(Wording(parser)):
        require_empty(given.output_dir)
        folder, config = adapter_to_merge(given.adapter, given.revision)
        wanted = None if given.load_in_4bit is None else given.load_in_4bit.lower() == "true"
        bits = in_4_bits(folder, wanted)
        code = bool(given.trust_remote_code)
        model = merge_adapter(folder, config, getattr(torch, given.dtype), bits, code)
        save_merged(model, folder, config, given.output_dir, bits is not None, code)
    if str(kept_in(folder)).startswith("8 bits"):
        print("The adapter was trained on the base in 8 bits; it is merged into the base as it was saved.")
    if bits is not None:
        print(f"{FROM_4_BITS.format(dtype=given.dtype)} `--load_in_4bit False` merges into the base as it was saved.")
    critic = Path(folder) / "critic"
    if critic.is_dir():
        print(of_critic(critic, given.adapter))
    print(f"Everything is in {shlex.quote(str(given.output_dir))}")
    if config.task_type != "SEQ_CLS":
        merged = shlex.quote(str(given.output_dir))
        print(f"  chat    trl-ext chat {merged}\n  train   give `--model {merged}` to trl-ext ppo, dpo or reward")


def require_empty(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds something, or cannot be written."""
    from ...runs.requirements import require_writable
    from ..output import beside

    require_writable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"`--output_dir {folder}` is not empty. Give a new folder, such as `--output_dir "
            f"{shlex.quote(beside(folder, 'merged'))}`."
        )


def of_critic(critic: Path, actor: str) -> str:
    """Return where the critic of a merged actor is, and how it goes on."""
    if (critic / "adapter_config.json").is_file():
        how = f"It is an adapter on the same base: go on with `--model {shlex.quote(actor)}`, or merge it too, for "
        how += "`--critic model`."
    else:
        how = f"Go on with `--value_model {shlex.quote(str(critic))}`."
    return f"What is merged is the actor; the critic stays in {critic}. {how}"
