"""The terminal's side of a conversation: lines in, answers out, commands, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from splitlearn_manager.generate import ContextFull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from splitlearn_manager.conversation import Conversation
    from splitlearn_manager.generate import Generated

_PROMPT = "> "
HELP = """\
/reset   begin a new conversation
/stats   what the last answer took, and where each part runs
/help    this
/quit    end; Ctrl-D does too

Ctrl-C stops an answer.  Begin a line with // to send one that begins with /."""


class Terminal:
    """Where lines come from and answers go.

    Args:
        lines: Where lines come from.
        answers: Where answers go.

    Attributes:
        interactive: Whether a person sits there, who is prompted, and told what goes on.
    """

    def __init__(self, lines: TextIO, answers: TextIO) -> None:
        self._lines = lines
        self._answers = answers
        self.interactive = lines.isatty() and answers.isatty()
        if self.interactive:
            with suppress(ImportError):  # lines can be edited, and called back, where there is it
                import readline  # noqa: F401, PLC0415

    def read(self) -> str | None:
        """Return the next line, or `None` at the end."""
        if self.interactive:
            try:
                return input(_PROMPT)
            except EOFError:
                self.write("\n")
                return None
        line = self._lines.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def write(self, text: str) -> None:
        """Write a piece of an answer, now."""
        self._answers.write(text)
        self._answers.flush()

    def tell(self, text: str) -> None:
        """Say something that is no answer."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def talk(conversation: Conversation, terminal: Terminal) -> int:
    """Hold a conversation until the lines end; return the exit code.

    A turn that fails leaves the conversation as it was.  Where nobody sits there to see it, the
    program ends with it.
    """
    talker = _Talker(conversation, terminal)
    if terminal.interactive:
        terminal.tell(talker.greeting())
    while talker.code is None:
        try:
            line = terminal.read()
        except KeyboardInterrupt:
            if not terminal.interactive:
                return 128 + signal.SIGINT
            terminal.tell("\n(Ctrl-D or /quit ends)")
            continue
        if line is None:
            return 0
        if line.strip():
            talker.take(line)
    return talker.code


class _Talker:
    """Takes one line after another.

    Attributes:
        code: The exit code, once the program is to end.
    """

    def __init__(self, conversation: Conversation, terminal: Terminal) -> None:
        self._conversation = conversation
        self._terminal = terminal
        self._last: Generated | None = None
        self.code: int | None = None

    def greeting(self) -> str:
        """Return what a person is told at the beginning."""
        form = "" if self._conversation.has_template else " (no chat template: plain User: …)"
        return f"{self._conversation.describe()}{form}\n/help lists the commands"

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a turn."""
        if not line.startswith("/"):
            self._turn(line)
        elif line.startswith("//"):
            self._turn(line[1:])
        else:
            self._command(line.strip())

    def _command(self, command: str) -> None:
        if command in {"/quit", "/exit"}:
            self.code = 0
        elif command == "/reset":
            self._conversation.reset()
            if self._terminal.interactive:
                self._terminal.tell("a new conversation")
        elif command == "/stats":
            self._terminal.tell(self._stats())
        elif command == "/help":
            self._terminal.tell(HELP)
        else:
            self._terminal.tell(f"there is no {command}; /help lists the commands")

    def _stats(self) -> str:
        """Return what the last answer took."""
        if self._last is None:
            return f"no answer yet\n{self._conversation.describe()}"
        limit = self._conversation.limit
        length = f"{self._conversation.positions:,} tokens" + (f" of {limit:,}" if limit else "")
        return f"{self._last.summary(timings=True)}\nthe conversation has {length}"

    def _turn(self, text: str) -> None:
        """Say something, and write the answer as it comes."""
        try:
            with _stopping() as stop:
                self._last = self._conversation.answer(text, write=self._terminal.write, stop=stop)
        except KeyboardInterrupt:
            self._fail("stopped; this turn is forgotten", 128 + signal.SIGINT)
        except ContextFull as error:
            self._fail(f"{error}; /reset begins a new conversation", 1)
        except (OSError, RuntimeError, ValueError) as error:
            self._fail(str(error), 1)
        else:
            self._after()

    def _after(self) -> None:
        """Say what a person should know once the answer is there."""
        if self._last is None:
            return
        if self._last.is_full:
            self._terminal.tell(
                f"the answer was cut off: the model's {self._last.max_positions:,} positions are"
                " full; /reset begins a new conversation"
            )
        if self._terminal.interactive:
            self._terminal.tell(f"[{self._last.speed()}]")

    def _fail(self, text: str, code: int) -> None:
        """Say what went wrong; end, where nobody can do anything about it."""
        self._terminal.tell(f"splitlearn: {text}")
        if not self._terminal.interactive:
            self.code = code


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Let Ctrl-C stop an answer at its next token; pressed again, at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
