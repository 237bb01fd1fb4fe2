"""Conversations over a real socket with a real daemon, most of whose frames are wrong.

Each message gets exactly one answer with its own number, or ends the connection with a code that
says why; somebody else's session goes on meanwhile, and gets the very numbers that it should.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import psutil
import torch
from joining import load_ends
from raw_websocket import BINARY, CLOSE, CONT, PING, TEXT, PeerGone, RawWebSocket, frame_of
from raw_websocket import raw_websocket as connected
from serving_fakes import OnePart, daemon_in_thread, trunk_config

from frame_fuzz.messages import (
    DAMAGE,
    HIDDEN,
    MOST_POSITIONS,
    Known,
    good,
    odd_change,
    odd_step,
    opening,
)
from splitlearn_core import SplitModel
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.serving import errors
from splitlearn_manager.serving.errors import SessionError, StepFailedError
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import (
    Frame,
    Kind,
    TensorName,
    WireError,
    decode,
    encode,
)

DEADLINE = 30.0
MAX_FRAME = 1 << 18
ENOUGH = 32
"""Bytes of a message that can be damaged again."""
MOST_HELD = 50 * MOST_POSITIONS
"""Positions that the daemon grants: at the end they can be had at once, if none is lost."""

MEMORY = 64 << 20
"""Bytes by which the process may have grown since the first tenth."""

TOLERANCE = 2e-6

CLIENTS = WITNESS, FUZZER = "witness", "fuzzer"
"""Who has a token, which is the name, and so sessions of its own."""

CODES = {"bad_frame"} | {
    one.code
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, SessionError)
} - {SessionError.code, StepFailedError.code}
"""What an ERROR may say: any but `internal`, which would mean that a wrong input got through."""

GOODBYES = {1000, 1002, 1003, 1005, 1007, 1009}


@dataclass
class Conversation:
    """One connection, what was asked on it, and what has not been answered yet."""

    socket: RawWebSocket
    rng: random.Random
    seen: Counter[str]
    wrong: list[str] = field(default_factory=list)
    known: dict[int, Known] = field(default_factory=dict)
    open: Counter[int] = field(default_factory=Counter)
    asked: dict[int, list[Frame]] = field(default_factory=dict)
    requests: int = 0
    gone: bool = False
    ending: bool = False

    def number(self) -> int:
        self.requests += 1
        return self.requests

    def send(self, message: bytes, *raw: bytes) -> None:
        """Send a message, in one frame or as those given, and note that it has no answer yet."""
        try:
            frame = decode(message)
            request = frame.request
            self.asked.setdefault(request, []).append(frame)
        except WireError as error:
            request = error.request
            self.ending |= not error.header_ok
        self.open[request] += 1
        self.socket.send(*(raw or (frame_of(BINARY, message),)))

    async def settle(self) -> None:
        """Wait until all was answered, or the connection has ended."""
        try:
            async with asyncio.timeout(DEADLINE):
                while self.open and not self.gone:
                    self.take(await self.socket.receive())
        except PeerGone as gone:
            self.gone = True
            self.seen[f"closed with {gone.code}"] += 1
            if gone.code not in GOODBYES:
                self.wrong.append(f"the connection ended with {gone.code}")
            elif not self.ending:
                self.wrong.append(f"the connection ended with {gone.code}, without need")
        except TimeoutError:
            self.gone = True
            self.wrong.append(f"no answer to {dict(self.open)}")
        except WireError as error:
            self.gone = True
            self.wrong.append(f"what came is no frame: {error}")

    def take(self, frame: Frame) -> None:
        """Take an answer into account."""
        if frame.kind is Kind.CLOSED:
            self.known.pop(frame.session, None)
            if frame.request == 0 and not self.open[0]:
                return  # what the server says on its own account
        if not self.open[frame.request]:
            self.wrong.append(f"nobody asked for {frame}")
        self.open[frame.request] -= 1
        self.open += Counter()
        asked = self.asked.get(frame.request, [])
        if frame.kind is Kind.RESULT and not any(_answers(frame, one) for one in asked):
            self.wrong.append(f"{frame} is no answer to {asked}")
        self.note(frame)

    def note(self, frame: Frame) -> None:
        """Note what an answer says of a session."""
        self.seen[str(frame.info.get("code", frame.kind.name))] += 1
        known = self.known.get(frame.session)
        match frame.kind:
            case Kind.OPENED:
                token = str(frame.info.get("resume", ""))
                rows = known.rows if known else 0
                self.known[frame.session] = Known(frame.session, token, frame.position, rows)
            case Kind.RESULT | Kind.DONE if known is not None:
                known.length = frame.position
                if frame.kind is Kind.RESULT:
                    known.rows = frame.tensors[0].shape[0]
            case Kind.ERROR if frame.info.get("code") not in CODES:
                self.wrong.append(f"the answer is {dict(frame.info)}")
            case Kind.ERROR | Kind.CLOSED | Kind.RESULT | Kind.DONE:
                pass
            case other:
                self.wrong.append(f"the server sent {other.name}")


def _answers(result: Frame, step: Frame) -> bool:
    """Whether a RESULT can be that of a step: of its session, its shape, and its positions."""
    given = step.tensor(TensorName.HIDDEN_STATES)
    if step.kind is not Kind.STEP or given is None or result.session != step.session:
        return False
    end = step.position + given.shape[1]
    return (result.position, result.tensors[0].shape) == (end, given.shape)


@dataclass
class Witness:
    """Somebody else, who does nothing wrong, and gets what is right."""

    socket: RawWebSocket
    inputs: list[torch.Tensor]
    wanted: list[torch.Tensor]
    exact: bool
    session: int = 0
    done: int = 0
    length: int = 0

    async def look(self) -> str:
        """Take a step, and return what is wrong with its answer."""
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._step()
        except (TimeoutError, PeerGone) as error:
            return f"the witness is not answered: {error!r}"

    async def _step(self) -> str:
        if self.done == len(self.inputs):
            await self.socket.ask(Frame(Kind.CLOSE, 1, self.session))
            self.session = 0
        if not self.session:
            opened = await self.socket.ask(Frame(Kind.OPEN, 1, info={"resume": True}))
            if opened.kind is not Kind.OPENED:
                return f"the witness gets no session: {dict(opened.info)}"
            self.session, self.done, self.length = opened.session, 0, 0
        given, wanted = self.inputs[self.done], self.wanted[self.done]
        wire = tensor_to_wire(TensorName.HIDDEN_STATES, given)
        frame = Frame(Kind.STEP, 2, self.session, self.length, tensors=(wire,))
        result = await self.socket.ask(frame)
        if result.kind is not Kind.RESULT:
            return f"the witness gets {result.kind.name} {dict(result.info)}"
        self.done, self.length = self.done + 1, self.length + given.shape[1]
        found = tensor_from_wire(result.tensors[0])
        if self.exact:
            return "" if torch.equal(found, wanted) else "the witness gets other numbers"
        error = float((found - wanted).abs().max() / wanted.abs().max())
        return "" if error <= TOLERANCE else f"the witness' numbers are off by {error:.1e}"


# --- What is sent ----------------------------------------------------------------------------


Sent = tuple[str, int]
"""What was sent, in words, and how many frames it was."""


def batch(talk: Conversation, witness: Witness) -> Sent:
    """Send one wrong message, or a few at once."""
    if not talk.rng.randrange(12):
        return foreign(talk, witness)
    known = talk.rng.choice(list(talk.known.values()) or [Known(talk.rng.getrandbits(32))])
    return talk.rng.choice(SENDERS)(talk, known)


def a_damaged_frame(talk: Conversation, known: Known) -> Sent:
    """Send a good frame that was damaged, now and then twice."""
    rng = talk.rng
    damage = rng.choice(DAMAGE)
    message = damage(rng, encode(good(rng, known, talk.number())))
    if len(message) > ENOUGH and not rng.randrange(5):
        message = rng.choice(DAMAGE)(rng, message)
    talk.send(message)
    return damage.__name__, 1


def an_odd_frame(talk: Conversation, known: Known) -> Sent:
    """Send what is a frame, and can't be done."""
    message = talk.rng.choice((odd_step, odd_change))(talk.rng, known, talk.number())
    talk.send(message)
    return f"odd {Kind(message[1]).name}", 1


def some_at_once(talk: Conversation, known: Known) -> Sent:
    """Send good frames in any order, and wait for none of them."""
    many = [encode(good(talk.rng, known, talk.number())) for _ in range(talk.rng.randint(2, 4))]
    talk.rng.shuffle(many)
    for one in many:
        talk.send(one)
    return "good frames, out of order and at once", len(many)


def one_twice(talk: Conversation, known: Known) -> Sent:
    """Send a good frame again, before it is answered."""
    message = encode(good(talk.rng, known, talk.number()))
    talk.send(message)
    talk.send(message)
    return "one frame twice", 2


def one_session_more(talk: Conversation, known: Known) -> Sent:
    """Open another session."""
    del known
    talk.send(encode(opening(talk.rng, talk.number())))
    return "one session more", 1


def one_in_pieces(talk: Conversation, known: Known) -> Sent:
    """Send a good frame in fragments."""
    message = encode(good(talk.rng, known, talk.number()))
    talk.send(message, *fragments(talk.rng, message))
    return "fragments", 1


def fragments(rng: random.Random, message: bytes) -> Iterator[bytes]:
    """Yield a message in pieces, with a ping between."""
    size = rng.choice((1, 10, 1000, len(message)))
    yield frame_of(BINARY, message[:size], fin=False)
    yield frame_of(PING, b"x")
    for start in range(size, len(message), size):
        yield frame_of(CONT, message[start : start + size], fin=False)
    yield frame_of(CONT, b"")


def foreign(talk: Conversation, witness: Witness) -> Sent:
    """Ask something of the witness' session."""
    rng = talk.rng
    theirs = Known(witness.session, "0" * 32, witness.length, 1)
    message = encode(good(rng, theirs, talk.number()))
    talk.send(message)
    return f"somebody else's session: {Kind(message[1]).name}", 1


def no_message(talk: Conversation, known: Known) -> Sent:
    """Send what is no binary message; nobody has to answer, so a frame after it is."""
    del known
    rng = talk.rng
    noise = rng.randbytes(30)
    kinds = {
        "text": frame_of(TEXT, b"hello"),
        "text that is none": frame_of(TEXT, b"\xff\xfe"),
        "text in pieces": frame_of(TEXT, b"a", fin=False) + frame_of(CONT, b"b"),
        "a piece of nothing": frame_of(CONT, noise),
        "a message in a message": frame_of(BINARY, noise, fin=False) + frame_of(BINARY, noise),
        "no mask": frame_of(BINARY, noise, masked=False),
        "an unknown opcode": frame_of(rng.choice((3, 7, 11, 15)), noise),
        "reserved bits": bytes([0xC2]) + frame_of(BINARY, noise)[1:],
        "a long ping": frame_of(PING, bytes(126)),
        "half a ping": frame_of(PING, b"x", fin=False),
        "pings": frame_of(PING, b"x") * 50,
        "too long": frame_of(BINARY, noise, length=MAX_FRAME + 1),
        "longer than there is": frame_of(BINARY, noise, length=2**63 - 1),
        "a length below zero": frame_of(BINARY, noise, length=2**64 - 1),
        "half a goodbye": frame_of(CLOSE, b"\x03"),
        "a goodbye with no code": frame_of(CLOSE, b""),
        "a goodbye of another kind": frame_of(CLOSE, b"\x00\x01abc"),
        "a goodbye in no language": frame_of(CLOSE, b"\x03\xe8\xff"),
        "empty messages": frame_of(BINARY, b"") * 20,
    }
    name = rng.choice(list(kinds))
    talk.ending |= name != "pings"
    talk.open.clear()
    talk.socket.send(kinds[name])
    talk.send(encode(Frame(Kind.CLOSE, talk.number())))
    if name == "empty messages":
        talk.open[0] += 20  # of which some may be answered before the connection ends
    return name, 1


SENDERS = (
    *[a_damaged_frame] * 4,
    *[an_odd_frame] * 2,
    some_at_once,
    one_twice,
    one_session_more,
    one_in_pieces,
    no_message,
)


async def leave(talk: Conversation) -> None:
    """End a conversation in one of the ways in which clients do."""
    rng, writer = talk.rng, talk.socket.writer
    if talk.gone:
        return
    match rng.randrange(4):
        case 0:
            talk.socket.send(frame_of(CLOSE, b"\x03\xe8"))
            await writer.drain()
        case 1:
            talk.socket.send(frame_of(BINARY, rng.randbytes(500))[: rng.randrange(1, 500)])
            await writer.drain()
        case 2:
            if talk.known:  # a step whose answer nobody waits for
                message = good(rng, rng.choice(list(talk.known.values())), 1)
                talk.socket.send(frame_of(BINARY, encode(message)))
            await writer.drain()
        case _:
            pass


# --- Who is asked ----------------------------------------------------------------------------


@contextmanager
def fuzzed_daemon(
    part: SplitModel, *, rows: int, positions: int | None
) -> Iterator[tuple[Daemon, AsyncModelManager]]:
    """Run a daemon with one Trunk, and limits that are reached."""
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    server = ServerConfig.from_dict(
        {
            "port": 0,
            "max_sessions": 12,
            "max_sessions_per_client": 5,
            "max_positions": positions,
            "max_frame_bytes": MAX_FRAME,
            "max_batch_size": rows,
            "prefill_chunk_size": 16,
            "session_resume_timeout": 0.05,
            "tokens": [{"name": name, "token_env": name.upper()} for name in CLIENTS],
        }
    )
    config = DaemonConfig(server=server, models=(trunk_config("trunk"),))
    with (
        mock.patch.dict(os.environ, {name.upper(): name for name in CLIENTS}),
        daemon_in_thread(config, manager=manager) as daemon,
    ):
        yield daemon, manager


class Complaints(logging.Handler):
    """Collects what is logged as an error: whatever a client sends is none."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text.strip()}: {record.exc_info[1]!r}"
        self.said.append(text)

    def taken(self) -> list[str]:
        said, self.said = self.said, []
        return [f"logged: {text}" for text in said]


@contextmanager
def complaints() -> Iterator[Complaints]:
    """Collect errors that are logged."""
    handler, root = Complaints(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)


@dataclass
class Campaign:
    """A daemon, a witness, and one conversation after the other."""

    daemon: Daemon
    manager: AsyncModelManager
    part: SplitModel
    rng: random.Random
    exact: bool
    log: Complaints
    seen: Counter[str]

    @property
    def url(self) -> str:
        return f"{self.daemon.url.replace('http', 'ws', 1)}/v2/models/trunk/sessions"

    async def run(self, count: int) -> AsyncIterator[tuple[str, str]]:
        """Send at least so many frames; yield each, or a few that go together."""
        tasks, held = await self.tasks(), self.reserved()
        inputs, wanted = self.reference()
        sent, resident = 0, 0
        async with connected(self.url, token=WITNESS) as socket:
            witness = Witness(socket, inputs, wanted, self.exact)
            while sent < count:
                async for what, number, wrong in self.talk(witness):
                    sent += number
                    for index in range(number):
                        yield what, "" if index else wrong
                if not resident and sent * 10 >= count:
                    resident = self.resident()
            grown = self.resident() - resident
            if count >= 5_000 and grown > MEMORY:
                yield "memory", f"{grown / 2**20:.0f} MB more than at a tenth"
        yield "the end", await self.left_over(tasks, held)

    async def talk(self, witness: Witness) -> AsyncIterator[tuple[str, int, str]]:
        """Have one conversation; yield what was sent, how many frames, and what is wrong."""
        async with connected(self.url, token=FUZZER) as socket:
            talk = Conversation(socket, self.rng, self.seen)
            for _ in range(self.rng.randint(1, 3)):
                talk.send(encode(opening(self.rng, talk.number())))
            await talk.settle()
            for _ in range(30):
                what, number = batch(talk, witness)
                await talk.settle()
                if not self.rng.randrange(4) or talk.gone:
                    talk.wrong += filter(None, [await witness.look()])
                wrong = "; ".join(talk.wrong + self.log.taken())
                talk.wrong.clear()
                yield what, number, wrong
                if talk.gone:
                    return
            await leave(talk)

    def reference(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return steps, and what the part gives for them here."""
        generator = torch.Generator().manual_seed(1)
        sizes = [7, *[1] * 15, 3, *[1] * 15]
        inputs = [torch.randn(1, new, HIDDEN, generator=generator) for new in sizes]
        cache = self.part.new_cache()
        with torch.inference_mode():
            return inputs, [self.part(one, past_key_values=cache) for one in inputs]

    # --- What must not be left ---------------------------------------------------------------

    async def left_over(self, tasks: int, held: int) -> str:
        """Return what is still there when all clients have gone."""
        wrong = []
        for what, now, before in (
            ("sessions", self.sessions, 0),
            ("reserved bytes", self.reserved, held),
        ):
            if not await _comes(lambda now=now, before=before: _equal(now, before)):
                wrong.append(f"{now() - before} {what} are left")
        if not await _comes(lambda: self._no_more_tasks(tasks)):
            wrong.append(f"{await self.tasks() - tasks} tasks are left")
        if self.daemon.config.server.max_positions is not None:
            wrong.append(await self.all_positions())
        return "; ".join(filter(None, wrong + self.log.taken()))

    async def all_positions(self) -> str:
        """Open a session that takes all there is."""
        async with connected(self.url, token=FUZZER) as socket:
            wishes: dict[str, Any] = {"max_length": MOST_POSITIONS}
            wishes["rows"] = MOST_HELD // MOST_POSITIONS
            opened = await socket.ask(Frame(Kind.OPEN, 1, info=wishes))
        return "" if opened.kind is Kind.OPENED else f"positions are left: {dict(opened.info)}"

    async def _no_more_tasks(self, before: int) -> bool:
        return await self.tasks() <= before

    async def tasks(self) -> int:
        """Return how many tasks the daemon's loop has."""
        loop = self.daemon._loop
        assert loop is not None
        count = asyncio.run_coroutine_threadsafe(_count_tasks(), loop)
        return await asyncio.wrap_future(count)

    def sessions(self) -> int:
        registry = self.daemon.metrics.registry
        return int(registry.get_sample_value("splitlearn_sessions_open", {"model": "trunk"}) or 0)

    def reserved(self) -> int:
        return self.manager.resource_manager.get_current_usage().reserved_bytes

    @staticmethod
    def resident() -> int:
        gc.collect()
        return int(psutil.Process().memory_info().rss)


async def _count_tasks() -> int:
    return len(asyncio.all_tasks())


async def _equal(now: Any, before: int) -> bool:
    return bool(now() == before)


async def _comes(condition: Any) -> bool:
    """Wait until something holds; whether it does in time."""
    try:
        async with asyncio.timeout(DEADLINE):
            while not await condition():  # noqa: ASYNC110 - the other thread has no event for it
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    return True


WAYS = (("llama", 1, MOST_HELD), ("llama", 8, None), ("falcon_h1", 8, MOST_HELD))
"""What the daemon serves, how many rows share a forward, and how many positions it grants."""


def fuzz(seed: int, count: int, seen: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """Send so many frames, a third to each kind of daemon.

    Yields what was sent, and what was wrong with what came of it: nothing, as a rule.

    Args:
        seed: Of all that is left to chance.
        count: How many frames at least.
        seen: Counts what is answered, by the code of the error or the kind of the frame.
    """
    torch.set_num_threads(1)
    tally = Counter[str]() if seen is None else seen
    for number, (model_type, rows, positions) in enumerate(WAYS):
        rng = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        part = load_ends(model_type)[1]
        with (
            complaints() as log,
            fuzzed_daemon(part, rows=rows, positions=positions) as (daemon, manager),
        ):
            campaign = Campaign(daemon, manager, part, rng, rows == 1, log, tally)
            yield from _drained(campaign.run(-(-count // len(WAYS))))


def _drained(found: AsyncIterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield what an asynchronous iterator yields."""
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(anext(found))
            except StopAsyncIteration:
                return
