"""Generating text in this process: its end, also when it is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from splitlearn_core import SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager import ModelConfig, language_model
from splitlearn_manager.generate import ContextFull, GenerateOptions, run_generation

DEMO = ModelConfig("demo", "builtin:demo", dtype="float32")
OPTIONS = GenerateOptions(max_new_tokens=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> SplitModel:
    return load_component("builtin:demo", "full", dtype="float32")


def test_it_goes_on_to_the_last_token(model: SplitModel) -> None:
    result = run_generation(model, DEMO, "Return the", OPTIONS, echo=False, stop=threading.Event())

    assert result.new_tokens == 4


def test_it_stops_at_the_next_token(model: SplitModel) -> None:
    stop = threading.Event()
    stop.set()

    result = run_generation(model, DEMO, "Return the", OPTIONS, echo=False, stop=stop)

    assert result.new_tokens == 1


def test_a_prompt_without_tokens_is_named(
    model: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizer(*_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.empty(1, 0)}

    monkeypatch.setattr(language_model, "_tokenizer", lambda *_: tokenizer)

    with pytest.raises(ValueError, match="the prompt has no tokens"):
        run_generation(model, DEMO, "", OPTIONS, echo=False)


def test_a_text_ends_where_the_positions_do(model: SplitModel) -> None:
    prompt = "the list of names of " * 80
    length = len(load_tokenizer("builtin:demo")(prompt).input_ids)

    options = GenerateOptions(max_new_tokens=900, temperature=1.0, seed=0)
    result = run_generation(model, DEMO, prompt, options, echo=False)

    assert result.new_tokens <= 512 - length
    assert result.is_full == (result.new_tokens == 512 - length)
    assert ("512 positions are full" in result.summary()) == result.is_full
    with pytest.raises(ContextFull, match=r"the prompt has [\d,]+ tokens, and the model has 512"):
        run_generation(model, DEMO, prompt * 4, options, echo=False)
