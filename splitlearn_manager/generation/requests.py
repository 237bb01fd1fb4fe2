"""What clients of OpenAI's protocol ask for, checked, as values.

Types are strict (`"5"` is no number), and each refusal names the parameter.  Parameters that nobody
knows are left out of account, as vLLM does: clients send many that concern accounts and caches
elsewhere.  Those that are known, not there, and would change the answer are refused.

Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`, as vLLM has them.

Source: platform.openai.com/docs/api-reference/completions and /chat; docs.vllm.ai, its page on the
OpenAI-compatible server.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from splitlearn_manager.generation.errors import BadRequestError, UnsupportedError
from splitlearn_manager.generation.sampling import Sampling

MOST_ANSWERS = 128
"""Most answers to one prompt."""

MOST_SEQUENCES = 256
"""Most answers of one request, to all of its prompts together."""

MOST_LOGPROBS = 20
"""Most tokens told at each place."""

MOST_STOPS = 4

_NOTHING: tuple[Any, ...] = (None, False, [], {}, "", "none", "auto", 0)

_REFUSED: dict[str, str] = {
    "suffix": "text can't be put in before a suffix: these models go on from a prompt alone",
    "tools": "tools can't be called; put their description into a message, if the model knows some",
    "functions": "functions can't be called",
    "function_call": "functions can't be called",
    "audio": "the models give text alone",
    "prediction": "predicted outputs can't be had",
    "use_beam_search": "beams can't be had",
    "min_tokens": "a shortest answer can't be had; ignore_eos with max_tokens gives a fixed length",
    "prompt_logprobs": "use echo with logprobs",
    "guided_json": "answers can't be bound to a form",
    "guided_regex": "answers can't be bound to a form",
    "guided_choice": "answers can't be bound to a form",
    "guided_grammar": "answers can't be bound to a form",
    "structured_outputs": "answers can't be bound to a form",
    "chat_template": "a template is never taken from a request; the server's configuration has it",
    "chat_template_kwargs": "a template is given messages alone",
    "continue_final_message": "an answer is always a message of its own",
}
"""Parameter -> why it is refused, where it asks for anything."""

_FORMS = {
    "prompt": "must be a text, a list of texts, a list of tokens, or a list of lists of tokens",
    "stop": f"must be a text, or a list of at most {MOST_STOPS} texts, and none of them empty",
}
"""What has several forms, of which pydantic would tell one by one that they are not met."""

OF_THE_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a model's own generation_config.json says where a request does not."""

B = TypeVar("B", bound="_Body")
T = TypeVar("T")

_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    """Values of exactly the types that are named; what else there is, is left out of account."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _Body(_Strict):
    """What both kinds of requests have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, _Bias] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None

    def sampling(self) -> Sampling:
        """Return how tokens are to be chosen."""
        return Sampling(
            logit_bias=self._bias(),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            temperature=_or(self.temperature, 1.0),
            top_k=max(_or(self.top_k, 0), 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
        )

    def stops(self) -> tuple[str, ...]:
        """Return the texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _bias(self) -> dict[int, float]:
        for key in self.logit_bias or ():
            if not (key.isascii() and key.isdigit()):
                raise BadRequestError(
                    f"logit_bias has numbers of tokens as its keys, found {reprlib.repr(key)}",
                    "logit_bias",
                )
        return {int(key): value for key, value in (self.logit_bias or {}).items()}


_Tokens = list[Annotated[int, Field(ge=0)]]


class _CompletionBody(_Body):
    prompt: str | list[str] | _Tokens | list[_Tokens]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


_SPEAKERS = ("system", "developer", "user")
"""Whose messages are nothing without text; an assistant's may be calls of tools alone."""


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Annotated[str, Field(min_length=1)]
    content: str | list[_TextPart] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role in _SPEAKERS:
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """Return it as chat templates take it: the parts of a text as one."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content or ())
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class _ResponseFormat(_Strict):
    type: str


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: _ResponseFormat | None = None
    tool_choice: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None


@dataclass(frozen=True)
class Request:
    """What is asked for, of either kind.

    Attributes:
        model: The model's id.
        sampling: How tokens are chosen.
        unsaid: What of it the request leaves to the model.
        max_tokens: Most tokens of each answer, where that is said.
        answers: Answers to each prompt that are given.
        made: Answers to each prompt that are made; the best ones are given.
        stops: Texts at which an answer ends.
        ignore_eos: Whether the model's own end ends none.
        logprobs: How many of the most probable tokens to tell; `None` for none, nor of the token.
        stream: Whether the answer comes piece by piece.
        include_usage: Whether a stream ends with the counts of tokens.
        prompts: Texts, or tokens, of which each is a prompt; none for a chat.
        echo: Whether an answer begins with its prompt.
        messages: Of a chat.
        add_generation_prompt: Whether a chat goes on with the assistant's turn.
    """

    model: str
    sampling: Sampling
    unsaid: frozenset[str]
    max_tokens: int | None
    answers: int
    made: int
    stops: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False
    messages: tuple[dict[str, Any], ...] = ()
    add_generation_prompt: bool = True

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat."""
        return bool(self.messages)


def read_body(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        BadRequestError: It is none.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequestError(f"the body must be a JSON object, found {type(data).__name__}")
    return data


def read_completion(data: dict[str, Any]) -> Request:
    """Return what a completion is asked for.

    Raises:
        BadRequestError: Something is of a wrong type or out of range, is missing, or does not go
            with something else.
        UnsupportedError: It asks for what can't be had here.
    """
    body = _read(_CompletionBody, data)
    answers = _or(body.n, 1)
    made = max(_or(body.best_of, answers), answers)
    if body.best_of is not None and body.best_of < answers:
        raise BadRequestError(f"best_of must be n or more, here {answers}", "best_of")
    if body.stream and made > answers:
        raise BadRequestError("best_of can't be streamed: the best is known at the end", "best_of")
    prompts = _prompts(body.prompt)
    _check_count(len(prompts), made)
    return Request(
        max_tokens=body.max_tokens,
        answers=answers,
        made=made,
        logprobs=body.logprobs,
        prompts=prompts,
        echo=bool(body.echo),
        **_shared(body),
    )


def read_chat(data: dict[str, Any]) -> Request:
    """Return what an answer in a chat is asked for; raises as `read_completion`."""
    body = _read(_ChatBody, data)
    if body.response_format is not None and body.response_format.type != "text":
        raise UnsupportedError("only a response_format of type text can be had", "response_format")
    if body.tool_choice not in {None, "none", "auto"} or isinstance(body.tool_choice, dict):
        raise UnsupportedError("tools can't be called", "tool_choice")
    if set(body.modalities or ()) - {"text"}:
        raise UnsupportedError("the models give text alone", "modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: true", "top_logprobs")
    answers = _or(body.n, 1)
    _check_count(1, answers)
    limits = (body.max_completion_tokens, body.max_tokens)
    return Request(
        max_tokens=next((limit for limit in limits if limit is not None), None),
        answers=answers,
        made=answers,
        logprobs=_or(body.top_logprobs, 0) if body.logprobs else None,
        messages=tuple(message.plain() for message in body.messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        **_shared(body),
    )


def _shared(body: _Body) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise BadRequestError("stream_options needs stream: true", "stream_options")
    options = body.stream_options
    return {
        "model": body.model,
        "sampling": body.sampling(),
        "unsaid": frozenset(name for name in OF_THE_MODEL if getattr(body, name) is None),
        "stops": body.stops(),
        "ignore_eos": bool(body.ignore_eos),
        "stream": bool(body.stream),
        "include_usage": options is not None and bool(options.include_usage),
    }


def _read(kind: type[B], data: dict[str, Any]) -> B:
    """Return a body whose values have been checked."""
    for name, why in _REFUSED.items():
        value = data.get(name)
        if not any(value is nothing or value == nothing for nothing in _NOTHING):
            raise UnsupportedError(f"{name} is not supported: {why}", name)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> BadRequestError:
    """Return one of pydantic's findings as ours: the one that looked furthest into the value."""
    finding = max(error.errors(include_url=False), key=lambda details: len(details["loc"]))
    param = str(finding["loc"][0])
    if finding["type"] == "missing":
        message = "is missing"
    elif param in _FORMS:
        return BadRequestError(f"{param} {_FORMS[param]}", param)
    else:
        shown = reprlib.repr(finding["input"])
        message = f"{finding['msg'].removeprefix('Input ')}, found {shown}"
    place = ".".join(str(step) for step in finding["loc"] if not _is_branch(step))
    return BadRequestError(f"{place} {message}", param)


def _is_branch(step: str | int) -> bool:
    """Whether a step of a path is pydantic's name for one of several types."""
    return isinstance(step, str) and ("[" in step or step == "str")


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return every prompt of a request."""
    if isinstance(given, str):
        return (given,)
    if given and isinstance(given[0], int):
        return (tuple(given),)
    if not given:
        raise BadRequestError("prompt has nothing in it", "prompt")
    return tuple(one if isinstance(one, str) else tuple(one) for one in given)


def _check_count(prompts: int, made: int) -> None:
    if prompts * made > MOST_SEQUENCES:
        raise BadRequestError(
            f"{prompts} prompts with {made} answers each are {prompts * made}; a request may have"
            f" {MOST_SEQUENCES}",
            "prompt" if prompts > 1 else "n",
        )


def _or(value: T | None, default: T) -> T:
    """Return a value, or what stands for none: clients send null for what they leave open."""
    return default if value is None else value
