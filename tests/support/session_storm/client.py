"""One client: it generates, and meanwhile does what makes a server's life hard."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from queue import SimpleQueue

import torch
from cut_wire import Wire

from session_storm.families import Family
from session_storm.flow import Flow, Line
from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_manager.client import (
    RemoteError,
    RemoteSessionClosed,
    RemoteTrunk,
    RemoteUnavailable,
)

STEP_TIMEOUT = 60.0
"""Seconds that a client waits for an answer."""

PING_TIMEOUT = 20.0
"""Seconds after which either side may hold a silent connection for lost."""

_MARGIN = 1.3
_FRAME = 4096
_MOST_ROWS = 4

ACTS = (
    *("stall", "stop_reading", "vanish", "vanish", "vanish_midway", "vanish_midway"),
    *("come_too_late", "idle_out", "roll_back", "roll_back", "speculate", "speculate"),
    *("fork", "fork_another_way", "reorder", "reorder", "abandon", "close", "leave", "be_gone"),
)
"""What is done between steps; each as often as it is named."""


@dataclass(frozen=True)
class Story:
    """What a client has to tell: a line of tokens to be judged, or what went wrong."""

    client: int
    line: Line | None = None
    wrong: str = ""


@dataclass(frozen=True)
class Setting:
    """What all clients share.

    Attributes:
        family: The model.
        url: Where its Trunk is.
        bottom: The model's first part.
        top: Its last.
        idle_timeout: Seconds after which a session without a step ends.
        resume_timeout: Seconds after which one without a connection does.
        prompts: What to begin with.
        length: Most tokens of a stream.
        guess: What may come after a prompt.
    """

    family: Family
    url: str
    bottom: SplitModel
    top: SplitModel
    idle_timeout: float
    resume_timeout: float
    prompts: Sequence[Sequence[int]]
    length: int
    guess: Callable[[Line], list[int]]


class Client:
    """One client, with a connection of its own; for one thread.

    Args:
        number: Which one.
        setting: What all share.
        seed: What decides what it does.
        told: Where it tells.

    Attributes:
        events: What it did and what it met with, and how often.
    """

    def __init__(self, number: int, setting: Setting, seed: int, told: SimpleQueue[Story]) -> None:
        self.number = number
        self.events: Counter[str] = Counter()
        self._setting = setting
        self._rng = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        self._told = told
        self._acts = self._deal(random.Random(seed), number)  # noqa: S311 - likewise

    def run(self, goes_on: Callable[[int], bool]) -> None:
        """Live, one stream after the other, for as long as `goes_on` says of their number."""
        with closing(Wire(self._setting.url)) as self._wire:
            self._arrive()
            number = 0
            while goes_on(number):
                number += 1
                try:
                    self._stream()
                except Exception:  # noqa: BLE001 - whatever it is, it is wrong
                    self._told.put(Story(self.number, wrong=traceback.format_exc()))
                    self._wire.cut()
            self._trunk.close()

    @staticmethod
    def _deal(rng: random.Random, number: int) -> Iterator[str]:
        """Return the acts in an order that all clients share, each from another place on."""
        deck = rng.sample(ACTS, len(ACTS))
        start = 6 * number % len(deck)
        return cycle(deck[start:] + deck[:start])

    def _arrive(self) -> None:
        """Begin with a new connection."""
        setting = self._setting
        self._trunk = RemoteTrunk(
            self._wire.url, setting.family.name, timeout=STEP_TIMEOUT, retry=None
        )
        for _ in range(10):
            try:
                self._model = SplitCausalLM(setting.bottom, self._trunk, setting.top)
            except RemoteUnavailable:  # a cut that was still to come
                self.events["unreachable"] += 1
            else:
                self._model.generation_config.eos_token_id = None
                self._model.generation_config.max_length = None
                return
        raise RuntimeError("ten attempts to connect failed")

    # --- A stream --------------------------------------------------------------------------

    def _stream(self) -> None:
        """Generate, and do an act now and then."""
        self.events["streams"] += 1
        length = self._rng.randint(self._setting.length // 2, self._setting.length)
        if self._rng.random() < 1 / 8:
            self._generate(length)
            return
        flow = Flow(self._model, self._first_rows())
        flow.cuts = self._wire.cuts
        while flow.made < length:
            for _ in range(self._rng.randint(1, 5)):
                self._try(flow, flow.step)
            act = next(self._acts)
            self.events[act.replace("_", " ")] += 1
            getattr(self, f"_{act}")(flow)
        self._finish(flow)

    def _first_rows(self) -> list[Line]:
        """Return one row, or several of equal length."""
        prompts = self._setting.prompts
        if self._rng.random() < 2 / 3:
            return [Line(list(self._rng.choice(prompts)))]
        chosen = [list(p) for p in self._rng.sample(prompts, self._rng.randint(2, 3))]
        if self._setting.family.pads:
            longest = max(map(len, chosen))
            return [Line(prompt, pad=longest - len(prompt)) for prompt in chosen]
        same = [list(p) for p in prompts if len(p) == len(chosen[0])]
        return [Line(prompt) for prompt in same[:3]]

    def _finish(self, flow: Flow) -> None:
        """Tell of every row, and end the session, or leave that to the collector."""
        for row in flow.rows:
            self._told.put(Story(self.number, row))
        if self._rng.random() < 2 / 3:
            flow.cache.close()

    def _generate(self, length: int) -> None:
        """Let transformers generate; it can't go on without the session, only begin again."""
        self.events["generate"] += 1
        prompt = list(self._rng.choice(self._setting.prompts))
        ids = torch.tensor([prompt])
        own = {"prompt_lookup_num_tokens": 3} if self._setting.family.rolls_back else {}
        self._arm()
        while True:
            begun = Flow(self._model, [])
            begun.cuts = self._wire.cuts
            try:
                found = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=length,
                    do_sample=False,
                    pad_token_id=0,
                    **own,
                )
            except (RemoteSessionClosed, RemoteUnavailable) as error:
                self._lose(begun, error)
            else:
                tokens = found[0, len(prompt) :].tolist()
                self._told.put(Story(self.number, Line(prompt, tokens)))
                return

    # --- Trying, and losing ----------------------------------------------------------------

    def _try(self, flow: Flow, do: Callable[[], object]) -> bool:
        """Do something with a flow; return whether its session was there, else begin again."""
        asked = time.monotonic()
        try:
            do()
        except (RemoteSessionClosed, RemoteUnavailable) as error:
            self._lose(flow, error)
            flow.begin_again()
            flow.cuts = self._wire.cuts
            return False
        if flow.connections is not None and self._wire.connections > flow.connections:
            self.events["resumed"] += 1
        self._heard_of(flow, asked)
        return True

    def _heard_of(self, flow: Flow, asked: float) -> None:
        flow.connections = self._wire.connections
        flow.cuts = self._wire.cuts
        flow.touched = asked

    def _lose(self, flow: Flow, error: RemoteSessionClosed | RemoteUnavailable) -> None:
        """Take down that a session is gone, and whether that had to be."""
        reason = getattr(error, "reason", "unavailable")
        self.events[f"lost: {reason}"] += 1
        silence = time.monotonic() - flow.touched
        cut = self._wire.cuts > flow.cuts or silence > PING_TIMEOUT
        expected = {
            "expired": silence > 0.9 * self._setting.idle_timeout,
            "connection_lost": cut,
            "unavailable": cut,
            "interrupted": silence > STEP_TIMEOUT,
        }
        if not expected.get(reason):
            wrong = (
                f"a session was lost without a cause, {silence:.1f} s after its last request;"
                f" {flow.cuts} cuts then, {self._wire.cuts} now; {flow.connections} connections"
                f" then, {self._wire.connections} now\n{_trace(error)}"
            )
            self._told.put(Story(self.number, wrong=wrong))

    def _arm(self) -> None:
        """Let the connection be cut somewhere in what comes next, in either direction."""
        nbytes = self._rng.randint(1, _FRAME)
        self._wire.cut_after(nbytes, to_server=self._rng.random() < 1 / 2)

    # --- Acts ------------------------------------------------------------------------------

    def _stall(self, flow: Flow) -> None:
        """Do nothing for a while that is not too long."""
        time.sleep(self._rng.uniform(0, 0.5) * self._setting.idle_timeout)
        self._try(flow, flow.step)

    def _stop_reading(self, flow: Flow) -> None:
        """Ask, and let the answer wait."""
        self._wire.hold(self._rng.uniform(0, 0.5) * self._setting.idle_timeout)
        self._try(flow, flow.step)

    def _vanish(self, flow: Flow) -> None:
        """Lose the connection, and come back at once."""
        self._wire.cut()
        self._try(flow, flow.step)

    def _vanish_midway(self, flow: Flow) -> None:
        """Lose the connection in the middle of a frame."""
        cuts = self._wire.cuts
        self._arm()
        for _ in range(8):
            if self._wire.cuts > cuts:
                break
            self._try(flow, flow.step)

    def _come_too_late(self, flow: Flow) -> None:
        """Lose the connection, and come back when the session is gone."""
        self._outstay(flow, "too late", self._setting.resume_timeout, self._wire.cut)

    def _idle_out(self, flow: Flow) -> None:
        """Do nothing until the session is gone."""
        self._outstay(flow, "idled out", self._setting.idle_timeout)

    def _outstay(
        self, flow: Flow, what: str, seconds: float, begin: Callable[[], None] = lambda: None
    ) -> None:
        """Be away for too long; where a busy server has not found that, for longer."""
        for longer in (1, 2, 4, 8):
            begin()
            time.sleep(_MARGIN * longer * seconds)
            if not self._try(flow, flow.step):
                self.events[what] += 1
                return

    def _roll_back(self, flow: Flow) -> None:
        """Take some tokens back, which must come again; or hear that this can't be."""
        if not self._setting.family.rolls_back:
            self._try(flow, lambda: self._be_refused(flow))
            return
        count = min(flow.made, self._rng.randint(1, 8))
        if not count or not flow.held:
            return
        self._maybe_arm()
        if self._try(flow, lambda: flow.roll_back(count)):
            self.events["rolled back"] += 1

    def _be_refused(self, flow: Flow) -> None:
        """Ask for what a state can't do; it stays as it is."""
        if not flow.held:
            return
        try:
            flow.remote.crop(-1)
        except RemoteError as error:
            if error.code != "roll_back":
                raise
            self.events["roll back refused"] += 1
        else:
            self._told.put(Story(self.number, wrong="a state was rolled back"))

    def _speculate(self, flow: Flow) -> None:
        """Let guesses be checked, some of which are wrong."""
        if not self._setting.family.chunks or len(flow.rows) > 1:
            self._try(flow, flow.step)
            return
        good = self._setting.guess(flow.rows[0])[: self._rng.randint(0, 4)]
        drafts = [*good, *self._rng.choices(range(6, 96), k=self._rng.randint(1, 3))]
        if self._rng.random() < 1 / 2:
            self._maybe_arm()
        if self._try(flow, lambda: flow.speculate(drafts)) and flow.refused:
            self.events["rejected"] += 1

    def _fork(self, flow: Flow) -> None:
        """Go on in two ways that are the same."""
        self._go_two_ways(flow, [row.copy() for row in flow.rows])

    def _fork_another_way(self, flow: Flow) -> None:
        """Go on in two ways, the other from a token that was not chosen."""
        if flow.made:
            token = self._rng.randrange(6, 96)
            self._go_two_ways(flow, [row.turned(token) for row in flow.rows])

    def _go_two_ways(self, flow: Flow, rows: list[Line]) -> None:
        twins: list[Flow] = []
        self._maybe_arm()
        if not self._try(flow, lambda: twins.append(flow.fork(rows))):
            return
        self.events["forked"] += 1
        (twin,) = twins
        self._heard_of(twin, flow.touched)
        for _ in range(self._rng.randint(2, 6)):
            self._try(twin, twin.step)
            self._try(flow, flow.step)
        self._finish(twin)

    def _reorder(self, flow: Flow) -> None:
        """Let rows go, change places, or become several."""
        if not flow.held:
            return
        count = self._rng.randint(1, _MOST_ROWS)
        chosen = self._rng.choices(range(len(flow.rows)), k=count)
        gone = [row for n, row in enumerate(flow.rows) if n not in chosen]
        self._maybe_arm()
        touched = flow.touched
        if self._try(flow, lambda: flow.reorder(chosen)):
            if chosen == list(range(count)) and not gone:
                flow.touched = touched  # rows that stay where they are: the server was not asked
            self.events["reordered"] += 1
            for row in gone:
                self._told.put(Story(self.number, row))

    def _abandon(self, flow: Flow) -> None:
        """Leave the session to the collector, and open another."""
        self._begin_again(flow)

    def _close(self, flow: Flow) -> None:
        """Close the session, and open another."""
        flow.cache.close()
        self._begin_again(flow)

    def _leave(self, flow: Flow) -> None:
        """Say goodbye with a session open, and come with another connection."""
        self._trunk.close()
        self._arrive()
        flow.model = self._model
        self._begin_again(flow)

    def _be_gone(self, flow: Flow) -> None:
        """Vanish for good; it is another client that comes."""
        self._wire.cut()
        self._leave(flow)

    def _begin_again(self, flow: Flow) -> None:
        flow.begin_again()
        flow.cuts = self._wire.cuts
        self._try(flow, flow.step)

    def _maybe_arm(self) -> None:
        """Arm now and then."""
        if self._rng.random() < 1 / 4:
            self._arm()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
