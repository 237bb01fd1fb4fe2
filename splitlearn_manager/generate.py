"""Generate text with a configured model, in this process."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import uvloop
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager.client.pipeline import Pipeline
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.failures import without_frames
from splitlearn_manager.core.resources import ResourceManager

if TYPE_CHECKING:
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate; as in transformers, where `temperature` 0 means greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return transformers' arguments for `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {key: value for key, value in chosen.items() if value is not None}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **given}


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
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float
    bytes_sent: int
    bytes_received: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the seconds they took, prompt included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    def summary(self) -> str:
        """Return one line for people."""
        return (
            f"{self.new_tokens} tokens in {self.seconds:.2f} s"
            f" ({self.tokens_per_second:.1f} tokens/s, the first after"
            f" {self.first_token_seconds:.2f} s);"
            f" sent {self.bytes_sent:,} bytes, received {self.bytes_received:,}"
        )


def generate_text(
    settings: DaemonConfig,
    config: ModelConfig,
    prompt: str,
    options: GenerateOptions,
    *,
    echo: bool = True,
) -> Generated:
    """Load a model, generate, and let it go again.

    Args:
        settings: For the manager's limits and the number of threads.
        config: A pipeline, or a whole model.
        prompt: The text to go on from.
        options: How to generate.
        echo: Print the text to standard output as it comes.

    Raises:
        ValueError: The model can't generate text by itself, or has no tokenizer.
        RuntimeError, OSError: Loading failed, or a Trunk can't be reached or went away.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_generate(settings, config, prompt, options, echo=echo))


async def _generate(
    settings: DaemonConfig,
    config: ModelConfig,
    prompt: str,
    options: GenerateOptions,
    *,
    echo: bool,
) -> Generated:
    limits = settings.manager
    resources = ResourceManager(limits.max_memory_percent, memory_limit=limits.memory_limit)
    async with AsyncModelManager(
        resources, max_models=limits.max_models, num_threads=settings.server.threads
    ) as manager:
        await manager.load_model(config)
        async with manager.use(config.model_id) as managed:
            stop = threading.Event()
            try:
                return await managed.run(
                    run_generation, managed.model, config, prompt, options, echo=echo, stop=stop
                )
            except Exception as error:  # noqa: BLE001 - its frames would keep the model in memory
                raise without_frames(error) from None
            finally:
                stop.set()  # a thread can't be ended: interrupted, it would go on to the last token


def run_generation(
    model: Any,
    config: ModelConfig,
    prompt: str,
    options: GenerateOptions,
    *,
    echo: bool,
    stop: threading.Event | None = None,
) -> Generated:
    """Generate with a loaded model; blocks, until the text ends or `stop` is set.

    Raises:
        ValueError: The model can't generate text by itself, has no tokenizer, or makes no token of
            the prompt.
    """
    tokenizer = _tokenizer(model, config)
    language_model = model.model
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens to go on from")
    streamer = _TimedStreamer(tokenizer, echo=echo)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    trunks = getattr(model, "trunks", [])
    before = _traffic(trunks)
    start = time.monotonic()
    with torch.inference_mode():
        ids = language_model.generate(
            **inputs,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stopped(stop)] if stop else []),
            **options.arguments(),
        )
    end = time.monotonic()
    after = _traffic(trunks)
    prompt_tokens = inputs["input_ids"].shape[1]
    return Generated(
        text=tokenizer.decode(ids[0], skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=ids.shape[1] - prompt_tokens,
        first_token_seconds=(streamer.first_token_at or end) - start,
        seconds=end - start,
        bytes_sent=after[0] - before[0],
        bytes_received=after[1] - before[1],
    )


def _tokenizer(model: Any, config: ModelConfig) -> Any:
    """Return the model's tokenizer, or say why there will be no text."""
    if not isinstance(model, Pipeline) and getattr(model, "component", None) != "full":
        raise ValueError(
            f"{config.model_id} is only a part of a model ({getattr(model, 'component', '?')});"
            " generating needs a pipeline or a whole model"
        )
    if isinstance(model, Pipeline):
        tokenizer = model.tokenizer
    else:
        part = config.part
        tokenizer = load_tokenizer(
            config.model_path,
            cache_dir=part.cache_dir,
            revision=part.revision,
            allow_uncertified=part.allow_uncertified,
        )
    if tokenizer is None:
        raise ValueError(f"{config.model_path} has no tokenizer, so text can't be generated")
    return tokenizer


def _traffic(trunks: list[Any]) -> tuple[int, int]:
    """Return bytes sent and received so far."""
    return sum(t.bytes_sent for t in trunks), sum(t.bytes_received for t in trunks)


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
    """Prints text as it comes (prompt first), and notes when the first new token was there."""

    def __init__(self, tokenizer: Any, *, echo: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.echo = echo
        self.first_token_at: float | None = None
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or the next token."""
        self._calls += 1
        if self._calls == 2:  # noqa: PLR2004 - the first call brings the prompt
            self.first_token_at = time.monotonic()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is sure not to change any more."""
        if self.echo:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()
