"""Answers in the form that OpenAI's clients read: pure.

Errors are `{"error": {"message", "type", "param", "code"}}`, everywhere below `/v1`.

Source: platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitlearn_manager.generation.logprobs import of_chat, of_completion

if TYPE_CHECKING:
    from splitlearn_manager.errors import ManagerError
    from splitlearn_manager.generation.answers import Answer, Piece
    from splitlearn_manager.generation.planning import Plan

PREFIX = "/v1"
OWNER = "splitlearn"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


def is_openai(path: str) -> bool:
    """Whether a path is one of OpenAI's protocol."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def error_object(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error."""
    usual = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - HTTP's
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, usual),
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def manager_error_object(error: ManagerError) -> dict[str, Any]:
    """Return an error of ours."""
    param = getattr(error, "param", None)
    if error.code == "model_not_found":
        param = "model"
    return error_object(error.http_status, str(error), error.code, param)


def error_headers(error: ManagerError) -> dict[str, str]:
    """Return when to come again, or, where that can't help, that it can't.

    OpenAI's client asks again after any 5xx otherwise.
    """
    if error.retry_after is not None:
        return {"Retry-After": str(error.retry_after)}
    return {"x-should-retry": "false"}


def model_object(model_id: str, created: int, length: int | None = None) -> dict[str, Any]:
    """Return a model; with the length of its context, as vLLM does, where that is known."""
    known = {} if length is None else {"max_model_len": length}
    return {"id": model_id, "object": "model", "created": created, "owned_by": OWNER, **known}


def usage_of(plan: Plan) -> dict[str, int]:
    """Return the counts of tokens."""
    prompt, completion = plan.prompt_tokens, plan.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


@dataclass(frozen=True)
class Form:
    """The answers to one request.

    Attributes:
        chat: Whether it is a chat.
        id: Of the answer; all pieces of a stream have the same.
        created: When, in seconds since the epoch.
        model: The model's id.
        include_usage: Whether a stream tells the counts of tokens.
    """

    chat: bool
    id: str
    created: int
    model: str
    include_usage: bool = False

    def whole(self, answers: Sequence[Answer], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the answer as a whole."""
        write = self._message if self.chat else self._completion
        choices = [write(index, answer) for index, answer in enumerate(answers)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": dict(usage)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return what a choice of a stream begins with, if anything."""
        if not self.chat:
            return None
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of a choice."""
        if not self.chat:
            told = of_completion(piece.told) if piece.told else None
            choice = {"index": index, "text": piece.text, "logprobs": told}
            return self._chunk([{**choice, "finish_reason": piece.finish}])
        told = of_chat(piece.told) if piece.told else None
        delta = {"content": piece.text} if piece.text or piece.finish is None else {}
        return self._chunk([self._delta(index, delta, piece.finish, told)])

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the piece that tells the counts of tokens."""
        return {**self._chunk([]), "usage": dict(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(kind), "choices": choices, **usage}

    @staticmethod
    def _delta(
        index: int, delta: dict[str, Any], finish: str | None, told: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}

    @staticmethod
    def _completion(index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": of_completion(answer.told) if answer.tells else None,
            "finish_reason": answer.finish,
        }

    @staticmethod
    def _message(index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": of_chat(answer.told) if answer.tells else None,
            "finish_reason": answer.finish,
        }
