"""A connection that is lost on the way: the session goes on over another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from cut_wire import Wire
from joining import load_ends
from serving_fakes import OnePart, daemon_in_thread, trunk_config

from splitlearn_core import SplitModel
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.errors import RemoteSessionClosed, RemoteUnavailable
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon


@pytest.fixture(scope="module")
def part() -> SplitModel:
    return load_ends("llama")[1]


@pytest.fixture
def daemon(part: SplitModel) -> Iterator[Daemon]:
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    server = ServerConfig(port=0, session_resume_timeout=30)
    config = DaemonConfig(server=server, models=(trunk_config("trunk"),))
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    with closing(Wire(daemon.url)) as wire:
        yield wire


def given(new: int, seed: int) -> torch.Tensor:
    return torch.randn(1, new, 64, generator=torch.Generator().manual_seed(seed))


def local(part: SplitModel, *steps: torch.Tensor) -> torch.Tensor:
    cache = part.new_cache()
    with torch.inference_mode():
        return [part(step, past_key_values=cache) for step in steps][-1]


@pytest.mark.parametrize("when", ["between steps", "before the answer"])
def test_a_session_goes_on(part: SplitModel, daemon: Daemon, wire: Wire, when: str) -> None:
    steps = [given(5, 0), given(1, 1), given(1, 2)]
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(steps[0], past_key_values=cache)
        if when == "between steps":
            wire.cut()
        else:
            wire.cut_after(1)
        for step in steps[1:]:
            found = trunk(step, past_key_values=cache)

    assert torch.equal(found, local(part, *steps))
    assert wire.connections > 2  # the first is for the description of the part
    steps_run = daemon.metrics.registry.get_sample_value(
        "splitlearn_session_steps_total", {"model": "trunk", "code": "ok"}
    )
    assert steps_run == len(steps)


@pytest.mark.parametrize("when", ["while nobody looked", "before the answer"])
def test_a_session_is_opened_over_another_connection(
    part: SplitModel, wire: Wire, when: str
) -> None:
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        trunk(given(5, 0))
        if when == "while nobody looked":
            wire.cut()
        else:
            wire.cut_after(1)
        found = trunk(given(4, 1))

    assert torch.equal(found, local(part, given(4, 1)))


def test_rows_are_reordered_once(part: SplitModel, wire: Wire) -> None:
    first, second = torch.cat([given(5, 0), given(5, 1)]), torch.cat([given(1, 2), given(1, 3)])
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(first, past_key_values=cache)
        wire.cut_after(1)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = trunk(second, past_key_values=cache)

    assert torch.equal(found, local(part, first[[1, 0]], second))


@pytest.mark.parametrize("when", ["before it is asked", "before the answer", "never"])
def test_a_copy_goes_its_own_way(part: SplitModel, wire: Wire, when: str) -> None:
    first, one, other = given(5, 0), given(1, 1), given(1, 2)
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(first, past_key_values=cache)
        if when == "before it is asked":
            wire.cut()
        elif when == "before the answer":
            wire.cut_after(1)
        copy = cache.copy()
        found = [trunk(one, past_key_values=cache), trunk(other, past_key_values=copy)]

    assert torch.equal(found[0], local(part, first, one))
    assert torch.equal(found[1], local(part, first, other))


def test_an_empty_cache_has_a_copy_that_begins_by_itself(part: SplitModel, wire: Wire) -> None:
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        copy = cache.copy()
        trunk(given(5, 0), past_key_values=cache)
        found = trunk(given(4, 1), past_key_values=copy)

    assert torch.equal(found, local(part, given(4, 1)))


def test_a_copy_that_nobody_wants_is_closed(daemon: Daemon) -> None:
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(given(5, 0), past_key_values=cache)
        cache.copy().close()
        assert sessions_open(daemon) == 1


def sessions_open(daemon: Daemon) -> float:
    labels = {"model": "trunk"}
    return daemon.metrics.registry.get_sample_value("splitlearn_sessions_open", labels) or 0.0


def test_a_goodbye_leaves_no_session_behind(daemon: Daemon) -> None:
    # The caches are held: one that is dropped gives its session back by itself.
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        first = trunk.new_cache()
        trunk(given(5, 0), past_key_values=first)
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        second = trunk.new_cache()
        trunk(given(5, 0), past_key_values=second)
        assert sessions_open(daemon) == 1


@pytest.mark.parametrize("nbytes", [1, 100, 200, 300, 400, 500, 600])
def test_an_answer_that_is_cut_off_is_not_taken_for_another(wire: Wire, nbytes: int) -> None:
    """It is no answer of another server, which would have to be looked into: it can be tried."""
    wire.cut_after(nbytes)
    with RemoteTrunk(wire.url, "trunk") as trunk:
        with pytest.raises(RemoteUnavailable, match="cannot reach"):
            assert trunk.num_layers

        assert trunk.num_layers == 6


def test_a_server_that_is_gone_is_said_to_be(wire: Wire) -> None:
    with RemoteTrunk(wire.url, "trunk", retry=None) as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(given(5, 0), past_key_values=cache)
        wire.close()
        with pytest.raises(RemoteSessionClosed, match="was lost, and the session with it"):
            trunk(given(1, 0), past_key_values=cache)
        with pytest.raises(RemoteSessionClosed, match="has ended"):
            trunk(given(1, 0), past_key_values=cache)
