"""Many clients at one daemon, until they have had enough; then what is left is looked at."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import psutil
import torch

from session_storm.client import Client, Setting, Story
from session_storm.families import Family
from session_storm.flow import Line
from session_storm.greedy import Greedy
from session_storm.place import Look, Place
from splitlearn_core import SplitModel

CLIENTS = 16
MOST_GROWTH = 48 << 20
"""Bytes that a daemon may have more at the end than after one client.

In ten minutes it is up to 26 MB, most of it in the first: Python's objects stay as many, what grows
is the C heap, less in each minute.
"""

LENGTHS = {True: (1, 5, 63, 100), False: (1, 5, 20, 40)}
"""Of prompts, each four times: of the built-in model, and of those with few positions."""

_MORE = 16
"""Tokens that a stream may have beyond its length."""

NEEDED = (
    *("streams", "stall", "stop reading", "resumed", "too late", "idled out", "forked"),
    *("reordered", "abandon", "close", "leave", "be gone", "generate"),
)
"""What must have happened, for the storm to have been one."""


@dataclass
class Report:
    """What a storm came to.

    Attributes:
        events: What clients did and met with, and how often.
        lines: Lines of tokens that were judged.
        compared: Tokens.
        ties: Tokens that differ from the unsplit model's where the two best logits are close.
        rows: Rows of all forwards.
        forwards: Forwards.
        steps: Steps by outcome.
        resident: Bytes, before and after.
        wrong: How much was wrong.
    """

    events: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    compared: int = 0
    ties: int = 0
    rows: float = 0.0
    forwards: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    resident: tuple[int, int] = (0, 0)
    wrong: int = 0

    def __str__(self) -> str:
        """Say all of it."""
        events = ", ".join(f"{name} {count}" for name, count in sorted(self.events.items()))
        before, after = (size / 1e6 for size in self.resident)
        return (
            f"{self.compared} tokens of {self.lines} lines compared, {self.ties} ties fell the"
            f" other way; {self.forwards:.0f} forwards of {self.mean_rows:.2f} rows on average;"
            f" steps {self.steps}; {before:.1f} MB before, {after:.1f} after; events: {events}"
        )

    @property
    def mean_rows(self) -> float:
        """Rows of a forward."""
        return self.rows / max(self.forwards, 1)


def in_turn(part: SplitModel, turn: threading.Lock) -> SplitModel:
    """Let a part run for one thread at a time.

    Threads that compute beside each other wait for the interpreter's lock after every operation.
    """
    part.register_forward_pre_hook(lambda *_: turn.acquire() and None)
    part.register_forward_hook(lambda *_: turn.release(), always_call=True)
    return part


class Storm:
    """Sixteen clients at the Trunk of one family.

    Args:
        place: The daemon.
        family: Whose Trunk.
        seed: What decides what the clients do.
        length: Most tokens of a stream.

    Attributes:
        report: What it came to, so far.
    """

    def __init__(self, place: Place, family: Family, seed: int, length: int = 48) -> None:
        torch.set_num_threads(1)
        self.report = Report()
        self._place = place
        self._family = family
        self._seed = seed
        turn = threading.Lock()
        self._greedy = Greedy(family.whole(place.folder), turn)
        prompts = _prompts(LENGTHS[family.model_type is None], seed)
        self._greedy.prepare(prompts, length + _MORE)
        self._setting = Setting(
            family,
            place.url,
            in_turn(family.end(place.folder, "bottom"), turn),
            in_turn(family.end(place.folder, "top"), turn),
            place.idle_timeout,
            place.resume_timeout,
            prompts,
            length,
            lambda line: self._greedy.known(line.prompt)[len(line.tokens) :],
        )

    def run(self, *, seconds: float = 0.0, streams: int = 0) -> Iterator[tuple[str, str]]:
        """Yield each line of tokens, and what is wrong with it; at last, what is left.

        Args:
            seconds: How long clients begin streams.
            streams: How many each begins, at least.
        """
        list(self._live(1, lambda number: number < 1))  # what is made once is there afterwards
        self.report = Report()
        before, mine = self._place.look_when_quiet(), _own()
        deadline = time.monotonic() + seconds
        yield from self._live(CLIENTS, lambda n: n < streams or time.monotonic() < deadline)
        after = self._place.look_when_quiet(before)
        self._take_figures(before, after)
        yield from self._checked("what the daemon holds", after.left_since(before, MOST_GROWTH))
        yield from self._checked("what the clients hold", _left_here(mine))
        yield from self._checked("the daemon's log", filter(None, [self._place.complaints()]))
        yield from self._checked("what happened", self._missing())

    def _live(self, count: int, goes_on: Callable[[int], bool]) -> Iterator[tuple[str, str]]:
        """Let clients live, and judge what they tell."""
        told: SimpleQueue[Story | None] = SimpleQueue()
        clients = [Client(n, self._setting, self._seed, told) for n in range(count)]
        left = [count]

        def live(client: Client) -> None:
            try:
                client.run(goes_on)
            finally:
                told.put(None)

        threads = [threading.Thread(target=live, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while left[0]:
            story = told.get()
            if story is None:
                left[0] -= 1
            else:
                yield self._judged(story)
        for thread, client in zip(threads, clients, strict=True):
            thread.join()
            self.report.events.update(client.events)

    def _judged(self, story: Story) -> tuple[str, str]:
        """Return what a client did, and what is wrong with it."""
        if story.line is None:
            self.report.wrong += 1
            return f"client {story.client}", story.wrong
        return self._compared(story.client, story.line)

    def _compared(self, client: int, line: Line) -> tuple[str, str]:
        judgement = self._greedy.judge(line.prompt, line.tokens)
        self.report.lines += 1
        self.report.compared += judgement.compared
        self.report.ties += judgement.ties
        self.report.wrong += bool(judgement.wrong)
        what = f"client {client}, {judgement.compared} tokens after {len(line.prompt)}"
        return what, judgement.wrong

    def _checked(self, what: str, wrong: object) -> Iterator[tuple[str, str]]:
        found = "; ".join(wrong)  # type: ignore[call-overload]
        self.report.wrong += bool(found)
        yield what, found

    def _take_figures(self, before: Look, after: Look) -> None:
        """Take the daemon's own figures of the storm."""
        name = self._family.name
        report = self.report

        def grown(metric: str, **labels: str) -> float:
            labels = {"model": name, **labels}
            return after.total(metric, **labels) - before.total(metric, **labels)

        report.rows = grown("session_batch_rows_sum")
        report.forwards = grown("session_batch_rows_count")
        codes = {own["code"] for _, own, _ in after.metrics if "code" in own}
        counts = {code: int(grown("session_steps_total", code=code)) for code in sorted(codes)}
        report.steps = {code: count for code, count in counts.items() if count}
        report.resident = before.resident, after.resident

    def _missing(self) -> Iterator[str]:
        """Yield what should have happened, and did not."""
        needed = list(NEEDED)
        needed += ["rolled back"] if self._family.rolls_back else ["roll back refused"]
        needed += ["rejected"] if self._family.chunks else []
        for name in needed:
            if not self.report.events[name]:
                yield f"{name}: never"
        if self.report.mean_rows <= 1:
            yield f"forwards had {self.report.mean_rows:.2f} rows"
        if "internal" in self.report.steps:
            yield f"{self.report.steps['internal']} steps failed"


def _prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    rng = random.Random(seed)  # noqa: S311 - no secret
    return [rng.choices(range(6, 128), k=length) for length in lengths for _ in range(4)]


def _own() -> tuple[int, int]:
    """Return this process's threads and open files."""
    gc.collect()
    return threading.active_count(), psutil.Process().num_fds()


def _left_here(before: tuple[int, int]) -> list[str]:
    now = _own()
    names = ("threads", "descriptors")
    return [
        f"{a} {name} became {b}" for name, a, b in zip(names, before, now, strict=True) if b > a
    ]
