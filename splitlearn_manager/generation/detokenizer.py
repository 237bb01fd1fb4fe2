"""From tokens to text, piece by piece, without a piece ever having to be taken back.

The text of tokens is not that of each token put together: a character may begin in one token and
end in a later one, and some tokenizers drop the space before the first word of whatever they are
given.  So a token is always decoded together with some that come before it, and what is new in the
text goes out when it can't change any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a decoder puts in the place of bytes that are no whole character, or not yet."""

CONTEXT = 6
"""Tokens of a prompt that the first new ones are decoded with."""


class Detokenizer:
    """Turns the tokens of one sequence into text.

    Args:
        decode: Returns the text of tokens.
        before: The tokens that come before the first, which give no text themselves.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(before[-CONTEXT:])  # from the last clean place but one on
        self._clean = len(self._tokens)  # how many of them end at a clean place
        self._given = _sure(decode(self._tokens)) if self._tokens else ""  # of their text

    def add(self, token: int) -> str:
        """Return the text that is sure with one more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(UNFINISHED):
            new = _after(self._given, _sure(text)) or ""
            self._given += new
            return new
        new = self._rest(text)
        self._forget(text)
        return new

    def finish(self) -> str:
        """Return what was kept back: no more comes."""
        return self._rest(self._decode(self._tokens)) if self._tokens else ""

    def _rest(self, text: str) -> str:
        """Return what follows on what was given, in the text of all tokens that are held.

        A decoder may come to another view of what was given: bytes that made a character make
        none together with those that follow.  What went out stays, and what follows is then the
        text of the tokens that came since it was clean.
        """
        new = _after(self._given, text)
        return self._decode(self._tokens[self._clean :]) if new is None else new

    def _forget(self, text: str) -> None:
        """Keep the tokens since the last clean place alone, unless they give no text."""
        rest = self._tokens[self._clean :]
        if given := self._decode(rest):
            self._tokens, self._given = rest, given
        else:
            self._given = text
        self._clean = len(self._tokens)


def _after(given: str, text: str) -> str | None:
    """Return what a text has after what was given; `None` if it begins otherwise."""
    if text.startswith(given):
        return text[len(given) :]
    return "" if given.startswith(text) else None


def _sure(text: str) -> str:
    """Return a text without what may still become a character at its end."""
    return text.rstrip(UNFINISHED)
