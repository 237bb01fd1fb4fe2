"""A conversation: what is computed and sent of each turn, and the history it keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_fakes import daemon_in_thread
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.conversation import (
    PLAIN_STOP,
    Conversation,
    Message,
    _StopHeld,
    plain_prompt,
)
from splitlearn_manager.generate import ContextFull, GenerateOptions
from splitlearn_manager.language_model import LanguageModel, open_language_model

GREEDY = GenerateOptions(max_new_tokens=12)
TURNS = ["Hello there", "What is a list?", "And the name of the file?"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    part = {"component": "trunk", "split_points": [2, 6]}
    model = ModelConfig("trunk", "builtin:demo", dtype="float32", config=part)
    with daemon_in_thread(DaemonConfig(server=ServerConfig(port=0), models=(model,))) as daemon:
        yield daemon.url


@pytest.fixture(scope="module")
def split(url: str) -> Iterator[LanguageModel]:
    options = {"split_points": [2, 6], "trunk": url}
    config = ModelConfig(
        "demo", "builtin:demo", model_type="pipeline", dtype="float32", config=options
    )
    with open_language_model(DaemonConfig(), config, timings=True) as model:
        yield model


@pytest.fixture(scope="module")
def whole() -> LanguageModel:
    config = ModelConfig("demo", "builtin:demo", dtype="float32")
    return open_language_model(DaemonConfig(), config)


def test_only_what_is_new_is_sent(split: LanguageModel, whole: LanguageModel) -> None:
    """The answers are those of the unsplit model that reads all of it each time."""
    talk = Conversation(split, GREEDY)
    per_token = 192 * 4
    lengths = [0]
    for text in TURNS:
        pieces: list[str] = []
        answer = talk.answer(text, write=pieces.append)
        lengths.append(talk.positions)
        # all that came since the last turn, but for the last token, which nobody needs yet
        new = lengths[-1] - lengths[-2]
        assert answer.bytes_sent < new * (per_token + 200) + 500
        assert "".join(pieces).strip() == answer.text.strip()
        assert answer.new_tokens > 0

    anew: list[Message] = []
    tokenizer = whole.tokenizer
    for text, said in zip(TURNS, talk.messages[1::2], strict=True):
        anew.append(Message("user", text))
        ids = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in anew],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        made = whole.generator.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert said == Message("assistant", tokenizer.decode(made[0, ids.shape[1] :], True))
        anew.append(said)


@pytest.mark.parametrize("options", [{"prompt_lookup": 5}, {"assistant": "builtin:demo"}], ids=str)
def test_speculation_says_the_same(split: LanguageModel, options: dict[str, Any]) -> None:
    plain, guessed = (
        Conversation(split, GenerateOptions(max_new_tokens=24, **more)) for more in ({}, options)
    )
    for text in TURNS:
        expected, found = plain.answer(text), guessed.answer(text)
        assert found.text == expected.text
        assert found.round_trips <= expected.round_trips
        assert found.speculated
        assert "tokens each" in found.speed()
    assert guessed.messages == plain.messages
    if "assistant" in options:  # which is the model itself: its guesses are right
        assert found.tokens_per_round_trip is not None
        assert found.tokens_per_round_trip >= 2


def test_a_stopped_answer_stays_and_the_next_turn_goes_on(split: LanguageModel) -> None:
    talk = Conversation(split, GREEDY)
    stop = threading.Event()
    stop.set()

    stopped = talk.answer(TURNS[0], stop=stop)
    assert stopped.new_tokens == 1
    assert talk.messages[-1].role == "assistant"

    again = talk.answer(TURNS[1])
    fresh = Conversation(split, GREEDY)
    fresh.messages = talk.messages[:2]
    assert fresh.answer(TURNS[1]).text == again.text


def test_a_new_conversation_knows_nothing(split: LanguageModel) -> None:
    talk = Conversation(split, GREEDY, system="Be brief.")
    first = talk.answer(TURNS[0]).text
    assert talk.messages[0] == Message("system", "Be brief.")
    talk.answer(TURNS[1])

    talk.reset()

    assert talk.messages == [Message("system", "Be brief.")]
    assert talk.positions == 0
    assert talk.answer(TURNS[0]).text == first


def test_a_conversation_that_is_too_long_is_told_and_changes_nothing(split: LanguageModel) -> None:
    talk = Conversation(split, GREEDY)
    talk.answer(TURNS[0])
    before = list(talk.messages)

    with pytest.raises(
        ContextFull, match=r"the conversation has [\d,]+ tokens, and the model has 512"
    ):
        talk.answer("the list " * 400)

    assert talk.messages == before
    assert talk.answer(TURNS[1]).new_tokens > 0


def test_an_answer_ends_where_the_positions_do(split: LanguageModel) -> None:
    talk = Conversation(split, GenerateOptions(max_new_tokens=512))
    text = "the list of names of " * 80
    length = len(split.tokenizer(text).input_ids)
    assert length < 500

    answer = talk.answer(text)

    assert talk.positions <= 512
    assert answer.is_full == (talk.positions == 512)


def test_a_failure_forgets_the_turn_and_the_next_one_computes_it_anew(
    split: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, other = Conversation(split, GREEDY), Conversation(split, GREEDY)
    for conversation in (talk, other):
        conversation.answer(TURNS[0])

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(type(split.trunks[0]), "__call__", fail)
        with pytest.raises(ConnectionError):
            talk.answer(TURNS[1])
    assert len(talk.messages) == 2

    assert talk.answer(TURNS[1]).text == other.answer(TURNS[1]).text
    assert talk.messages == other.messages


def test_a_template_that_refuses_is_named(split: LanguageModel) -> None:
    talk = Conversation(split, GREEDY)
    talk.messages = [Message("tool", "x")]

    with pytest.raises(ValueError, match=r"the chat template of builtin:demo refuses: role must"):
        talk.answer("hello")


# --- Models without a template -----------------------------------------------------------------


@pytest.fixture
def plain(whole: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr(whole.tokenizer, "chat_template", None)
    return whole


def test_the_plain_form() -> None:
    said = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b")]

    text = plain_prompt([*said, Message("user", "c")])

    assert text == "System: Be brief.\nUser: a\nAssistant: b\nUser: c\nAssistant:"


def test_a_model_without_a_template_answers_in_the_plain_form(plain: LanguageModel) -> None:
    talk = Conversation(plain, GREEDY)
    for text in TURNS:
        talk.answer(text)

    assert talk.messages[-1].content == unsplit_answer(plain, talk.messages[:-1], 12)


def unsplit_answer(model: LanguageModel, messages: list[Message], new: int) -> str:
    """Return what the whole model says to all of it at once."""
    ids = model.tokenizer(plain_prompt(messages), return_tensors="pt").input_ids
    made = model.generator.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    text = str(model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return text.partition(PLAIN_STOP)[0].strip()


@pytest.mark.parametrize(
    ("pieces", "written"),
    [
        (["one two"], "one two"),
        (["one", "\nUs", "er: more"], "one"),
        (["one\n", "Use", "less"], "one\nUseless"),
        (["one\nUser", ":", " and", " more"], "one"),
        (["one\n"], "one\n"),
    ],
    ids=str,
)
def test_a_stop_string_is_never_written(pieces: list[str], written: str) -> None:
    out: list[str] = []
    held = _StopHeld(out.append, PLAIN_STOP)
    for piece in pieces:
        held(piece)
    held.end()

    assert "".join(out) == written


def save_plain_model(model_type: str, folder: Path) -> None:
    """Write a tiny model, and a tokenizer without a chat template."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.vocab_size = 4096
    config.eos_token_id = config.pad_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("model_type", ["mamba", "bamba", "mistral"])
def test_caches_that_can_not_be_put_back(model_type: str, tmp_path: Path) -> None:
    """All is computed anew then, and the answers are the same as ever."""
    save_plain_model(model_type, tmp_path)
    model = open_language_model(DaemonConfig(), ModelConfig("other", str(tmp_path)))
    talk = Conversation(model, GenerateOptions(max_new_tokens=6))
    assert not talk.has_template
    for text in TURNS:
        talk.answer(text)

    assert talk.messages[-1].content == unsplit_answer(model, talk.messages[:-1], 6)


def test_a_trunk_elsewhere_whose_cache_does_not_count(tmp_path: Path) -> None:
    save_plain_model("mamba", tmp_path)
    part = {"component": "trunk", "split_points": [2, 4]}
    served = ModelConfig("trunk", str(tmp_path), config=part)
    greedy = GenerateOptions(max_new_tokens=6)
    with daemon_in_thread(DaemonConfig(server=ServerConfig(port=0), models=(served,))) as daemon:
        options = {"split_points": [2, 4], "trunk": daemon.url}
        config = ModelConfig("other", str(tmp_path), model_type="pipeline", config=options)
        with open_language_model(DaemonConfig(), config) as model:
            talk = Conversation(model, greedy)
            for text in TURNS:
                talk.answer(text)

    whole = open_language_model(DaemonConfig(), ModelConfig("other", str(tmp_path)))
    assert talk.messages[-1].content == unsplit_answer(whole, talk.messages[:-1], 6)
