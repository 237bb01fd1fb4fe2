"""From what is asked of a model to its jobs: what depends on both, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splitlearn_manager.generation.answers import Answer
from splitlearn_manager.generation.errors import BadRequestError, ContextLengthError
from splitlearn_manager.generation.jobs import Job
from splitlearn_manager.generation.sampling import Wanted

if TYPE_CHECKING:
    from splitlearn_manager.generation.requests import Request
    from splitlearn_manager.generation.sampling import Sampling
    from splitlearn_manager.generation.text import TextModel

USUAL_COMPLETION = 16
"""Tokens of a completion where a request does not say how many, as at OpenAI's."""

USUAL_CHAT = 2048
"""Tokens of an answer in a chat, where neither request nor model says how many there may be."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is generated for a request.

    Attributes:
        jobs: Its prompts.
        answers: For each prompt its answers; as many as are made.
    """

    jobs: tuple[Job, ...]
    answers: tuple[tuple[Answer, ...], ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(job.length for job in self.jobs)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers that were made so far."""
        return sum(answer.tokens for answers in self.answers for answer in answers)


def plan(request: Request, model: TextModel, prompts: Sequence[Tokens], most_answers: int) -> Plan:
    """Return what is to be generated.

    Args:
        request: What is asked for.
        model: What it is asked of.
        prompts: Its prompts, as tokens.
        most_answers: Most answers that the engine makes at once.

    Raises:
        ContextLengthError: A prompt and its answer would be longer than the model's context.
        BadRequestError: A token is none of the model's, a prompt has none, or there are too many
            answers.
    """
    if request.made > most_answers:
        raise BadRequestError(
            f"{request.made} answers to one prompt are more than the {most_answers} that are made"
            " at once (server.max_batch_size)",
            "n",
        )
    sampling = _sampling(request, model)
    jobs = tuple(_job(request, model, tokens, sampling) for tokens in prompts)
    texts: Sequence[str | Tokens | None] = request.prompts or [None] * len(jobs)
    answers = tuple(
        tuple(
            Answer(
                model,
                job,
                request.stops,
                _echoed(model, text) if request.echo else "",
                tells=request.logprobs is not None,
            )
            for _ in job.continuations
        )
        for job, text in zip(jobs, texts, strict=True)
    )
    return Plan(jobs, answers)


def _sampling(request: Request, model: TextModel) -> Sampling:
    """Return how tokens are chosen: what the request leaves open is the model's to say."""
    for token in request.sampling.logit_bias:
        if token >= model.vocabulary:
            raise BadRequestError(_no_token(token, model), "logit_bias")
    left: dict[str, Any] = {
        name: value for name, value in model.defaults.items() if name in request.unsaid
    }
    return replace(request.sampling, **left)


def _job(request: Request, model: TextModel, tokens: Tokens, sampling: Sampling) -> Job:
    """Return the job of one prompt."""
    param = "messages" if request.is_chat else "prompt"
    if not tokens:
        raise BadRequestError("the prompt has no tokens to go on from", param)
    if (highest := max(tokens)) >= model.vocabulary:
        raise BadRequestError(_no_token(highest, model), param)
    wanted = Wanted(
        max_tokens=_max_tokens(request, model, len(tokens), param),
        answers=request.made,
        ends=frozenset() if request.ignore_eos else model.ends,
        logprobs=request.logprobs,
        prompt_logprobs=request.echo and request.logprobs is not None,
        totals=request.made > request.answers,
    )
    return Job(tokens, sampling, wanted)


def _max_tokens(request: Request, model: TextModel, prompt: int, param: str) -> int:
    """Return how many tokens an answer may have."""
    limit = math.inf if model.max_positions is None else model.max_positions
    room = limit - prompt
    wanted = request.max_tokens
    if wanted is None and room > 0:
        usual = math.inf if request.is_chat else USUAL_COMPLETION
        most = min(room, usual)
        return USUAL_CHAT if most == math.inf else int(most)
    wanted = 1 if wanted is None else wanted
    if wanted > room:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and {prompt + wanted} are"
            f" asked for: {prompt} in the {param}, {wanted} in the answer; shorten either",
            param,
        )
    return wanted


def _no_token(token: int, model: TextModel) -> str:
    return f"the model's tokens are 0 to {model.vocabulary - 1}, found {token}"


def _echoed(model: TextModel, prompt: str | Tokens | None) -> str:
    """Return the text of a prompt."""
    if isinstance(prompt, str):
        return prompt
    return model.decode(prompt or ())
