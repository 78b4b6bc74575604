"""
Talk to a trained model: a folder with a model, or with an adapter, whose base is loaded with it.

    trl-ext chat outputs/dpo-demo
    trl-ext chat outputs/dpo-demo --system "Answer in one sentence." --temperature 0.7

A model without a chat template continues what you type. An empty line or Ctrl-D ends the chat, and /new
forgets what was said.
"""

import copy
from typing import Any

from ..errors import usage_errors
from ..flags import CommandParser


def arguments() -> CommandParser:
    parser = CommandParser("chat", __doc__)
    parser.add_argument("model", help="a folder, or a hub name")
    parser.add_argument("--system", help="system message before the first message")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum length of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    given = parser.parse_args(argv)
    if given.max_new_tokens < 1:
        parser.error(f"`--max_new_tokens` is {given.max_new_tokens}; it must be at least 1.")
    if given.temperature < 0:
        parser.error(f"`--temperature` is {given.temperature}; it must be 0, for the likeliest token, or above.")
    from transformers import TextStreamer, pipeline  # late, with what follows: `--help` need not wait for them

    from ...models.loading import load_tokenizer
    from ...models.precision import computes_in_bf16
    from ...models.saved_adapter import load_writer, require_writer

    class Streamer(TextStreamer):
        """Prints an answer as it comes, and keeps its tokens."""

        ids: list[int]

        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:
                self.ids = []
            else:
                self.ids += value.flatten().tolist()
            super().put(value)

    with usage_errors():
        path = require_writer(given.model, "trl-ext chat")
        tokenizer = load_tokenizer(path)
        model = load_writer(path, dtype="bfloat16" if computes_in_bf16() else "float32")
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    sampling = {"do_sample": True, "temperature": given.temperature} if given.temperature > 0 else {"do_sample": False}
    settings = copy.deepcopy(writer.model.generation_config)
    known = settings.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    settings.update(max_new_tokens=given.max_new_tokens, eos_token_id=sorted(ends) or None, **sampling)
    start = [{"role": "system", "content": given.system}] if given.system else []
    messages = list(start)
    how = f"`--temperature {given.temperature:g}`" + ("" if given.temperature > 0 else ", always the likeliest token")
    print(f"{given.model}: `--max_new_tokens {given.max_new_tokens}`, {how}.")
    print("Say something; an empty line ends it, /new starts over.")
    for said in iter(read_line, ""):
        if said == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        asked = messages if tokenizer.chat_template else said
        answer = writer(asked, generation_config=settings, streamer=streamer, return_full_text=False)
        messages.append({"role": "assistant", "content": answer[0]["generated_text"]})
        if len(streamer.ids) >= given.max_new_tokens and streamer.ids[-1] not in ends:
            print(f"[cut off after {given.max_new_tokens} tokens: `--max_new_tokens`]")


def read_line() -> str:
    """Return what was typed; nothing at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
