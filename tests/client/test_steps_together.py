"""Several steps in flight: of different sessions, over one connection, as one forward there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from cut_wire import Wire
from fake_trunk import FakeTrunk
from joining import TOLERANCE, alone, hidden_states, load_ends
from serving_fakes import FakeLoader, OnePart, daemon_in_thread, fake_daemon, trunk_config
from websockets.sync.server import ServerConnection

from splitlearn_core import SplitModel
from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.client import (
    RemoteError,
    RemoteSessionClosed,
    RemoteStep,
    RemoteTrunk,
    Timings,
)
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.serving.wire import Frame, Kind


def ones(batch: int = 1, new: int = 1) -> torch.Tensor:
    return torch.ones(batch, new, 4)


class AnswersLast(FakeTrunk):
    """Answers steps when `count` of them are there, the last one first."""

    count_of_steps = 3

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Frame] = []

    def answer(self, peer: ServerConnection, frame: Frame) -> None:
        if frame.kind is not Kind.STEP:
            super().answer(peer, frame)
            return
        self.held.append(frame)
        if len(self.held) == self.count_of_steps:
            for held in reversed(self.held):
                super().answer(peer, held)


def test_all_are_sent_before_any_is_awaited() -> None:
    with AnswersLast().run() as url, RemoteTrunk(url, "trunk", timeout=30) as trunk:
        steps = [RemoteStep(trunk.new_cache(), ones() * n) for n in range(1, 4)]
        found = trunk.step_together(steps)

    assert [float(result[0, 0, 0]) for result in found] == [1, 2, 3]  # type: ignore[index]
    assert [step.cache.get_seq_length() for step in steps] == [1, 1, 1]


@pytest.mark.parametrize("rows", [1, 400_000])
def test_whoever_sends_takes_in_answers_meanwhile(rows: int) -> None:
    """The fake reads no further while its answer is not taken in; 6.4 MB fill any buffer."""
    with FakeTrunk().run() as url, RemoteTrunk(url, "trunk", timeout=30) as trunk:
        steps = [RemoteStep(trunk.new_cache(), ones(rows)) for _ in range(6)]
        found = trunk.step_together(steps)

    assert all(torch.equal(result, ones(rows)) for result in found)  # type: ignore[arg-type]


def test_each_fails_alone() -> None:
    loader = FakeLoader()
    with fake_daemon(loader) as daemon, RemoteTrunk(daemon.url, "trunk") as trunk:
        other = RemoteTrunk(daemon.url, "trunk")
        closed, good, long = trunk.new_cache(), trunk.new_cache(), trunk.new_cache()
        trunk(ones(), past_key_values=closed)
        closed.close()
        found = trunk.step_together(
            [
                RemoteStep(closed, ones()),
                RemoteStep(good, ones()),
                RemoteStep(long, ones(1, 17)),
                RemoteStep(trunk.new_cache(), torch.ones(1, 1, 5)),
                RemoteStep(other.new_cache(), ones()),
                RemoteStep(good, ones()),
            ]
        )

        kinds = [type(result) for result in found]
        assert kinds[0] is RemoteSessionClosed
        assert torch.equal(found[1], ones() * 2)  # type: ignore[arg-type]
        assert kinds[2:5] == [RemoteError, ValueError, CacheMismatchError]
        assert "two of the steps are of the same cache" in str(found[5])
        assert (good.get_seq_length(), long.get_seq_length()) == (1, 0)


def test_no_steps_are_none(tmp_path: object) -> None:
    del tmp_path
    assert RemoteTrunk("http://127.0.0.1:1", "trunk").step_together([]) == []


# --- With real parts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends() -> tuple[SplitModel, SplitModel]:
    return load_ends("llama")


@pytest.fixture
def daemon(ends: tuple[SplitModel, SplitModel]) -> Iterator[Daemon]:
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(ends[1]), single_threaded=False
    )
    server = ServerConfig(port=0, session_resume_timeout=30)
    config = DaemonConfig(server=server, models=(trunk_config("trunk"),))
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon


@pytest.mark.parametrize("cut", [None, 1, 700])
@torch.inference_mode()
def test_sequences_get_what_they_would_get_alone(
    ends: tuple[SplitModel, SplitModel], daemon: Daemon, cut: int | None
) -> None:
    """Also where the connection is lost in the middle of the answers."""
    bottom, part = ends
    inputs = hidden_states(bottom)
    with closing(Wire(daemon.url)) as wire, RemoteTrunk(wire.url, "trunk", timings=True) as trunk:
        caches = [trunk.new_cache() for _ in inputs]
        found: list[list[torch.Tensor]] = [[] for _ in inputs]
        past = [0] * len(inputs)
        for number in range(len(inputs[0])):
            if cut is not None and number:
                wire.cut_after(cut)
            steps = [
                RemoteStep(cache, given[number], None, torch.arange(n, n + given[number].new)[None])
                for cache, given, n in zip(caches, inputs, past, strict=True)
            ]
            for row, result in enumerate(trunk.step_together(steps)):
                assert not isinstance(result, Exception)
                found[row].append(HiddenState.of(result).tensor)
                past[row] += steps[row].hidden.shape[1]
        timings = trunk.timings

    for given, outputs in zip(inputs, found, strict=True):
        for one, other in zip(alone(part, given), outputs, strict=True):
            assert (one - other).abs().max() <= TOLERANCE * one.abs().max()
    forwards = daemon.metrics.registry.get_sample_value(
        "splitlearn_session_batch_rows_count", {"model": "trunk"}
    )
    steps_run = daemon.metrics.registry.get_sample_value(
        "splitlearn_session_steps_total", {"model": "trunk", "code": "ok"}
    )
    if cut is None:
        assert steps_run == timings.steps == 4 * len(inputs)
        assert forwards is not None
        assert forwards < steps_run  # some were shared
        assert 0 < timings.forward_seconds < timings.seconds
        assert timings.queue_seconds >= 0


# --- Timings ---------------------------------------------------------------------------------


class TellsNothing(FakeTrunk):
    """Does not know of timings, as a server of before."""

    def answer(self, peer: ServerConnection, frame: Frame) -> None:
        if frame.kind is Kind.OPEN and "timings" in frame.info:
            self.refuse(peer, frame, "bad_open")
        else:
            super().answer(peer, frame)


def test_a_server_that_does_not_tell_is_used_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with TellsNothing().run() as url, RemoteTrunk(url, "trunk", timings=True) as trunk:
        for _ in range(2):
            trunk(ones())
        timings = trunk.timings

    assert caplog.text.count("does not tell where time goes") == 1
    assert (timings.steps, timings.queue_seconds, timings.forward_seconds) == (2, 0, 0)
    assert timings.seconds > 0


def test_timings_add_up() -> None:
    timings = Timings().plus(0.5, {"queue_us": 100, "forward_us": 2_000}).plus(0.25, {})

    assert timings == Timings(2, 0.75, 1e-4, 2e-3)
    assert Timings().plus(1, {"queue_us": "x", "forward_us": -5}) == Timings(1, 1.0)
