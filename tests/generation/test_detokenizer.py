"""Text from tokens, piece by piece: all of it, nothing taken back, no half of a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager.generation.detokenizer import UNFINISHED, Detokenizer

Decode = Callable[[list[int]], str]

TEXTS = [
    "The function returns a list.\n\n    def main(x):  # naïve\n",
    "héllo wörld 你好\uff0c世界 — “quoted” …",
    "family 👨‍👩‍👧 flags 🇩🇪🇫🇷 e\u0301 ﷽ \U0001d518\U0001d52b\U0001d526",
    "   leading and   inner    spaces\t\ttabs ",
    "\ufffd is a character, too \ufffd\ufffd",
]


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_tokenizer("builtin:demo")


def decoder_of(tokenizer: Any) -> Decode:
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def sentencepiece() -> Decode:
    """Return the decoder of a tokenizer as Llama 2 has it: bytes where it has no word for them."""
    words = {"▁Hello": 300, "▁world": 301, "A": 302, "▁": 303, "lo": 304}
    octets = {f"<0x{octet:02X}>": octet + 1 for octet in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, **octets, **words}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return lambda ids: str(tokenizer.decode(ids))


def in_pieces(decode: Decode, ids: list[int], before: list[int] | None = None) -> list[str]:
    words = Detokenizer(decode, before or [])
    return [*(words.add(token) for token in ids), words.finish()]


@given(st.lists(st.integers(0, 4095), max_size=60))
def test_pieces_of_any_tokens_are_their_text(demo: Any, ids: list[int]) -> None:
    decode = decoder_of(demo)

    pieces = in_pieces(decode, ids)

    assert "".join(pieces) == decode(ids)
    assert not any(piece.endswith(UNFINISHED) for piece in pieces[:-1])


@given(st.lists(st.integers(3, 262), max_size=40))
def test_pieces_of_single_bytes_are_their_text(demo: Any, ids: list[int]) -> None:
    decode = decoder_of(demo)

    assert "".join(in_pieces(decode, ids)) == decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_are_the_text(demo: Any, text: str) -> None:
    ids = demo(text, add_special_tokens=False)["input_ids"]

    pieces = in_pieces(decoder_of(demo), ids)

    assert "".join(pieces) == text
    for piece in pieces:
        piece.encode()  # no half of a surrogate pair either


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_on_anywhere_in_another(demo: Any, text: str) -> None:
    ids = demo(text, add_special_tokens=False)["input_ids"]
    decode = decoder_of(demo)
    for cut in range(1, len(ids)):
        if not decode(ids[:cut]).endswith(UNFINISHED):
            assert (
                "".join(in_pieces(decode, ids[cut:], ids[:cut])) == text[len(decode(ids[:cut])) :]
            )


def test_a_word_keeps_the_space_before_it() -> None:
    decode = sentencepiece()

    assert in_pieces(decode, [301, 304], before=[300]) == [" world", "lo", ""]
    assert in_pieces(decode, [300, 303, 301]) == ["Hello", " ", " world", ""]


def test_bytes_make_a_character_when_all_are_there() -> None:
    euro = [octet + 1 for octet in "€".encode()]

    pieces = in_pieces(sentencepiece(), [*euro, *euro, 302], before=[300])

    assert pieces == ["", "", "€", "", "", "€", "A", ""]


def test_what_went_out_stays_where_bytes_that_follow_spoil_it() -> None:
    """The decoder shows all bytes in a row as no characters, if one of them is none."""
    euro = [octet + 1 for octet in "€".encode()]
    decode = sentencepiece()
    assert "€" not in decode([300, *euro, 0xFF + 1, 302])

    pieces = in_pieces(decode, [*euro, 0xFF + 1, 302], before=[300])

    assert pieces == ["", "", "€", "", "\ufffdA", ""]


@given(st.lists(st.sampled_from([*range(1, 257), *range(300, 305)]), max_size=30))
def test_bytes_in_any_order_give_no_half_character(ids: list[int]) -> None:
    pieces = in_pieces(sentencepiece(), ids, before=[300])

    assert not any(piece.endswith(UNFINISHED) for piece in pieces[:-1])


def test_special_tokens_give_no_text(demo: Any) -> None:
    assert in_pieces(decoder_of(demo), [1, 2, 2, 0]) == ["", "", "", "", ""]
