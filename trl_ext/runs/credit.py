"""Where the credit of an answer went, token by token: records that callbacks write down and the report shows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback


BROKEN = "\ufffd"  # what bytes that make no character are decoded to
MOST_TOGETHER = 16  # tokens that are tried as one piece, until their bytes make whole characters
# Control characters, which a terminal would obey and a page drop, as their pictures.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(0x80, 0xA0), ord(BROKEN))


class CreditOffer(TrainerCallback):
    """
    Gives the trainer's `credit` to the callbacks that show it, which have `read_credit` and a number of answers,
    `credit`; so they need no trainer of their own.

    Attributes:
        is_read: whether there is such a callback. If not, a trainer need not keep anything for it.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.is_read = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        readers = [
            one for one in self.trainer.callback_handler.callbacks if hasattr(one, "read_credit") and one.credit
        ]
        for reader in readers:
            reader.read_credit = partial(self.trainer.credit, reader.credit)
        self.is_read = bool(readers)


def answer_with_credit(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    answer: Tensor,
    counts: Tensor,
    numbers: Mapping[str, Tensor],
    **facts: Any,
) -> dict[str, Any]:
    """
    Return an answer as JSON holds it: `prompt`, the `facts`, and `pieces`. A piece has its `text`, whether it is a
    `special` token, and by the name of each number those of its tokens that count, to four digits.

    Args:
        prompt: (P,) ids, without padding.
        answer, counts, numbers: (T,) ids, bool and float, without padding.
    """
    ids, special = answer.tolist(), set(tokenizer.all_special_ids)
    columns = {name: values.tolist() for name, values in numbers.items()}
    pieces, start = [], 0
    for text, size in text_pieces(tokenizer, ids, prompt.tolist()):
        counted = [i for i in range(start, start + size) if counts[i]]
        piece = {"text": text.translate(VISIBLE), "special": ids[start] in special}
        piece |= {name: [float(f"{values[i]:.4g}") for i in counted] for name, values in columns.items()}
        pieces.append(piece)
        start += size
    return {"prompt": tokenizer.decode(prompt).translate(VISIBLE), **facts, "pieces": pieces}


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()
) -> list[tuple[str, int]]:
    """
    Return the text of tokens in pieces, each with its number of tokens: one, or as many as it takes until their bytes
    make whole characters. Bytes that never make one are a piece for each token.

    `before` are the tokens that stand before them, for the space that some tokenizers drop at a beginning.
    """

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(last: Sequence[int], piece: Sequence[int]) -> str:
        known, whole = decode(last), decode([*last, *piece])
        added = whole.removeprefix(known) if whole.startswith(known) else ""
        # Behind bytes that make no character, others may be decoded as broken too, or not at all.
        return decode(piece) if not added or BROKEN in added else added

    pieces: list[tuple[str, int]] = []
    last, start = before[-1:], 0
    while start < len(ids):
        ends = range(start + 1, min(start + MOST_TOGETHER, len(ids)) + 1)
        end = next((end for end in ends if BROKEN not in decode(ids[start:end])), start + 1)
        pieces.append((text(last, ids[start:end]), end - start))
        last, start = ids[start:end], end
    return pieces
