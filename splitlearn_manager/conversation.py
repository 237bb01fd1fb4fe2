"""A conversation with a model: its history, and the cache that holds what was said.

Only what is new is computed and sent: the tokens so far stay in the caches, at home and on the
servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_manager.generate import Continued, Generated, GenerateOptions, continue_ids
from splitlearn_manager.language_model import describe_places

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from splitlearn_manager.language_model import LanguageModel

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_PLAIN_NAMES = {USER: "User", ASSISTANT: "Assistant", SYSTEM: "System"}
PLAIN_STOP = "\nUser:"
"""Where an answer ends, when a model that has no chat template goes on to write the next turn."""


@dataclass(frozen=True)
class Message:
    """What somebody said.

    Attributes:
        role: `user`, `assistant` or `system`.
        content: The text.
    """

    role: str
    content: str


def plain_prompt(messages: list[Message]) -> str:
    """Return a conversation in the form for models that have no chat template.

    User: a question
    Assistant: an answer
    User: the next question
    Assistant:
    """
    lines = [f"{_PLAIN_NAMES[message.role]}: {message.content}\n" for message in messages]
    return "".join(lines) + f"{_PLAIN_NAMES[ASSISTANT]}:"


class Conversation:
    """Turns between a user and a model.

    Args:
        model: Who answers.
        options: How it generates.
        system: What it is told before all else.

    Attributes:
        messages: What was said so far.
    """

    def __init__(
        self, model: LanguageModel, options: GenerateOptions, system: str | None = None
    ) -> None:
        self._model = model
        self._options = options
        self._system = system
        self.messages: list[Message] = []
        self._cache: Any = None
        self._ids: list[int] = []
        self._text = ""  # what `_ids` are the tokens of, where that is known
        self.reset()

    @property
    def has_template(self) -> bool:
        """Whether the model's tokenizer says how a conversation is written."""
        return bool(getattr(self._model.tokenizer, "chat_template", None))

    @property
    def positions(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    @property
    def limit(self) -> int | None:
        """Positions that the model was made for; `None` where its config does not say."""
        return self._model.max_positions

    def describe(self) -> str:
        """Return who answers, and where each part runs, for people."""
        return f"{self._model.name}\n{describe_places(self._model.places)}"

    def reset(self) -> None:
        """Forget what was said."""
        self._forget()
        self.messages = [] if self._system is None else [Message(SYSTEM, self._system)]

    def answer(
        self,
        text: str,
        *,
        write: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Generated:
        """Say something, and return the answer; it and the question are in `messages` then.

        Args:
            text: What the user says.
            write: Called with pieces of the answer as they come.
            stop: Ends the answer at the next token; what there is of it stays.

        Raises:
            ContextFull: (a `ValueError`) The model has no positions for it; nothing was changed.
            ValueError: The tokenizer's template refuses the conversation; nothing was changed.
            RuntimeError, OSError: A Trunk can't be reached or went away.  The turn is as if it had
                not been; the next one computes the conversation anew.
        """
        messages = [*self.messages, Message(USER, text)]
        prompt = self._render(messages)
        ids = self._ids_of(prompt)
        options = self._options.within(self.limit, len(ids), "the conversation")
        cache = self._cache_for(ids)
        self._forget()  # until all has gone well
        held = _StopHeld(write, PLAIN_STOP) if not self.has_template else None
        made = continue_ids(
            self._model,
            torch.tensor([ids]),
            options,
            write=write if held is None else held,
            stop=stop,
            cache=cache,
            stop_strings=None if self.has_template else [PLAIN_STOP],
        )
        if held is not None:
            held.end()
        said = self._keep(messages, prompt, ids, made)
        return made.told(self._model, said, len(ids), options)

    def _keep(self, messages: list[Message], prompt: str, ids: list[int], made: Continued) -> str:
        """Keep what was said, and the cache that holds it; return the answer."""
        sequence = made.sequence.tolist()
        said = self._model.tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True)
        if not self.has_template:
            said = said.partition(PLAIN_STOP)[0]
        self._cache, self._ids = made.cache, sequence
        self._text = prompt + said
        self.messages = [*messages, Message(ASSISTANT, said if self.has_template else said.strip())]
        return str(said)

    def _forget(self) -> None:
        """Let the cache go, and with it the sessions on the servers."""
        self._cache, self._ids, self._text = None, [], ""

    # --- What is written -------------------------------------------------------------------

    def _render(self, messages: list[Message]) -> str:
        """Return the conversation as the model reads it, up to where it is to answer.

        transformers renders a tokenizer's template in a sandbox.
        """
        if not self.has_template:
            return plain_prompt(messages)
        from jinja2 import TemplateError  # noqa: PLC0415 - only where there is a template

        try:
            rendered: str = self._model.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self._model.name} refuses: {error}") from error
        return rendered

    def _ids_of(self, prompt: str) -> list[int]:
        """Return the tokens of a conversation, beginning with those that the cache holds.

        What the model wrote is not tokenized again where the text goes on from it as it stands:
        that could give other tokens.
        """
        tokenizer = self._model.tokenizer
        if not (self.has_template and self._ids and prompt.startswith(self._text)):
            ids: list[int] = tokenizer(prompt, add_special_tokens=not self.has_template).input_ids
            return ids
        rest = prompt[len(self._text) :]
        end = tokenizer.decode(self._ids[-1:])
        if self._ids[-1] in self._end_ids and rest.startswith(end):
            rest = rest[len(end) :]  # the model has written it
        return [*self._ids, *tokenizer(rest, add_special_tokens=False).input_ids]

    @property
    def _end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        config: Any = self._model.generator.generation_config
        ends = config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    # --- What is computed ------------------------------------------------------------------

    def _cache_for(self, ids: list[int]) -> Any:
        """Return a cache that holds the first of `ids`: that of the last turn, where it can be.

        With `None`, `generate` makes one and computes all of them.
        """
        cache = self._cache
        if cache is None:
            return None
        try:
            held = int(cache.get_seq_length())
            same = _common(self._ids[:held], ids)
            same = min(same, len(ids) - 1)  # something must be left to compute
            if same < held:
                cache.crop(same - held)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return None  # it can't be put back, or does not count its positions (Mamba)
        return cache


def _common(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists begin with that are the same."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class _StopHeld:
    """Hands on text, but not what may be the beginning of a stop string, nor what comes after."""

    def __init__(self, write: Callable[[str], None] | None, stop: str) -> None:
        self._write = write
        self._stop = stop
        self._waiting = ""
        self._ended = False

    def __call__(self, text: str) -> None:
        """Take a piece of text."""
        if self._ended:
            return
        self._waiting += text
        before, stop, _ = self._waiting.partition(self._stop)
        if stop:
            self._ended = True
            self._hand_on(before)
            return
        keep = max(
            (n for n in range(len(self._stop)) if self._waiting.endswith(self._stop[:n])), default=0
        )
        ready = len(self._waiting) - keep
        self._hand_on(self._waiting[:ready])
        self._waiting = self._waiting[ready:]

    def end(self) -> None:
        """Hand on what was held, as nothing comes after it."""
        if not self._ended:
            self._hand_on(self._waiting)
        self._ended = True

    def _hand_on(self, text: str) -> None:
        if self._write is not None and text:
            self._write(text)
