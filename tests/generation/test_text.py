"""What a model's tokens mean, and where its answers end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager import ModelConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.generation.errors import NotGenerativeError, UnsupportedError
from splitlearn_manager.generation.logprobs import TokenText
from splitlearn_manager.generation.text import TextModel, load_text_model

DEMO = "builtin:demo"


def text_of(tokenizer: Any) -> TextModel:
    return TextModel(tokenizer, 512, 4096, frozenset({2}))


def sentencepiece() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "▁world": 2, "lo": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


def test_tokens_by_themselves_have_their_space_and_their_bytes() -> None:
    text = text_of(sentencepiece())

    assert text.token(2) == TokenText(" world", b" world")
    assert text.token(3) == TokenText("lo", b"lo")
    assert text.token(1) == TokenText("\ufffd", b"\xe2")


def test_bytes_of_tokens_that_are_no_characters_make_the_text() -> None:
    text = text_of(load_tokenizer(DEMO))
    sentence = "naïve 😀 你好"

    tokens = text.encode(sentence)

    octets = b"".join(text.token(token).octets for token in tokens)
    assert octets.decode() == f"<s>{sentence}"


def test_a_text_that_is_too_long_is_no_warning() -> None:
    tokenizer = load_tokenizer(DEMO)
    tokenizer.model_max_length = 8
    told = "sequence-length-is-longer-than-the-specified-maximum"

    assert len(text_of(tokenizer).encode("so many words " * 9)) > 8

    assert told not in tokenizer.deprecation_warnings
    tokenizer("so many words " * 9)
    assert told in tokenizer.deprecation_warnings


def test_what_a_model_says_of_sampling_and_of_its_end() -> None:
    said = {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "do_sample": True}
    settings = GenerationConfig(**said)
    model = SimpleNamespace(
        tokenizer=load_tokenizer(DEMO),
        model=SimpleNamespace(generation_config=settings),
        max_positions=512,
        config=SimpleNamespace(get_text_config=lambda **_: SimpleNamespace(vocab_size=4096)),
    )
    config = ModelConfig("m", DEMO, config={"component": "full"})

    text = load_text_model(config, model)

    assert text.ends == {7, 9}
    assert text.defaults == {"temperature": 0.6, "top_k": 20}


def test_a_part_gives_no_text() -> None:
    config = ModelConfig("m", DEMO, config={"component": "top", "split_points": [2, 6]})
    with pytest.raises(NotGenerativeError, match="only a part of a model"):
        load_text_model(config, None)


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match="name a file with one"):
        text_of(sentencepiece()).encode_chat(
            [{"role": "user", "content": "x"}], add_generation_prompt=True
        )


def test_the_example_of_a_gateway_is_valid() -> None:
    config = DaemonConfig.from_yaml(Path(__file__).parents[2] / "configs" / "demo-gateway.yaml")

    assert config.models[0].pipeline.links[0].trunk == ("http://127.0.0.1:8000",)
