"""Generate text with a loaded model, as it comes, and say what it took."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextStreamer

from splitlearn_core.errors import SplitLearnError
from splitlearn_manager.breakdown import Stopwatch
from splitlearn_manager.language_model import (
    LanguageModel,
    describe_places,
    open_language_model,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from splitlearn_manager.breakdown import Breakdown
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.language_model import PartPlace

_PROMPT_AND_FIRST = 2


class ContextFull(SplitLearnError, ValueError):  # noqa: N818 - it is no mistake of anybody
    """The text is as long as the model's positions, or longer; says how long both are."""


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate; as in transformers, where `temperature` 0 means greedy.

    Attributes:
        max_new_tokens: Most tokens to make.
        temperature: 0 takes the likeliest token each time; `None` leaves it to the model's own
            settings.
        top_k: Choose among so many tokens.
        top_p: Choose among this much probability.
        seed: Makes sampling repeatable.
        prompt_lookup: So many tokens are guessed from what was there before, and checked together.
        assistant: A small model of the same tokens that guesses instead.
    """

    max_new_tokens: int
    temperature: float | None = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    prompt_lookup: int | None = None
    assistant: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return transformers' arguments for `generate`, but for the assistant."""
        given: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            given["do_sample"] = False
        elif self.temperature is not None:
            chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            given |= {"do_sample": True, **{k: v for k, v in chosen.items() if v is not None}}
        if self.prompt_lookup is not None:
            given["prompt_lookup_num_tokens"] = self.prompt_lookup
        return given

    def within(self, limit: int | None, length: int, text: str) -> GenerateOptions:
        """Return how to go on from so many tokens within the model's positions.

        Args:
            limit: The model's positions; `None` where they are not known.
            length: Tokens that are there.
            text: What they are, for the message.

        Raises:
            ContextFull: (a `ValueError`) There is no position left.
        """
        if limit is None:
            return self
        if length >= limit:
            raise ContextFull(
                f"{text} has {length:,} tokens, and the model has {limit:,} positions"
            )
        return replace(self, max_new_tokens=min(self.max_new_tokens, limit - length))

    @property
    def speculates(self) -> bool:
        """Whether several tokens may be checked in one round trip."""
        return self.prompt_lookup is not None or self.assistant is not None


@dataclass(frozen=True)
class Generated:
    """What came out, and what it took.

    Attributes:
        text: Prompt and continuation.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that were made.
        first_token_seconds: Until the first of them was there.
        seconds: In all.
        bytes_sent: To the Trunks.
        bytes_received: From the Trunks.
        round_trips: Questions to each Trunk that is elsewhere.
        parts: Where each part runs.
        timings: Where the time went; `None` for a whole model.
        speculated: Whether tokens were guessed, and checked together.
        max_positions: Positions that the model was made for; `None` where that is not known.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float
    bytes_sent: int
    bytes_received: int
    round_trips: int = 0
    parts: tuple[PartPlace, ...] = ()
    timings: Breakdown | None = None
    speculated: bool = False
    max_positions: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether the text ended because the model has no more positions."""
        length = self.prompt_tokens + self.new_tokens
        return self.max_positions is not None and length >= self.max_positions

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the seconds they took, prompt included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round_trip(self) -> float | None:
        """New tokens by round trips, the prompt's included; `None` where every part is here."""
        return self.new_tokens / self.round_trips if self.round_trips else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_round_trip": self.tokens_per_round_trip,
            "is_full": self.is_full,
            "timings": None if self.timings is None else self.timings.to_dict(),
        }

    def speed(self) -> str:
        """Return one line for people: speed and bytes."""
        line = (
            f"{self.new_tokens} tokens in {self.seconds:.2f} s"
            f" ({self.tokens_per_second:.1f} tokens/s, the first after"
            f" {self.first_token_seconds:.2f} s);"
            f" sent {self.bytes_sent:,} bytes, received {self.bytes_received:,}"
        )
        if self.speculated and self.tokens_per_round_trip is not None:
            line += (
                f"; {self.round_trips} round trips, {self.tokens_per_round_trip:.2f} tokens each"
            )
        return line

    def summary(self, *, timings: bool = False) -> str:
        """Return all of it for people, with the breakdown of the time where that is wanted."""
        told = [self.speed()]
        if self.is_full:
            told.append(
                f"the text ended because the model's {self.max_positions:,} positions are full"
            )
        if self.parts:
            told.append(describe_places(self.parts))
        if timings:
            whole = "the model is whole: there are no parts to time"
            told.append(whole if self.timings is None else self.timings.describe())
        return "\n".join(told)


def generate_text(
    settings: DaemonConfig,
    config: ModelConfig,
    prompt: str,
    options: GenerateOptions,
    *,
    echo: bool = True,
    timings: bool = False,
) -> Generated:
    """Load a model, generate, and let it go again.

    Args:
        settings: For the limits of memory, and the number of threads.
        config: A pipeline, or a whole model.
        prompt: The text to go on from.
        options: How to generate.
        echo: Print the text to standard output as it comes.
        timings: Let servers say how long steps waited there, and ran.

    Raises:
        ValueError: The model can't generate text by itself, or has no tokenizer.
        RuntimeError, OSError: Loading failed, or a Trunk can't be reached or went away.
    """
    with open_language_model(settings, config, timings=timings) as model:
        return generate_with(model, prompt, options, write=_print if echo else None)


def run_generation(
    loaded: Any,
    config: ModelConfig,
    prompt: str,
    options: GenerateOptions,
    *,
    echo: bool,
    stop: threading.Event | None = None,
) -> Generated:
    """Generate with what a manager has loaded; as `generate_with`."""
    model = LanguageModel(loaded, config)
    return generate_with(model, prompt, options, write=_print if echo else None, stop=stop)


def generate_with(
    model: LanguageModel,
    prompt: str,
    options: GenerateOptions,
    *,
    write: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Generated:
    """Generate with a loaded model; blocks, until the text ends or `stop` is set.

    Args:
        model: What to generate with.
        prompt: The text to go on from.
        options: How to generate.
        write: Called with pieces of the text as they come, the prompt first.
        stop: Ends the text at the next token.

    Raises:
        ContextFull: (a `ValueError`) The prompt is as long as the model's positions.
        ValueError: The tokenizer makes no token of the prompt.
        RuntimeError, OSError: A Trunk can't be reached or went away.
    """
    inputs = model.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt has no tokens to go on from")
    options = options.within(model.max_positions, length, "the prompt")
    made = continue_ids(
        model, inputs["input_ids"], options, write=write, stop=stop, skip_prompt=False
    )
    text = model.tokenizer.decode(made.sequence, skip_special_tokens=True)
    return made.told(model, text, length, options)


@dataclass(frozen=True)
class Continued:
    """Token ids that were continued, and what that took.

    Attributes:
        sequence: int64 [positions]: those that were given, then those that were made.
        cache: What holds all of them but the last, or more.
        first_token_seconds: Until the first new one was there.
        seconds: In all.
        traffic: Bytes sent to the Trunks, and received.
        round_trips: Questions to each Trunk that is elsewhere.
        timings: Where the time went; `None` for a whole model.
    """

    sequence: torch.Tensor
    cache: Any
    first_token_seconds: float
    seconds: float
    traffic: tuple[int, int]
    round_trips: int
    timings: Breakdown | None

    def told(
        self, model: LanguageModel, text: str, prompt_tokens: int, options: GenerateOptions
    ) -> Generated:
        """Return it as a text, with all figures."""
        return Generated(
            text=text,
            prompt_tokens=prompt_tokens,
            new_tokens=self.sequence.shape[0] - prompt_tokens,
            first_token_seconds=self.first_token_seconds,
            seconds=self.seconds,
            bytes_sent=self.traffic[0],
            bytes_received=self.traffic[1],
            round_trips=self.round_trips,
            parts=model.places,
            timings=self.timings,
            speculated=options.speculates,
            max_positions=model.max_positions,
        )


def continue_ids(
    model: LanguageModel,
    ids: torch.Tensor,
    options: GenerateOptions,
    *,
    write: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    skip_prompt: bool = True,
    cache: Any = None,
    stop_strings: list[str] | None = None,
) -> Continued:
    """Continue token ids.

    Args:
        model: What to generate with.
        ids: int64 [1, positions].
        options: How to generate.
        write: Called with pieces of the text as they come.
        stop: Ends the text at the next token.
        skip_prompt: Leave the text of `ids` out of what is written.
        cache: A cache that holds the first of `ids`, and is filled; a new one where there is none.
        stop_strings: Texts that end it.
    """
    streamer = _TimedStreamer(model.tokenizer, write, skip_prompt=skip_prompt)
    arguments = options.arguments() | _assistance(model, options)
    if stop_strings:
        arguments |= {"stop_strings": stop_strings, "tokenizer": model.tokenizer}
    if stop is not None:
        arguments["stopping_criteria"] = StoppingCriteriaList([_Stopped(stop)])
    if options.seed is not None:
        torch.manual_seed(options.seed)
    before = model.traffic
    chain = model.chain
    with torch.inference_mode(), Stopwatch(chain) if chain else nullcontext() as watch:
        start = time.monotonic()
        output = model.generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            streamer=streamer,
            return_dict_in_generate=True,
            **arguments,
        )
        end = time.monotonic()
    after = model.traffic
    return Continued(
        sequence=output.sequences[0],
        cache=getattr(output, "past_key_values", None),
        first_token_seconds=(streamer.first_token_at or end) - start,
        seconds=end - start,
        traffic=(after[0] - before[0], after[1] - before[1]),
        round_trips=0 if watch is None else watch.round_trips,
        timings=None if watch is None else watch.breakdown(),
    )


def _assistance(model: LanguageModel, options: GenerateOptions) -> dict[str, Any]:
    """Return the arguments for a small model that guesses; loaded once for each model."""
    if options.assistant is None:
        return {}
    assistant, tokenizer = model.assistant(options.assistant)
    arguments = {"assistant_model": assistant}
    if tokenizer.get_vocab() != model.tokenizer.get_vocab():  # it speaks in other tokens
        arguments |= {"tokenizer": model.tokenizer, "assistant_tokenizer": tokenizer}
    return arguments


def _print(text: str) -> None:
    """Print a piece of text, now."""
    sys.stdout.write(text)
    sys.stdout.flush()


class _Stopped(StoppingCriteria):
    """Ends generation at the next token, once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any
    ) -> torch.BoolTensor:
        """Say of each row whether it is to end."""
        del scores
        ended = torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
        return cast("torch.BoolTensor", ended)


class _TimedStreamer(TextStreamer):
    """Hands on text as it comes, and notes when the first new token was there."""

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None] | None, *, skip_prompt: bool
    ) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.first_token_at: float | None = None
        self._write = write
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or the next token, or tokens."""
        self._calls += 1
        if self._calls == _PROMPT_AND_FIRST:
            self.first_token_at = time.monotonic()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what is sure not to change any more."""
        if self._write is not None:
            self._write(text + ("\n" if stream_end else ""))
