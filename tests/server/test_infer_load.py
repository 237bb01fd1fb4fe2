"""Inference requests that come too many, too slowly, or whose clients don't stay."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from infer_requests import HEADER_LENGTH, binary_entry, entry, post
from serving_fakes import Answer, FakePart, trunk_config

from splitlearn_core import HiddenState
from splitlearn_core.side_values import CrossingValue, Size
from splitlearn_manager.config import ServerConfig
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.server import answering, request_body
from splitlearn_manager.server.places import Places, Shares
from splitlearn_manager.serving.infer_errors import ClientBusyError, OverloadedError

pytestmark = pytest.mark.anyio

ONE = {"inputs": [entry("hidden_states", np.ones((1, 2, 4), dtype=np.float32))]}


@pytest.fixture
def anyio_backend() -> object:
    """Run on uvloop, as the daemon does."""
    return ("asyncio", {"use_uvloop": True})


def infer(served: Any, document: Any = ONE, model: str = "trunk") -> asyncio.Task[Answer]:
    return asyncio.create_task(asyncio.to_thread(post, served.url, model, document))


def outcomes(served: Any, code: str) -> float:
    found: float = served.metric("splitlearn_infer_requests_total", code=code)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens on another side of a socket."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def begun(part: Any) -> None:
    """Wait for a forward to begin."""
    assert await asyncio.to_thread(part.entered.acquire, timeout=30)


@pytest.fixture
async def queued(manager: Any) -> asyncio.Semaphore:
    """Return what is released when a request has been queued for the thread of `trunk`."""
    managed = await manager.get_model("trunk")
    run, waiting = managed.run, asyncio.Semaphore(0)

    def noted(*args: Any) -> Any:
        waiting.release()
        return run(*args)

    managed.run = noted
    return waiting


def half_a_request(served: Any, length: int, body: bytes) -> socket.socket:
    """Send a request by hand, with a body that may be shorter than it says."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v2/models/trunk/infer HTTP/1.1\r\nHost: {host}:{port}\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return connection


async def test_one_request_too_many_is_refused_at_once(
    serve: Any, part: Any, queued: asyncio.Semaphore
) -> None:
    served = await serve(max_queue_size=2)
    part.gate.clear()
    first, second = infer(served), infer(served)
    await queued.acquire()
    await queued.acquire()

    refused = await infer(served)
    part.gate.set()
    answers = [await first, await second, await infer(served)]

    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert "has 2 requests waiting or in flight already" in refused.json["error"]
    assert [answer.status for answer in answers] == [200] * 3
    assert (outcomes(served, "overloaded"), outcomes(served, "ok")) == (1, 3)


async def test_each_model_has_places_of_its_own(
    serve: Any, manager: Any, part: Any, queued: asyncio.Semaphore
) -> None:
    await manager.load_model(trunk_config("trunk-1"))
    served = await serve(max_queue_size=1)
    part.gate.clear()
    first = infer(served)
    await queued.acquire()

    other = await infer(served, model="trunk-1")
    part.gate.set()

    assert (other.status, (await first).status) == (200, 200)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    for name in ("ANN", "BOB", "REST"):
        monkeypatch.setenv(name, f"{name.lower()}s")
    return [
        {"name": "ann", "token_env": "ANN", "max_infer": 2},
        {"name": "bob", "token_env": "BOB"},
    ]


def infer_as(served: Any, name: str, model: str = "trunk") -> asyncio.Task[Answer]:
    token = {"Authorization": f"Bearer {name}s"}
    return asyncio.create_task(asyncio.to_thread(post, served.url, model, ONE, **token))


async def test_a_client_does_not_take_the_places_of_others(
    serve: Any, part: Any, queued: asyncio.Semaphore, tokens: list[dict[str, Any]]
) -> None:
    """Ann may have two by her own limit, Bob one by everybody's, and so may an address."""
    served = await serve(
        tokens=tokens,
        token_env="REST",  # noqa: S106 - a name
        max_queue_size=4,
        max_infer_per_client=1,
    )
    part.gate.clear()
    held = []
    for name in ("ann", "ann", "bob", "rest"):
        held.append(infer_as(served, name))
        await queued.acquire()

    refused = [await infer_as(served, name) for name in ("ann", "bob", "rest")]
    part.gate.set()
    answers = [await one for one in held]
    again = [await infer_as(served, name) for name in ("ann", "bob", "rest")]

    assert [(one.status, one.headers["Retry-After"]) for one in refused] == [(429, "1")] * 3
    assert [one.json["error"].split(" (")[0] for one in refused] == [
        f"of client {client}, {held} inference requests are waiting or in flight already, and"
        f" {held} may be"
        for client, held in (("ann", 2), ("bob", 1), ("127.0.0.1", 1))
    ]
    assert [answer.status for answer in answers + again] == [200] * 7
    assert outcomes(served, "client_limit") == 3
    assert outcomes(served, "overloaded") == 0
    assert outcomes(served, "ok") == 7


async def test_a_client_s_requests_count_in_all_models(
    serve: Any, manager: Any, part: Any, queued: asyncio.Semaphore
) -> None:
    await manager.load_model(trunk_config("trunk-1"))
    served = await serve(max_infer_per_client=1)
    part.gate.clear()
    first = infer(served)
    await queued.acquire()

    other = await infer(served, model="trunk-1")
    part.gate.set()

    assert (other.status, (await first).status) == (429, 200)
    assert (await infer(served, model="trunk-1")).status == 200


async def test_a_client_that_goes_gives_its_share_back(serve: Any) -> None:
    served = await serve(max_infer_per_client=1)
    half = await asyncio.to_thread(half_a_request, served, 1000, b"{")
    async with asyncio.timeout(30):
        while (await infer(served)).status != 429:  # until its head has been read
            pass

    half.close()
    await until(lambda: outcomes(served, "cancelled") == 1)

    assert (await infer(served)).status == 200


async def test_who_has_too_many_is_told_so_and_not_that_the_model_has() -> None:
    places = Places(1, Shares(1, {"bob": None, "carl": 2}))
    assert [places.shares.of(name) for name in ("ann", "bob", "carl")] == [1, 1, 2]

    with places.take("trunk", "ann"):
        with pytest.raises(ClientBusyError, match="of client ann, 1 inference requests"):
            places.take("trunk", "ann").__enter__()
        with pytest.raises(OverloadedError, match="model 'trunk' has 1 requests"):
            places.take("trunk", "bob").__enter__()
        assert (places.taken("trunk"), places.held("ann"), places.held("bob")) == (1, 1, 0)

    assert (places.taken("trunk"), places.held("ann")) == (0, 0)


async def test_a_refused_request_is_refused_before_its_body_is_here(
    serve: Any, part: Any, queued: asyncio.Semaphore
) -> None:
    served = await serve(max_queue_size=1)
    part.gate.clear()
    first = infer(served)
    await queued.acquire()

    connection = await asyncio.to_thread(half_a_request, served, 1000, b"{")
    with connection:
        head = await asyncio.to_thread(connection.recv, 4096)
    part.gate.set()

    assert head.startswith(b"HTTP/1.1 429 ")
    assert (await first).status == 200


async def test_a_request_whose_client_goes_before_its_turn_is_not_run(
    serve: Any, part: Any, queued: asyncio.Semaphore
) -> None:
    served = await serve()
    part.gate.clear()
    first = infer(served)
    await begun(part)
    await queued.acquire()
    body = json.dumps(ONE).encode()
    gone = await asyncio.to_thread(half_a_request, served, len(body), body)
    await queued.acquire()

    gone.close()
    await until(lambda: outcomes(served, "cancelled") == 1)
    part.gate.set()

    assert (await first).status == 200
    assert (await infer(served)).status == 200
    assert len(part.calls) == 2


async def test_a_client_that_goes_within_its_body_leaves_nothing(serve: Any) -> None:
    served = await serve(max_queue_size=1)
    half = await asyncio.to_thread(half_a_request, served, 1000, b"{")

    half.close()
    await until(lambda: outcomes(served, "cancelled") == 1)

    assert (await infer(served)).status == 200


async def test_a_body_that_comes_too_slowly_is_given_up(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "PATIENCE", 0.1)
    served = await serve(max_queue_size=1)

    with await asyncio.to_thread(half_a_request, served, 1000, b"{") as connection:
        answer = await asyncio.to_thread(connection.recv, 4096)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"only 1 bytes of the body came in time" in answer
    assert (await infer(served)).status == 200


async def test_an_answer_that_nobody_takes_is_given_up(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "PATIENCE", 0.2)
    monkeypatch.setattr(answering, "BYTES_PER_SECOND", 1 << 40)
    served = await serve(max_queue_size=1)
    hidden = np.ones((1 << 17, 16, 4), dtype=np.float32)  # more than sockets take in
    document = {"inputs": [binary_entry("hidden_states", hidden)]}
    document["parameters"] = {"binary_data_output": True}
    text = json.dumps(document).encode()
    head = f"POST /v2/models/trunk/infer HTTP/1.1\r\n{HEADER_LENGTH}: {len(text)}\r\n"

    def send() -> socket.socket:
        host, port = served.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        length = len(text) + hidden.nbytes
        rest = f"Host: {host}:{port}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(f"{head}{rest}".encode() + text)
        connection.sendall(hidden.tobytes())
        return connection

    with await asyncio.to_thread(send):
        registry = served.daemon.metrics.registry
        in_flight = "splitlearn_requests_in_flight"
        await until(lambda: outcomes(served, "ok") == 1)
        await until(lambda: registry.get_sample_value(in_flight) == 0)
        answer = await infer(served)

    assert answer.status == 200


async def test_a_forward_that_fails_tells_its_client_where_to_look(serve: Any, part: Any) -> None:
    served = await serve()
    part.fail_with = RuntimeError("secret detail")

    failed = await asyncio.to_thread(post, served.url, "trunk", ONE, X_Request_ID="abc")
    part.fail_with = None

    assert failed.status == 500
    assert failed.json == {"error": "the forward failed; the log has it as request abc"}
    assert (await infer(served)).status == 200
    assert outcomes(served, "internal") == 1


async def test_models_that_are_not_ready(serve: Any, manager: Any, loader: Any) -> None:
    served = await serve()
    loader.gate.clear()
    loading = asyncio.Event()
    manager.on_transition.append(lambda event: event.model_id == "late" and loading.set())
    load = asyncio.create_task(manager.load_model(trunk_config("late")))
    await loading.wait()
    with pytest.raises(RuntimeError):
        await manager.load_model(trunk_config("broken"))

    late, broken, nothing = [
        await infer(served, model=name) for name in ("late", "broken", "nothing")
    ]
    loader.gate.set()
    await load

    assert (late.status, late.headers["Retry-After"]) == (503, "1")
    assert late.json["error"].startswith("model 'late' is loading")
    assert (broken.status, broken.headers["Retry-After"]) == (503, None)
    assert "the weights are cut off" in broken.json["error"]
    assert (nothing.status, "there is no model 'nothing'" in nothing.json["error"]) == (404, True)


async def test_a_request_in_flight_holds_up_an_unload_until_its_deadline(
    serve: Any, manager: Any, part: Any
) -> None:
    served = await serve()
    part.gate.clear()
    held = infer(served)
    await begun(part)

    unload = asyncio.create_task(manager.unload_model("trunk", drain_timeout=0))
    answer = await held
    part.gate.set()
    await unload

    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")


async def test_what_is_in_flight_is_answered_before_the_daemon_ends(serve: Any, part: Any) -> None:
    served = await serve()
    part.gate.clear()
    held = infer(served)
    await begun(part)

    ending = asyncio.create_task(served.stop())
    part.gate.set()

    assert (await held).status == 200
    assert await ending == 0


async def test_a_token_is_asked_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCESS", "secret")
    served = await serve(token_env="ACCESS")  # noqa: S106 - a name

    refused = [await infer(served)]
    refused += [await served.ask(f"/v2/models/trunk/{what}") for what in ("stats", "config")]
    refused.append(await served.ask("/v2/models/stats"))
    answered = await asyncio.to_thread(
        post, served.url, "trunk", ONE, Authorization="Bearer secret"
    )

    assert [answer.status for answer in refused] == [401] * 4
    assert answered.status == 200


async def test_long_json_does_not_hold_up_the_event_loop(serve: Any, part: Any) -> None:
    """Read at once, it would take a time in which nothing else runs.

    What is measured is the processor's time for this process, whatever else the machine does.
    """
    served = await serve()
    hidden = np.random.default_rng(0).standard_normal((16384, 16, 4)).astype(np.float32)
    text = json.dumps({"inputs": [entry("hidden_states", hidden)]}).encode()
    started = time.process_time()
    json.loads(text)
    at_once = time.process_time() - started
    longest, task = 0.0, asyncio.create_task(asyncio.to_thread(post, served.url, "trunk", text))
    while not task.done():
        before = time.process_time()
        await asyncio.sleep(0)
        longest = max(longest, time.process_time() - before)

    answer = await task
    assert (answer.status, len(part.calls)) == (200, 1)
    assert longest < at_once / 2
    found = np.array(answer.json["outputs"][0]["data"], dtype=np.float32)
    assert np.array_equal(found, 2 * hidden.reshape(-1))


class SidePart(FakePart):
    """Takes flags and places with its hidden states, and gives places back."""

    side_inputs = (
        CrossingValue("flags", "bool", (), ""),
        CrossingValue("places", "int32", (Size(2, exact=False),), ""),
    )
    side_outputs = side_inputs[1:]

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        self.given = inputs
        return HiddenState(super().__call__(inputs.tensor, **kwargs), inputs.side)


async def test_what_goes_with_the_hidden_states(serve: Any, part: Any) -> None:
    part.__class__ = SidePart
    served = await serve()
    beside = [
        {"name": "flags", "datatype": "BOOL", "shape": [1, 2], "data": [True, False]},
        entry("places", np.array([[[0], [1]]], dtype=np.int32)),
    ]
    given = {"inputs": [*ONE["inputs"], *beside]}
    wrong = {"inputs": [*ONE["inputs"], beside[0], {**beside[1], "data": [0, 2]}]}
    one = {**given, "outputs": [{"name": "places"}]}

    all_of_it, some, refused, missing = [
        await infer(served, document) for document in (given, one, wrong, ONE)
    ]

    assert part.given.side["flags"].tolist() == [[True, False]]
    assert [out["name"] for out in all_of_it.json["outputs"]] == ["hidden_states", "places"]
    assert some.json["outputs"] == [
        {"name": "places", "datatype": "INT32", "shape": [1, 2, 1], "data": [0, 1]}
    ]
    assert refused.json["error"] == "input 'places' must be 0 to 1, found 0 to 2"
    assert missing.json["error"] == "input 'flags' is missing: BOOL [batch, positions]"
    assert len(part.calls) == 2


def test_there_must_be_a_place() -> None:
    with pytest.raises(ConfigError, match="max_queue_size"):
        ServerConfig(max_queue_size=0)
    assert ServerConfig().max_queue_size == 64


def test_a_client_must_have_a_place() -> None:
    with pytest.raises(ConfigError, match="max_infer_per_client"):
        ServerConfig(max_infer_per_client=0)
    assert ServerConfig().max_infer_per_client is None
    token = {"name": "ann", "token_env": "ANN", "max_infer": 0}
    with pytest.raises(ConfigError, match=r"tokens\[0\].max_infer"):
        ServerConfig.from_dict({"tokens": [token]})
