"""Loading and unloading over the network, by hand and with Triton's own clients."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import tritonclient.http
import tritonclient.http.aio
from manager_fakes import until
from serving_fakes import FakeLoader, Served
from tritonclient.utils import InferenceServerException

from splitlearn_manager import AsyncModelManager
from splitlearn_manager.core.entries import LoadingPlaceholder
from splitlearn_manager.core.states import LoadPhase, ModelStatus

pytestmark = pytest.mark.anyio

MODELS = "/v2/repository/models"


@pytest.fixture
def anyio_backend() -> object:
    """Run on uvloop, as the daemon does: nothing here depends on the loop."""
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
async def served(serve: Any) -> Served:
    """Return a daemon that may be managed, with `other` loaded and `late` and `broken` not."""
    served = await serve("other", "late?", "broken?", management=True)
    assert await served.line() == "splitlearn: ready (1 model)"
    return served


async def post(served: Served, model: str, action: str, body: bytes = b"", **headers: str) -> Any:
    return await served.ask(f"{MODELS}/{model}/{action}", "POST", body, **headers)


async def state(served: Served, model: str) -> str:
    return (await served.ask(f"{MODELS}/{model}")).json["status"]


# --- Who may ------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["load", "unload", "reload", "cancel"])
async def test_it_is_refused_unless_it_is_asked_for(serve: Any, action: str) -> None:
    served = await serve("other")
    await served.line()

    answer = await post(served, "other", action)

    assert answer.status == 403
    assert "server.management" in answer.json["error"]
    assert await state(served, "other") == "ready"


async def test_beyond_loopback_it_needs_the_token(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "s3cret")
    served = await serve("other?", management=True, token_env="SECRET_OF_THE_TEST")  # noqa: S106
    await served.line()

    assert (await post(served, "other", "load")).status == 401
    assert (await served.ask(f"{MODELS}/other")).status == 401
    assert (await served.ask("/v2/events")).status == 401
    given = await post(served, "other", "load", Authorization="Bearer s3cret")
    assert given.status == 200


@pytest.mark.parametrize("action", ["load", "unload", "reload", "cancel"])
@pytest.mark.parametrize("name", ["nothing", "..", "%2E%2E", "trunk", "a" * 4000, "%00"])
async def test_only_models_of_the_configuration_can_be_named(
    served: Served, manager: AsyncModelManager, action: str, name: str
) -> None:
    """`trunk` is in the manager, but not in the daemon's configuration."""
    answer = await post(served, name, action)

    assert answer.status == 404
    assert len(answer.json["error"]) < 200
    assert (await manager.get_model_info("trunk")).status is ModelStatus.READY


@pytest.mark.parametrize(
    ("action", "body", "said"),
    [
        ("load", b'{"parameters": {"config": "{}"}}', "'config' (str): what a model is loaded"),
        ("load", b'{"parameters": {"file:1/model.bin": "AAAA"}}', "can't be given in a request"),
        ("load", b'{"config": {"model_path": "/etc"}}', "can't be given in a request"),
        ("load", b'{"model_path": "/etc"}', "unknown key; Known are wait"),
        ("load", b'{"wait": "no"}', '"wait" must be true or false'),
        ("load", b'{"parameters": []}', '"parameters" must be an object'),
        ("load", b"[]", "must be a JSON object"),
        ("load", b"{", "not JSON"),
        ("unload", b'{"drain_timeout": -1}', "must be 0 to 86400 seconds, found -1"),
        ("unload", b'{"drain_timeout": 1e999}', "must be 0 to 86400 seconds"),
        ("unload", b'{"drain_timeout": NaN}', "must be 0 to 86400 seconds"),
        ("unload", b'{"parameters": {"drain_timeout": true}}', "must be 0 to 86400 seconds"),
        ("unload", b'{"policy": "load_first"}', "unknown key"),
        ("reload", b'{"policy": "both"}', '"policy" must be load_first or unload_first'),
        ("reload", b'{"policy": []}', '"policy" must be load_first or unload_first'),
        ("cancel", b'{"force": true}', "unknown key"),
    ],
)
async def test_a_bad_body_changes_nothing(
    served: Served, action: str, body: bytes, said: str
) -> None:
    answer = await post(served, "other", action, body)

    assert answer.status == 400
    assert said in answer.json["error"]
    assert await state(served, "other") == "ready"


# --- Load and unload ------------------------------------------------------------------------------


async def test_tritons_client_loads_and_unloads(served: Served, loader: FakeLoader) -> None:
    def use_client() -> None:
        with tritonclient.http.InferenceServerClient(served.url.removeprefix("http://")) as client:
            assert (
                "model_repository(unload_dependents)" in client.get_server_metadata()["extensions"]
            )
            client.load_model("late")
            assert client.is_model_ready("late")
            client.load_model("late")  # as it is
            client.unload_model("late")
            client.unload_model("late")
            assert not client.is_model_ready("late")
            index = {e["name"]: e for e in client.get_model_repository_index()}
            assert (index["late"]["state"], index["late"]["reason"]) == (
                "UNAVAILABLE",
                "not loaded",
            )
            assert index["other"]["state"] == "READY"
            with pytest.raises(InferenceServerException, match="the weights are cut off"):
                client.load_model("broken")
            with pytest.raises(InferenceServerException, match="can't be given in a request"):
                client.load_model("late", config="{}")
            with pytest.raises(InferenceServerException, match="has no model 'nothing'"):
                client.load_model("nothing")

    await asyncio.to_thread(use_client)
    assert "late" in loader.parts


async def test_tritons_aio_client_loads_and_unloads(served: Served) -> None:
    address = served.url.removeprefix("http://")
    async with tritonclient.http.aio.InferenceServerClient(address) as client:
        await client.load_model("late")
        assert await client.is_model_ready("late")
        await client.unload_model("late", unload_dependents=True)
        assert not await client.is_model_ready("late")
        states = {e["name"]: e["state"] for e in await client.get_model_repository_index()}
        assert states == {
            "trunk": "READY",
            "other": "READY",
            "late": "UNAVAILABLE",
            "broken": "UNAVAILABLE",
        }


async def test_a_load_in_flight_is_joined(
    served: Served, loader: FakeLoader, manager: AsyncModelManager
) -> None:
    loader.gate.clear()
    loads = [asyncio.create_task(post(served, "late", "load")) for _ in range(3)]
    await until(lambda: "late" in manager.models)
    loader.gate.set()

    answers = await asyncio.gather(*loads)

    assert [answer.status for answer in answers] == [200] * 3
    assert {answer.json["generation"] for answer in answers} == {3}
    assert answers[0].json["status"] == "ready"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {"Prefer": "respond-async"}),
        (b"", {"Prefer": "wait=10, Respond-Async; foo"}),
        (b'{"wait": false}', {}),
        (b'{"parameters": {}, "wait": false}', {"Prefer": "return=minimal"}),
    ],
)
async def test_a_load_can_be_answered_at_once(
    served: Served, loader: FakeLoader, manager: AsyncModelManager, body: bytes, headers: Any
) -> None:
    loader.gate.clear()

    answer = await post(served, "late", "load", body, **headers)

    assert answer.status == 202
    assert answer.headers["Location"] == f"{MODELS}/late"
    applied = "respond-async" if "espond-" in headers.get("Prefer", "") else None
    assert answer.headers["Preference-Applied"] == applied
    assert answer.json["status"] == "loading"
    placeholder = manager.models["late"]
    assert isinstance(placeholder, LoadingPlaceholder)
    await until(lambda: placeholder.progress.bytes_total > 0)
    await until(lambda: placeholder.progress.phase is LoadPhase.READING)
    shown = (await served.ask(answer.headers["Location"])).json
    assert shown["reason"].startswith("model 'late' is loading: reading, 0 of 80 bytes (0 %)")
    assert shown["phase"] == "reading"
    loader.gate.set()
    await until(lambda: manager.models["late"].status is ModelStatus.READY)
    again = await post(served, "late", "load", body, **headers)
    assert (again.status, again.json["status"]) == (200, "ready")


async def test_a_client_that_goes_away_leaves_the_load_going(
    served: Served, loader: FakeLoader, manager: AsyncModelManager
) -> None:
    loader.gate.clear()
    host, port = served.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {MODELS}/late/load HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    await until(lambda: "late" in manager.models)
    writer.close()
    await until(lambda: _counted(served, "499") == 1)  # the daemon has seen it go
    loader.gate.set()

    await until(lambda: manager.models["late"].status is ModelStatus.READY)


def _counted(served: Served, code: str) -> float | None:
    labels = {"route": f"{MODELS}/{{model}}/load", "method": "POST", "code": code}
    return served.daemon.metrics.registry.get_sample_value("splitlearn_requests_total", labels)


async def test_an_unload_waits_for_uses_and_can_be_joined(
    served: Served, manager: AsyncModelManager, loader: FakeLoader
) -> None:
    loader.parts.clear()  # what somebody else refers to would not be back
    async with manager.use("other"):
        answer = await post(served, "other", "unload", b'{"wait": false}')
        assert (answer.status, answer.json["status"]) == (202, "unloading")
        joined = asyncio.create_task(post(served, "other", "unload", b'{"drain_timeout": 60}'))
        refused = await post(served, "other", "load")
        assert (refused.status, "unloading" in refused.json["error"]) == (409, True)
    assert (await joined).json == {
        "model_id": "other",
        "status": "absent",
        "reason": "not loaded",
        "unreturned_bytes": 0,
    }
    assert await state(served, "other") == "absent"


async def test_what_is_being_loaded_is_not_unloaded(
    served: Served, loader: FakeLoader, manager: AsyncModelManager
) -> None:
    loader.gate.clear()
    await post(served, "late", "load", b'{"wait": false}')

    answer = await post(served, "late", "unload")

    assert answer.status == 503
    assert "cancel that first" in answer.json["error"]
    assert manager.models["late"].status is ModelStatus.LOADING
    loader.gate.set()


async def test_a_load_is_cancelled(served: Served, loader: FakeLoader) -> None:
    loader.gate.clear()
    load = asyncio.create_task(post(served, "late", "load"))
    while await state(served, "late") == "absent":
        pass
    cancelling = asyncio.create_task(post(served, "late", "cancel"))
    answer = await load
    loader.gate.set()

    assert (answer.status, "was cancelled" in answer.json["error"]) == (503, True)
    told = (await cancelling).json
    assert (told["status"], told["thread_ended"]) == ("failed", True)
    assert (await served.ask("/v2/health/ready")).status == 200  # it was cancelled on purpose
    assert (await post(served, "late", "cancel")).status == 409
    assert (await post(served, "late", "load")).status == 200


@pytest.mark.parametrize("policy", ["load_first", "unload_first", None])
async def test_a_reload_swaps(served: Served, manager: AsyncModelManager, policy: str) -> None:
    before = manager.models["other"].generation
    body = b"" if policy is None else f'{{"policy": "{policy}"}}'.encode()

    answer = await post(served, "other", "reload", body)

    assert (answer.status, answer.json["status"]) == (200, "ready")
    assert answer.json["generation"] > before
    assert (await served.ask("/v2/health/ready")).status == 200


async def test_a_reload_that_fails_keeps_the_old(
    served: Served, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load_from_config", _cut_off)

    answer = await post(served, "other", "reload")

    assert (answer.status, "cut off" in answer.json["error"]) == (503, True)
    assert await state(served, "other") == "ready"
    assert (await served.ask("/v2/health/ready")).status == 200


def _cut_off(*_: object) -> None:
    raise ValueError("cut off")


async def test_what_is_not_there_is_not_reloaded(served: Served) -> None:
    answer = await post(served, "late", "reload")

    assert (answer.status, "there is no model 'late'" in answer.json["error"]) == (404, True)


async def test_everything_that_is_there_or_configured_is_listed(served: Served) -> None:
    await post(served, "broken", "load")

    models = {m["model_id"]: m for m in (await served.ask(MODELS)).json["models"]}

    assert {name: m["status"] for name, m in models.items()} == {
        "trunk": "ready",
        "other": "ready",
        "broken": "failed",
        "late": "absent",
    }
    assert "the weights are cut off" in models["broken"]["reason"]
    assert models["broken"]["retry_at"] is None


# --- Readiness ------------------------------------------------------------------------------------


async def test_a_load_that_is_asked_for_later_does_not_make_the_daemon_unready(
    served: Served, loader: FakeLoader
) -> None:
    loader.gate.clear()
    await post(served, "late", "load", b'{"wait": false}')

    assert (await served.ask("/v2/health/ready")).status == 200
    loader.gate.set()


async def test_nor_does_one_that_fails_and_need_not_be_there(served: Served) -> None:
    await post(served, "broken", "load")

    assert (await served.ask("/v2/health/ready")).status == 200
    model = await served.ask("/v2/models/broken/ready")
    assert (model.status, model.json["ready"]) == (503, False)


async def test_one_that_should_be_there_and_fails_does_until_it_is_taken_out(serve: Any) -> None:
    served = await serve("broken", management=True)
    await served.line()
    assert (await post(served, "broken", "unload")).status == 200
    assert (await served.ask("/v2/health/ready")).status == 200

    await post(served, "broken", "load")

    ready = await served.ask("/v2/health/ready")
    assert ready.status == 503
    assert "'broken' failed to load: ValueError: the weights are cut off" in ready.json["error"]
    assert (await post(served, "broken", "unload")).status == 200
    assert (await served.ask("/v2/health/ready")).status == 200


async def test_unloaded_and_loaded_again_it_is_ready_throughout(served: Served) -> None:
    seen: list[int] = []

    async def probe(_: object = None) -> None:
        seen.append((await served.ask("/v2/health/ready")).status)

    await post(served, "other", "unload")
    await probe()
    await post(served, "other", "load")
    await probe()

    assert seen == [200, 200]


# --- Logs -----------------------------------------------------------------------------------------


async def test_the_request_that_began_a_load_is_in_its_logs(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    from splitlearn_manager.observability import RequestIdFilter  # noqa: PLC0415

    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(RequestIdFilter())

    await post(served, "late", "load", X_Request_ID="from-the-client")

    moves = [r for r in caplog.records if getattr(r, "event", "") == "model_transition"]
    assert [(r.old, r.new, r.request_id) for r in moves] == [  # type: ignore[attr-defined]
        ("absent", "loading", "from-the-client"),
        ("loading", "ready", "from-the-client"),
    ]
    assert len({r.operation_id for r in moves}) == 1  # type: ignore[attr-defined]
