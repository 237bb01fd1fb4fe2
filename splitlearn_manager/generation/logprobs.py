"""How probable tokens were, in the forms of OpenAI's two kinds of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token, as text and as the bytes that it stands for."""

    text: str
    octets: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """A token of an answer, or of a prompt.

    Attributes:
        token: It.
        logprob: Natural logarithm of its probability; `None` for the first of a prompt.
        top: The most probable tokens at its place with theirs, the best first.
        offset: Where its text begins in that of the choice, in characters.
    """

    token: TokenText
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...]
    offset: int


def of_completion(tokens: Sequence[Told]) -> dict[str, Any]:
    """Return them as a completion has them: lists side by side.

    Where two of the most probable tokens have the same text, the more probable one is told.
    """
    return {
        "tokens": [one.token.text for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [_by_text(one) for one in tokens],
        "text_offset": [one.offset for one in tokens],
    }


def of_chat(tokens: Sequence[Told]) -> dict[str, Any]:
    """Return them as a chat has them: one object for each."""
    return {
        "content": [
            {
                **_named(one.token, one.logprob),
                "top_logprobs": [_named(token, logprob) for token, logprob in one.top],
            }
            for one in tokens
        ],
        "refusal": None,
    }


def _by_text(one: Told) -> dict[str, float] | None:
    """Return the most probable tokens of a place by text, with the one that is there."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in one.top:
        found.setdefault(token.text, logprob)
    found.setdefault(one.token.text, one.logprob)
    return found


def _named(token: TokenText, logprob: float | None) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.octets)}
