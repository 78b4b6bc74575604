"""Answers by token: the text stays whole, the numbers stay with their tokens, and only who asks is given them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import tiny
from mistakes import assert_noticed, instead
from trl_ext.runs.credit import BROKEN, CreditOffer, answer_with_credit, text_pieces


HOSTILE = "</script><img src=x onerror=alert(1)> [red]a[/red]"


def finished(backend):
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def byte_level():
    """Every byte a token, but for three tokens of two bytes, the second of which reaches over two characters."""
    ((spelled, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("你好")
    a, b, c, d, e, f = spelled
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), a + b, c + d, e + f]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [(a, b), (c, d), (e, f)])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend)


BYTES = range(256)


def byte_fallback():
    """As sentencepiece: words begin with ▁, which is dropped at a beginning; what is no word is spelled in bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in BYTES), "▁", "▁the", "▁cat", "a", "b"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return finished(backend)


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_pieces_of_bytes_are_whole_characters():
    tokenizer = byte_level()
    text = "a你好😀é b"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + 3 + 4 + 2 + 2
    assert text_pieces(tokenizer, ids) == [("a", 1), ("你好", 3), ("😀", 4), ("é", 2), (" ", 1), ("b", 1)]


def test_pieces_of_spelled_bytes_are_whole_characters_and_spaces_stay():
    tokenizer = byte_fallback()
    smile = [f"<0x{byte:02X}>" for byte in "😀".encode()]
    ids = ids_of(tokenizer, "▁the", *smile, "▁cat", "<eos>")
    assert text_pieces(tokenizer, ids, before=ids_of(tokenizer, "▁cat")) == [
        (" the", 1),
        ("😀", 4),
        (" cat", 1),
        ("<eos>", 1),
    ]
    assert text_pieces(tokenizer, ids)[0] == ("the", 1)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_bytes_that_make_no_character_take_nothing_with_them(kind):
    tokenizer = kind()
    name = bytes_to_unicode().get if kind is byte_level else "<0x{:02X}>".format
    tokens = [name(0xE4), "a", *map(name, [0x80, *"😀".encode(), 0xF0, 0x9F])]
    pieces = text_pieces(tokenizer, ids_of(tokenizer, *tokens))
    assert pieces == [(BROKEN, 1), ("a", 1), (BROKEN, 1), ("😀", 4), (BROKEN, 1), (BROKEN, 1)]


def test_hostile_text_comes_back_letter_by_letter():
    tokenizer = byte_level()
    pieces = text_pieces(tokenizer, tokenizer(HOSTILE)["input_ids"])
    assert "".join(text for text, _ in pieces) == HOSTILE
    assert {size for _, size in pieces} == {1}


def record(**changes):
    """ "a", an emoji of four tokens of which the second does not count, an escape character, the end token."""
    tokenizer = byte_level()
    ids = tokenizer("a😀\x1b<eos>")["input_ids"]
    numbers = {"advantage": torch.arange(1.0, 8.0) / 3}
    counts = torch.tensor([True, True, False, True, True, True, True])
    given = {"counts": counts, "numbers": numbers, "kind": "response"} | changes
    return answer_with_credit(tokenizer, torch.tensor(tokenizer("p ")["input_ids"]), torch.tensor(ids), **given)


def test_numbers_stay_with_their_tokens():
    answer = record()
    assert (answer["prompt"], answer["kind"]) == ("p ", "response")
    assert answer["pieces"] == [
        {"text": "a", "special": False, "advantage": [0.3333]},
        {"text": "😀", "special": False, "advantage": [0.6667, 1.333, 1.667]},
        {"text": "␛", "special": False, "advantage": [2.0]},
        {"text": "<eos>", "special": True, "advantage": [2.333]},
    ]
    idle = record(counts=torch.zeros(7, dtype=torch.bool))
    assert all(piece["advantage"] == [] for piece in idle["pieces"])


def token_by_token(tokenizer, ids, before=()):
    return [(tokenizer.decode([token]), 1) for token in ids]


def one_off(pieces):
    """Every piece has the length of the one before."""

    def mistaken(*args, **kwargs):
        found = pieces(*args, **kwargs)
        return [(text, size) for (text, _), (_, size) in zip(found, found[-1:] + found[:-1], strict=True)]

    return mistaken


@pytest.mark.parametrize(
    "beginning, mistake",
    [
        ("pieces_of_bytes", instead(token_by_token)),
        ("pieces_of_spelled", instead(token_by_token)),
        ("numbers_stay", instead(token_by_token)),
        ("numbers_stay", one_off),
    ],
)
def test_control_a_mistake_in_the_pieces_is_noticed(beginning, mistake, monkeypatch):
    target = "trl_ext.runs.credit:text_pieces"
    assert_noticed(Path(__file__), beginning, {}, target, mistake, monkeypatch)


def test_only_who_asks_is_given_the_credit_of_a_trainer():
    asking = SimpleNamespace(read_credit=None, credit=3)
    declining, other = SimpleNamespace(read_credit=None, credit=0), SimpleNamespace()
    trainer = SimpleNamespace(
        credit=lambda most: ["answer"] * most, callback_handler=SimpleNamespace(callbacks=[asking, declining, other])
    )
    offer = CreditOffer(trainer)
    offer.on_train_begin(None, None, None)
    assert offer.is_read
    assert asking.read_credit() == ["answer"] * 3
    assert declining.read_credit is None
    trainer.callback_handler.callbacks = [declining, other]
    offer.on_train_begin(None, None, None)
    assert not offer.is_read


def test_words_of_a_word_level_tokenizer_are_a_piece_each():
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("the cat <eos>")["input_ids"]
    assert text_pieces(tokenizer, ids, before=[7]) == [(" the", 1), (" cat", 1), (" <eos>", 1)]
