"""A session whose server does not go on goes on elsewhere, or again, with the same numbers."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_trunk import FakeTrunk
from serving_fakes import FakeLoader, OnePart, daemon_in_thread, fake_daemon, trunk_config
from tiny_models import tiny_model
from websockets.sync.server import ServerConnection

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.client import (
    Healed,
    RemoteError,
    RemoteSessionClosed,
    RemoteStep,
    RemoteTrunk,
    RemoteUnavailable,
    RetryPolicy,
    healing,
    incident,
)
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.serving.wire import Frame, Kind, TensorName

AT_ONCE = RetryPolicy(attempts=3, base=0.0, total=30.0)


def ones(batch: int = 1, new: int = 1) -> torch.Tensor:
    return torch.ones(batch, new, 4)


# --- With real parts: the numbers are the same to the bit --------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Places:
    """Daemons with the same part, which can be ended and started again."""

    def __init__(self, part: SplitModel) -> None:
        self.part = part
        self.daemons: list[Daemon] = []
        self._stacks: list[ExitStack] = []

    def start(self, **server: Any) -> Daemon:
        manager = AsyncModelManager(
            ResourceManager(memory_limit=1 << 30), loader=OnePart(self.part), single_threaded=False
        )
        config = DaemonConfig(
            server=ServerConfig(**{"port": 0, **server}), models=(trunk_config("trunk"),)
        )
        stack = ExitStack()
        self.daemons.append(stack.enter_context(daemon_in_thread(config, manager=manager)))
        self._stacks.append(stack)
        return self.daemons[-1]

    def end(self) -> None:
        """End the daemon that was started first of those that run, as SIGTERM does."""
        self.daemons.pop(0)
        self._stacks.pop(0).close()

    def close(self) -> None:
        while self.daemons:
            self.end()


@contextmanager
def places(part: SplitModel) -> Iterator[Places]:
    found = Places(part)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "mamba", "jamba"])
def parts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[SplitModel]:
    """Bottom, Trunk and Top; with full attention, sliding windows, recurrent states, and both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return [load_component(folder, name, (2, 4)) for name in ("bottom", "trunk", "top")]


def ways(model: SplitCausalLM) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ways to generate: all of them with one model, with others what they may fail at."""
    all_of_them = model.config.model_type == "llama"
    yield "beams", {"num_beams": 3}
    if all_of_them:
        yield "sampling", {"do_sample": True}
        yield "a padded batch", {"padded": True}
    if model.parts[1].rolls_back:
        yield "prompt lookup", {"prompt_lookup_num_tokens": 4}


def generate(model: SplitCausalLM, *, padded: bool = False, **how: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (2 if padded else 1, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :3], mask[0, :3] = 0, 0
    if "prompt_lookup_num_tokens" in how:
        ids = torch.cat([ids, ids], dim=1)
        mask = torch.ones_like(ids)
    torch.manual_seed(11)
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, pad_token_id=0, **how
    )
    return tokens


def test_generation_goes_on_at_the_next_address(
    parts: list[SplitModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server drains after a few steps, the second takes over; in every way."""
    bottom, part, top = parts
    local = SplitCausalLM(bottom, part, top)
    with places(part) as servers:
        for way, how in ways(local):
            want = generate(local, **how)
            servers.close()
            first, second = servers.start(), servers.start()
            with RemoteTrunk([first.url, second.url], "trunk", retry=AT_ONCE) as trunk:
                model = SplitCausalLM(bottom, trunk, top)
                calls = 0
                call = RemoteTrunk.__call__

                def counted(*args: Any, call: Any = call, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == 4:
                        servers.end()
                    return call(*args, **kwargs)

                with monkeypatch.context() as patch:
                    patch.setattr(RemoteTrunk, "__call__", counted)
                    found = generate(model, **how)

                assert torch.equal(found, want), way
                assert (trunk.healed, trunk.url) == (1, second.url), way
                assert trunk.replayed_positions > 3, way


@torch.inference_mode()
def test_what_a_session_holds_after_it_went_on_is_the_same_to_the_bit(
    parts: list[SplitModel],
) -> None:
    """Steps, rows that change, steps that are taken back, a copy; the server ends between all."""
    _, part, _ = parts
    generator = torch.Generator().manual_seed(1)
    size = part.hidden_size

    def hidden(rows: int, new: int) -> torch.Tensor:
        return torch.randn(rows, new, size, generator=generator)

    with places(part) as servers:
        urls = [servers.start().url for _ in range(4)]
        with RemoteTrunk(urls, "trunk", retry=AT_ONCE) as trunk:
            caches: list[tuple[Any, Any]] = [(trunk.new_cache(), part.new_cache())]
            if part.rolls_back:
                for one in caches[0]:
                    one.activate_past_recording()

            def step(given: torch.Tensor) -> None:
                for remote, own in caches:
                    found = trunk(given, past_key_values=remote)
                    assert torch.equal(found, part(given, past_key_values=own))

            step(hidden(1, 5))
            for one in caches[0]:
                one.reorder_cache(torch.tensor([0, 0, 0]))
            servers.end()
            step(hidden(3, 1))
            if part.rolls_back:
                step(hidden(3, 6))
                servers.end()
                for one in caches[0]:
                    one.crop(-4)
            for one in caches[0]:
                one.reorder_cache(torch.tensor([2, 0]))
            step(hidden(2, 2))
            servers.end()
            caches.append((caches[0][0].copy(), caches[0][1].copy()))
            step(hidden(2, 1))
            assert trunk.healed == (3 if part.rolls_back else 2)


@torch.inference_mode()
def test_several_go_on_together(parts: list[SplitModel]) -> None:
    """They share forwards there as well, so that the last bits of sums differ."""
    _, part, _ = parts
    given = [torch.randn(1, n, part.hidden_size) for n in (5, 7, 4)]
    with places(part) as servers:
        urls = [servers.start().url, servers.start().url]
        with RemoteTrunk(urls, "trunk", retry=AT_ONCE) as trunk:
            caches = [trunk.new_cache() for _ in given]
            own = [part.new_cache() for _ in given]
            for number in range(3):
                if number == 2:
                    servers.end()
                step = given if number == 0 else [one[:, :1] for one in given]
                found = trunk.step_together(list(map(RemoteStep, caches, step)))
                for result, one, cache in zip(found, step, own, strict=True):
                    assert isinstance(result, torch.Tensor)
                    want = part(one, past_key_values=cache)
                    assert (result - want).abs().max() <= 2e-6 * want.abs().max()
            assert (trunk.healed, trunk.replayed_positions) == (3, 16 + 3)


# --- With fakes: what happens on the way -------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Ends(FakeTrunk):
    """Ends the session at one of its steps, in one of the ways in which servers do."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__()
        self.at = at
        self.how = how
        self.steps = 0

    def answer(self, peer: ServerConnection, frame: Frame) -> None:
        self.steps += frame.kind is Kind.STEP
        if frame.kind is not Kind.STEP or self.steps != self.at:
            super().answer(peer, frame)
            return
        match self.how:
            case "cut":
                peer.socket.close()
            case "model_unavailable" | "unknown_session":
                self.refuse(peer, frame, self.how)
            case "silence":
                pass
            case reason:
                info = {"reason": reason}
                self.say(peer, Frame(Kind.CLOSED, 0, frame.session, info=info))


REASONS = ["expired", "draining", "evicted", "model_unloaded", "internal"]


@pytest.mark.parametrize("how", [*REASONS, "cut", "model_unavailable", "unknown_session"])
def test_whatever_ends_a_session_it_goes_on(how: str, caplog: pytest.LogCaptureFixture) -> None:
    fake, told = Ends(3, how), list[Healed]()
    with fake.run() as url, RemoteTrunk(url, "trunk", retry=AT_ONCE, on_heal=told.append) as trunk:
        cache = trunk.new_cache()
        for number in range(1, 5):
            assert torch.equal(trunk(ones() * number, past_key_values=cache), ones() * number)

    sent = [frame for frame in fake.seen if frame.kind is Kind.STEP]
    assert [frame.position for frame in sent] == [0, 1, 2, 0, 1, 2, 3]
    assert [frame.session for frame in sent] == [1, 1, 1, 2, 2, 2, 2]
    assert (trunk.healed, trunk.replayed_positions) == (1, 2)
    (one,) = told
    assert (one.model_id, one.origin, one.address) == ("trunk", url, url)
    assert (one.sessions, one.positions) == (1, 2)
    (record,) = [r for r in caplog.records if r.name == healing.__name__ and r.levelno > 20]
    assert f"connection to {url} lost; going on at {url} (2 positions" in record.getMessage()


def test_a_server_that_is_silent_is_left_for_the_next() -> None:
    silent, good = Ends(2, "silence"), FakeTrunk()
    with (
        silent.run() as first,
        good.run() as second,
        RemoteTrunk([first, second], "trunk", timeout=0.2, retry=AT_ONCE) as trunk,
    ):
        cache = trunk.new_cache()
        for _ in range(3):
            trunk(ones(), past_key_values=cache)
        assert trunk.url == second
    assert [frame.position for frame in good.seen if frame.kind is Kind.STEP] == [0, 1, 2]


def test_a_step_that_failed_there_is_not_asked_for_elsewhere() -> None:
    """It would fail there as well."""
    loader, other = FakeLoader(), FakeTrunk()
    with (
        fake_daemon(loader) as daemon,
        other.run() as url,
        RemoteTrunk([daemon.url, url], "trunk", retry=AT_ONCE) as trunk,
    ):
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        loader.parts["trunk"].fail_with = RuntimeError("secret detail")
        with pytest.raises(RemoteError, match="the step failed on the server"):
            trunk(ones(), past_key_values=cache)
        with pytest.raises(RemoteSessionClosed, match="internal"):
            trunk(ones(), past_key_values=cache)
    assert other.seen == []


def test_what_a_server_refuses_is_not_asked_elsewhere() -> None:
    other = FakeTrunk()
    with (
        fake_daemon(FakeLoader()) as daemon,
        other.run() as url,
        RemoteTrunk([daemon.url, url], "trunk", retry=AT_ONCE) as trunk,
    ):
        cache = trunk.new_cache()
        trunk(ones(1, 15), past_key_values=cache)
        with pytest.raises(RemoteError, match="the session has 16"):
            trunk(ones(1, 2), past_key_values=cache)
        trunk(ones(), past_key_values=cache)
    assert other.seen == []


class Other(FakeTrunk):
    """Another model: gives a little more than what came."""

    def __init__(self, more: float, **facts: str) -> None:
        super().__init__(**facts)
        self.more = more

    def result(self, frame: Frame) -> Frame:
        tensor = frame.tensor(TensorName.HIDDEN_STATES)
        assert tensor is not None
        data = torch.frombuffer(bytearray(tensor.data), dtype=torch.float32) * (1 + self.more)
        changed = replace(tensor, data=memoryview(data.numpy()).cast("B"))
        return Frame(Kind.RESULT, frame.request, frame.session, tensors=(changed,))


def lose(*fakes: FakeTrunk, **how: Any) -> RemoteTrunk:
    """Use fakes of which the first ends the session; return the Trunk, which was closed."""
    with ExitStack() as stack:
        urls = [stack.enter_context(fake.run()) for fake in fakes]
        trunk = stack.enter_context(RemoteTrunk(urls, "trunk", **{"retry": AT_ONCE, **how}))
        cache = trunk.new_cache()
        for _ in range(3):
            trunk(ones(), past_key_values=cache)
    return trunk


def test_another_model_is_known_by_what_it_gives() -> None:
    with pytest.raises(RemoteSessionClosed) as caught:
        lose(GoesAway(3), Other(0.01))

    assert "has another model" in str(caught.value)
    assert "off by 0.01 of the largest number, and 0.0001 is what the dtype" in str(caught.value)
    assert [tried.attempts for tried in caught.value.tried] == [1, 3]


@pytest.mark.parametrize(("more", "facts"), [(1e-5, {}), (0.1, {"quantization": "int8"})])
def test_what_the_dtype_explains_is_no_other_model(more: float, facts: dict[str, str]) -> None:
    first = GoesAway(3)
    first.facts |= facts

    assert lose(first, Other(more, **facts)).healed == 1


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"start_layer": "2"}, "start_layer 2, not 1"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, not float32"),
        ({"quantization": "int8"}, "quantization int8, not None"),
        ({"num_parameters": "21"}, "num_parameters 21, not 20"),
    ],
)
def test_another_part_is_known_by_what_it_says(facts: dict[str, str], said: str) -> None:
    other = FakeTrunk(**facts)
    with pytest.raises(RemoteSessionClosed, match=said):
        lose(GoesAway(3), other)
    assert other.seen == []  # no hidden state went there


class GoesAway(Ends):
    """Ends the session, and answers nothing afterwards."""

    def __init__(self, at: int, status: int = 503, **headers: str) -> None:
        super().__init__(at, "draining")
        self.then, self.more = status, headers

    def answer(self, peer: ServerConnection, frame: Frame) -> None:
        super().answer(peer, frame)
        if self.steps == self.at:
            self.status, self.headers = self.then, self.more


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (403, 1), (404, 1), (400, 1), (503, 3)])
def test_what_is_refused_for_good_is_not_tried_again(status: int, attempts: int) -> None:
    with pytest.raises(RemoteSessionClosed) as caught:
        lose(GoesAway(2, status))

    (tried,) = caught.value.tried
    assert tried.attempts == attempts
    assert f"answered {status}: not now" in tried.reason
    assert caught.value.reason == "draining"
    assert isinstance(caught.value, ConnectionError)
    assert f"{tried.address} {'once' if attempts == 1 else '3 times'}" in str(caught.value)


def test_an_address_is_left_alone_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = 1000.0, list[float]()

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    monkeypatch.setattr(healing, "sleep", wait)
    monkeypatch.setattr(incident, "monotonic", lambda: now)
    busy = {"Retry-After": "7"}

    with pytest.raises(RemoteSessionClosed) as caught:
        lose(GoesAway(2, 503, **busy), retry=RetryPolicy(base=0, total=6.0))
    assert pauses == []  # it is longer than it is tried at all
    assert caught.value.tried[0].attempts == 1

    assert lose(GoesAway(2, 503, **busy), FakeTrunk()).healed == 1
    assert pauses == []  # another one is asked meanwhile

    with pytest.raises(RemoteSessionClosed):
        lose(GoesAway(2, 503, **busy), retry=RetryPolicy(attempts=3, base=0))
    assert pauses == [7.0, 7.0]


def test_a_server_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = GoesAway(2)

    def come_back(seconds: float) -> None:
        del seconds
        fake.status = 200

    monkeypatch.setattr(healing, "sleep", come_back)

    assert lose(fake).healed == 1


def test_ctrl_c_ends_the_waiting_at_once_and_the_session_can_still_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = GoesAway(2)

    def interrupt(seconds: float) -> None:
        del seconds
        raise KeyboardInterrupt

    with fake.run() as url, RemoteTrunk(url, "trunk", retry=AT_ONCE) as trunk:
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(healing, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                trunk(ones(), past_key_values=cache)
        assert cache.get_seq_length() == 1
        fake.status = 200
        trunk(ones(), past_key_values=cache)
        assert (cache.get_seq_length(), trunk.healed) == (2, 1)


def test_what_was_sent_beyond_the_limit_can_not_be_sent_again() -> None:
    with pytest.raises(RemoteSessionClosed, match=r"more was sent than the 60 bytes .*history_lim"):
        lose(Ends(3, "expired"), history_limit=60)


def test_a_step_that_ends_every_server_is_not_tried_for_ever() -> None:
    class Fatal(Ends):
        def answer(self, peer: ServerConnection, frame: Frame) -> None:
            if frame.kind is Kind.STEP and frame.position == 1:
                self.steps = self.at - 1
            super().answer(peer, frame)

    fake = Fatal(9, "cut")
    with pytest.raises(RemoteSessionClosed, match="was lost"):
        lose(fake)
    assert sum(f.kind is Kind.STEP and f.position == 1 for f in fake.seen) == healing.MOST_HEALS + 1


def test_without_a_policy_it_is_raised_at_once() -> None:
    fake = Ends(3, "expired")
    with pytest.raises(RemoteSessionClosed, match="has ended"):
        lose(fake, retry=None)
    assert fake.opened == 1


# --- Where a session begins --------------------------------------------------------------------


def test_the_first_address_that_answers_is_used() -> None:
    first, second = FakeTrunk(), FakeTrunk()
    first.status = 404
    with first.run() as one, second.run() as two, RemoteTrunk([one, two], "trunk") as trunk:
        trunk(ones())
        assert trunk.url == two
        assert repr(trunk) == f"RemoteTrunk({[one, two]!r}, 'trunk')"
    assert first.seen == []


def test_where_none_answers_each_says_why() -> None:
    first, second = FakeTrunk(), FakeTrunk()
    first.status, second.status = 404, 503
    with (
        first.run() as one,
        second.run() as two,
        RemoteTrunk([one, two], "trunk") as trunk,
        pytest.raises(RemoteUnavailable, match=f"{one} answered 404.*; {two} answered 503"),
    ):
        trunk(ones())


def test_a_session_begins_elsewhere_where_the_first_has_no_room() -> None:
    class Full(FakeTrunk):
        def answer(self, peer: ServerConnection, frame: Frame) -> None:
            self.refuse(peer, frame, "too_many_sessions")

    with Full().run() as one, FakeTrunk().run() as two:
        with RemoteTrunk([one, two], "trunk") as trunk:
            trunk(ones())
            assert (trunk.url, trunk.healed) == (two, 0)
        with (
            RemoteTrunk(one, "trunk") as trunk,
            pytest.raises(RemoteUnavailable, match="it is too_many_sessions") as caught,
        ):
            trunk(ones())  # nobody waits for room
        assert caught.value.code == "too_many_sessions"


def test_an_address_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one address"):
        RemoteTrunk([], "trunk")


def test_closing_ends_the_waiting() -> None:
    fake = GoesAway(2)
    policy = RetryPolicy(base=0.01, maximum=0.01, attempts=100_000)
    with fake.run() as url:
        trunk = RemoteTrunk(url, "trunk", retry=policy)
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        raised = list[Exception]()

        def use() -> None:
            try:
                trunk(ones(), past_key_values=cache)
            except Exception as error:  # noqa: BLE001 - it is looked at
                raised.append(error)

        user = threading.Thread(target=use)
        user.start()
        until(lambda: fake.status == 503)
        trunk.close()
        user.join(30)

    assert len(raised) == 1
    assert "was closed" in str(raised[0]) or "closed here" in str(raised[0])


def test_sessions_that_were_replaced_are_not_left_behind() -> None:
    fake = Ends(3, "expired")
    with fake.run() as url, RemoteTrunk(url, "trunk", retry=AT_ONCE) as trunk:
        cache = trunk.new_cache()
        for _ in range(3):
            trunk(ones(), past_key_values=cache)
        del cache
        gc.collect()
        until(lambda: fake.count(Kind.CLOSE) == 1)
    assert [f.session for f in fake.seen if f.kind is Kind.CLOSE] == [2]
