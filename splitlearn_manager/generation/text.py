"""A model's own words: its tokenizer, its chat template, where its answers end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from splitlearn_core.plan import FULL
from splitlearn_core.regular_files import open_regular
from splitlearn_manager.config.model_config import PIPELINE
from splitlearn_manager.generation.errors import (
    BadRequestError,
    NotGenerativeError,
    UnsupportedError,
)
from splitlearn_manager.generation.logprobs import TokenText
from splitlearn_manager.generation.requests import OF_THE_MODEL

if TYPE_CHECKING:
    from splitlearn_manager.config.model_config import ModelConfig

LONGEST_TEMPLATE = 1 << 20
"""Bytes; real ones have a few thousand."""

_SPACE = "\u2581"
"""What SentencePiece writes for the space before a word."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TextModel:
    """What turns text into tokens of a model, and back.  Its methods block for long texts.

    Attributes:
        tokenizer: transformers' own.
        max_positions: Longest context; `None` where the model's config does not say.
        vocabulary: Tokens that the model knows.
        ends: Tokens at which its answers end.
        defaults: What the model's generation_config.json says of sampling.
        chat_template: A template that the configuration gives it; `None` for its own.
    """

    tokenizer: Any
    max_positions: int | None
    vocabulary: int
    ends: frozenset[int]
    defaults: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    _known: dict[int, TokenText] = field(default_factory=dict)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text, with those that the tokenizer puts around it.

        Raises:
            BadRequestError: It holds half of a surrogate pair, which is no character.
        """
        return self._tokens(text, "prompt")

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Return the tokens of a chat, as the template writes it.

        transformers renders templates in a sandbox, in which they can change nothing and reach
        no attribute of Python's own.

        Raises:
            UnsupportedError: The model has no template.
            BadRequestError: The template refuses the messages.
        """
        if self.chat_template is None and not self.tokenizer.chat_template:
            raise UnsupportedError(
                "the model has no chat template: use /v1/completions, or let config.chat_template"
                " of the server's configuration name a file with one",
                "messages",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            message = f"the model's chat template does not take these messages: {error}"
            raise BadRequestError(message, "messages") from error
        return self._tokens(text, "messages", add_special_tokens=False)

    def _tokens(self, text: str, param: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f"{param} is no text: {error}", param) from None
        # verbose would log that a text is too long, which is refused with the figures
        given = {"add_special_tokens": add_special_tokens, "verbose": False}
        return tuple(self.tokenizer(text, **given)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def token(self, token: int) -> TokenText:
        """Return a token by itself, special or not."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> TokenText:
        text: str = self.tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        piece: str = self.tokenizer.convert_ids_to_tokens(token) or ""
        if piece.startswith(_SPACE) and not text.startswith(" "):
            text = f" {text}"  # which decoders drop at the beginning of a text
        return TokenText(text, self._octets(piece, text))

    @staticmethod
    def _octets(piece: str, text: str) -> bytes:
        """Return the bytes of a token, which need be no whole characters."""
        if "\ufffd" not in text:
            return text.encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match.group(1), 16)])
        table = _byte_alphabet()
        if all(sign in table for sign in piece):
            return bytes(table[sign] for sign in piece)
        return text.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the signs that byte-level tokenizers write bytes as (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [octet for octet in range(256) if octet not in plain]
    return {
        **{chr(octet): octet for octet in plain},
        **{chr(256 + place): octet for place, octet in enumerate(others)},
    }


def is_generative(config: ModelConfig) -> bool:
    """Whether a model of this configuration can answer with text."""
    return config.model_type == PIPELINE or config.part.component == FULL


def load_text_model(config: ModelConfig, model: Any) -> TextModel:
    """Return what turns text into a loaded model's tokens; blocks.

    Raises:
        NotGenerativeError: It is a part of a model, or has no tokenizer.
        OSError: Its chat template can't be read.
        ValueError: Its tokenizer can't.
    """
    if not is_generative(config):
        raise NotGenerativeError(
            f"model {config.model_id!r} is only a part of a model ({config.part.component}), which"
            " gives no text; ask for a pipeline or a whole model"
        )
    tokenizer = getattr(model, "tokenizer", None) or _load_tokenizer(config)
    if tokenizer is None:
        raise NotGenerativeError(f"model {config.model_id!r} has no tokenizer, so it gives no text")
    settings = _generation_config(model)
    ends = settings.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    said = settings.to_diff_dict()
    template = config.options.chat_template
    return TextModel(
        tokenizer,
        max_positions=model.max_positions,
        vocabulary=int(model.config.get_text_config(decoder=True).vocab_size),
        ends=frozenset(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]),
        defaults={name: said[name] for name in OF_THE_MODEL if said.get(name) is not None},
        chat_template=None if template is None else read_template(template),
    )


def read_template(path: str) -> str:
    """Return the chat template in a file.

    Raises:
        OSError: It can't be read.
        ValueError: It is no text, or too long.
    """
    with open_regular(Path(path)) as file:
        text = file.read(LONGEST_TEMPLATE + 1)
    if len(text) > LONGEST_TEMPLATE:
        raise ValueError(f"{path} is longer than {LONGEST_TEMPLATE} bytes: no chat template")
    return text.decode()


def _generation_config(model: Any) -> Any:
    """Return the settings of a pipeline's chain, or of a whole model."""
    from transformers import GenerationConfig  # noqa: PLC0415 - the model has imported it

    own = getattr(model.model, "generation_config", None)
    return GenerationConfig.from_model_config(model.config) if own is None else own


def _load_tokenizer(config: ModelConfig) -> Any:
    """Return the tokenizer of a whole model."""
    from splitlearn_core.quickstart import load_tokenizer  # noqa: PLC0415 - imports torch
    from splitlearn_manager.core.model_loader import named_type  # noqa: PLC0415 - so does this

    options = config.options
    return load_tokenizer(
        config.model_path,
        cache_dir=options.cache_dir,
        revision=options.revision,
        allow_uncertified=options.allow_uncertified,
        model_type=named_type(config),
        minimind=options.minimind,
    )
