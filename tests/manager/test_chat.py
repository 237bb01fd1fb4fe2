"""The terminal's side of a chat: commands, Ctrl-C, piped lines, and what is told when."""

from __future__ import annotations

import io
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest

from splitlearn_manager.chat import Terminal, talk
from splitlearn_manager.generate import ContextFull, Generated

MADE = Generated("text", 3, 2, 0.1, 0.5, 10, 20)


class FakeConversation:
    """Answers in capitals; can fail, fill up, or be interrupted meanwhile."""

    has_template = True
    limit: int | None = 100
    positions = 7
    fills: int | None = None

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.resets = 0
        self.interrupts = 0
        self.fail_with: Exception | None = None

    def describe(self) -> str:
        return "a model"

    def reset(self) -> None:
        self.resets += 1

    def answer(self, text: str, *, write: Any, stop: threading.Event) -> Generated:
        self.heard.append(text)
        if self.fail_with is not None:
            raise self.fail_with
        for number in range(self.interrupts):
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set(), number
        write(f"{text.upper()}\n")
        return replace(MADE, max_positions=self.fills)


class Person(io.StringIO):
    """Lines that come from a terminal."""

    def isatty(self) -> bool:
        return True


def chat(conversation: FakeConversation, lines: str, *, person: bool = False) -> tuple[int, str]:
    kind = Person if person else io.StringIO
    answers = kind()
    terminal = Terminal(kind(lines), answers)
    return talk(conversation, terminal), answers.getvalue()  # type: ignore[arg-type]


@pytest.fixture
def conversation() -> FakeConversation:
    return FakeConversation()


def test_piped_lines_are_turns_and_only_answers_come_out(
    conversation: FakeConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers = chat(conversation, "one\n\n  \ntwo\r\nthree")

    assert code == 0
    assert conversation.heard == ["one", "two", "three"]
    assert answers == "ONE\nTWO\nTHREE\n"
    assert capsys.readouterr().err == ""


def test_commands(conversation: FakeConversation, capsys: pytest.CaptureFixture[str]) -> None:
    code, answers = chat(conversation, "/help\n/stats\n/reset\n/nonsense\n//path\n/quit\nlate\n")

    told = capsys.readouterr().err
    assert code == 0
    assert conversation.resets == 1
    assert conversation.heard == ["/path"]
    assert answers == "/PATH\n"
    assert "Ctrl-C stops an answer" in told
    assert "no answer yet" in told
    assert "there is no /nonsense" in told


def test_stats_after_an_answer(
    conversation: FakeConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(conversation, "one\n/stats\n")

    told = capsys.readouterr().err
    assert "2 tokens in 0.50 s (4.0 tokens/s, the first after 0.10 s)" in told
    assert "the conversation has 7 tokens of 100" in told


def test_ctrl_c_stops_the_answer_and_not_the_program(conversation: FakeConversation) -> None:
    conversation.interrupts = 1

    code, answers = chat(conversation, "one\ntwo\n")

    assert code == 0
    assert answers == "ONE\nTWO\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_does_not_wait_for_the_token(
    conversation: FakeConversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["one", "two"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    conversation.interrupts = 2

    code, answers = chat(conversation, "", person=True)

    assert code == 0
    assert answers == ""
    assert capsys.readouterr().err.count("stopped; this turn is forgotten") == 2


def test_at_the_prompt_ctrl_c_says_how_to_end_and_ctrl_d_ends(
    conversation: FakeConversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = ["one", KeyboardInterrupt(), EOFError()]

    def read(prompt: str) -> str:
        assert prompt == "> "
        now = said.pop(0)
        if isinstance(now, BaseException):
            raise now
        return str(now)

    monkeypatch.setattr("builtins.input", read)

    code, answers = chat(conversation, "", person=True)

    told = capsys.readouterr().err
    assert code == 0
    assert answers == "ONE\n\n"
    assert "(Ctrl-D or /quit ends)" in told
    assert told.startswith("a model\n/help lists the commands\n")
    assert "[2 tokens in 0.50 s" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ContextFull("600 tokens, and 512 positions"), "positions; /reset begins a new"),
        (ConnectionError("cannot reach http://x"), "splitlearn: cannot reach http://x"),
    ],
    ids=["full", "gone"],
)
def test_a_turn_that_fails(
    error: Exception,
    told: str,
    conversation: FakeConversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conversation.fail_with = error

    code, _ = chat(conversation, "one\ntwo\n")
    assert code == 1  # nobody is there who could do anything about it
    assert conversation.heard == ["one"]
    assert told in capsys.readouterr().err

    lines = iter(["one", "two"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    code, _ = chat(conversation, "", person=True)
    assert code == 0
    assert conversation.heard == ["one", "one", "two"]


def test_an_answer_that_fills_the_positions_is_told(
    conversation: FakeConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.fills = 5  # three of the prompt, two that were made

    chat(conversation, "one\n")

    assert "cut off: the model's 5 positions are full; /reset" in capsys.readouterr().err
