"""The Open Inference Protocol over a real socket, by hand and with Triton's own client."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import tritonclient.http
from serving_fakes import trunk_config
from tritonclient.utils import InferenceServerException

from splitlearn_manager.errors import ModelLoadingError, ModelNotFoundError
from splitlearn_manager.server import oip
from splitlearn_manager.server.model_path import ready_model

if TYPE_CHECKING:
    from splitlearn_manager import AsyncModelManager

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    """Run on uvloop, as the daemon does: nothing here depends on the loop."""
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
async def served(serve: Any) -> Any:
    return await serve()


@pytest.fixture
async def loading(manager: Any, loader: Any) -> Any:
    """Leave the model `late` in the middle of its load."""
    started = asyncio.Event()
    manager.on_transition.append(lambda event: event.model_id == "late" and started.set())
    loader.gate.clear()
    task = asyncio.create_task(manager.load_model(trunk_config("late")))
    await started.wait()
    yield
    loader.gate.set()
    await asyncio.gather(task, return_exceptions=True)  # ready, or ended with the daemon


@pytest.fixture
async def failed(manager: Any) -> None:
    """Have a model whose load failed."""
    with pytest.raises(RuntimeError):
        await manager.load_model(trunk_config("broken"))


@pytest.mark.usefixtures("failed")
async def test_live_is_about_the_process(served: Any) -> None:
    answer = await served.ask("/v2/health/live")

    assert (answer.status, answer.json) == (200, {"live": True})


@pytest.mark.usefixtures("failed")
async def test_ready_without_models_to_load(served: Any) -> None:
    answer = await served.ask("/v2/health/ready")

    assert (answer.status, answer.json) == (200, {"ready": True})


async def test_live_fails_when_the_tables_writer_is_stuck(
    served: Any, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oip, "LIVE_PATIENCE", 0.05)
    async with manager.lock:
        answer = await served.ask("/v2/health/live")

    assert answer.status == 503
    assert answer.json == {
        "live": False,
        "error": "the manager has decided nothing for 0.05 s; it is stuck",
    }
    assert (await served.ask("/v2/health/live")).status == 200


async def test_server_metadata(served: Any) -> None:
    body = (await served.ask("/v2")).json

    assert body["name"] == "splitlearn"
    assert body["version"]
    assert body["extensions"] == list(oip.EXTENSIONS)


HIDDEN = {"name": "hidden_states", "datatype": "FP32", "shape": [-1, -1, 4]}
IDS = {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
LOGITS = {"name": "logits", "datatype": "FP32", "shape": [-1, -1, 11]}
MASK = {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1], "optional": True}
POSITIONS = {"name": "position_ids", "datatype": "INT64", "shape": [-1, -1], "optional": True}


@pytest.mark.parametrize(
    ("component", "takes", "gives"),
    [
        ("bottom", IDS, HIDDEN),
        ("trunk-0", HIDDEN, HIDDEN),
        ("top", HIDDEN, LOGITS),
        ("full", IDS, LOGITS),
    ],
)
async def test_what_a_model_takes_and_gives(
    served: Any, manager: Any, component: str, takes: Any, gives: Any
) -> None:
    await manager.load_model(trunk_config(component))

    body = (await served.ask(f"/v2/models/{component}")).json

    assert body["name"] == component
    assert body["versions"] == ["1"]
    assert body["platform"] == "splitlearn_safetensors"
    assert body["inputs"] == [takes, MASK, POSITIONS]
    assert body["outputs"] == [gives]
    assert body["properties"] == {
        "component": component,
        "model_type": "fake",
        "start_layer": "1",
        "end_layer": "3",
        "num_layers": "5",
        "hidden_size": "4",
        "max_positions": "16",
        "dtype": "float32",
        "device": "cpu",
        "num_parameters": "20",
        "nbytes": "80",
    }


async def test_the_one_version_can_be_named(served: Any) -> None:
    plain = await served.ask("/v2/models/trunk")
    named = await served.ask("/v2/models/trunk/versions/1")
    ready = await served.ask("/v2/models/trunk/versions/1/ready")
    other = await served.ask("/v2/models/trunk/versions/2")

    assert named.json == plain.json
    assert ready.status == 200
    assert (other.status, other.json) == (
        404,
        {"error": "model 'trunk' has no version 2, only 1"},
    )


async def test_a_model_that_can_be_used_is_ready(served: Any) -> None:
    answer = await served.ask("/v2/models/trunk/ready")

    assert (answer.status, answer.json) == (200, {"name": "trunk", "ready": True})


async def test_a_model_that_is_not_there(served: Any) -> None:
    for path in ("/v2/models/nothing", "/v2/models/nothing/ready"):
        answer = await served.ask(path)
        assert answer.status == 404
        assert answer.json == {"error": "there is no model 'nothing'; there are: trunk"}


@pytest.mark.usefixtures("loading")
async def test_a_model_that_is_being_loaded(served: Any) -> None:
    metadata = await served.ask("/v2/models/late")
    ready = await served.ask("/v2/models/late/ready")

    assert (metadata.status, metadata.headers["Retry-After"]) == (503, "1")
    assert metadata.json["error"].startswith("model 'late' is loading")
    assert (ready.status, ready.json["ready"]) == (503, False)


@pytest.mark.usefixtures("failed")
async def test_a_model_that_failed_to_load_says_why(served: Any) -> None:
    metadata = await served.ask("/v2/models/broken")
    ready = await served.ask("/v2/models/broken/ready")

    assert metadata.status == 503
    assert "the weights are cut off" in metadata.json["error"]
    assert (ready.status, ready.json["ready"]) == (503, False)
    assert "the weights are cut off" in ready.json["error"]


@pytest.mark.usefixtures("loading", "failed")
async def test_the_index_lists_every_model_with_its_state(served: Any) -> None:
    entries = {e["name"]: e for e in (await served.ask("/v2/repository/index", "POST")).json}

    assert entries["trunk"] == {"name": "trunk", "version": "1", "state": "READY", "reason": ""}
    assert entries["late"]["state"] == "LOADING"
    assert entries["broken"]["state"] == "UNAVAILABLE"
    assert "the weights are cut off" in entries["broken"]["reason"]


async def test_the_index_shows_a_model_that_is_going(served: Any, manager: Any) -> None:
    async with manager.use("trunk"):
        unload = asyncio.create_task(manager.unload_model("trunk"))
        await asyncio.sleep(0)
        index = await served.ask("/v2/repository/index", "POST")
    await unload

    assert index.json[0]["state"] == "UNLOADING"


@pytest.mark.usefixtures("failed")
async def test_the_index_can_be_limited_to_what_is_ready(served: Any) -> None:
    answer = await served.ask("/v2/repository/index", "POST", b'{"ready": true}')

    assert [entry["name"] for entry in answer.json] == ["trunk"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"[]", 400, "the body must be a JSON object, found list"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 50_000, 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b'{"ready": "yes"}', 400, "\"ready\" must be true or false, found 'yes'"),
        (b" " * 70_000, 413, "the body is longer than 65536 bytes"),
    ],
)
async def test_a_bad_body_is_told(served: Any, body: bytes, status: int, said: str) -> None:
    answer = await served.ask("/v2/repository/index", "POST", body)

    assert (answer.status, answer.json) == (status, {"error": said})


@pytest.mark.parametrize(
    "path",
    ["/", "/v2/", "/v2/nothing", "/v2/models", "/v2/models/trunk/nothing", "/docs"],
)
async def test_an_unknown_path_is_not_found(served: Any, path: str) -> None:
    answer = await served.ask(path)

    assert (answer.status, answer.json) == (404, {"error": f"there is nothing at {path}"})


async def test_a_wrong_method_says_which_is_right(served: Any) -> None:
    answer = await served.ask("/v2/repository/index")

    assert (answer.status, answer.json) == (405, {"error": "Method Not Allowed"})
    assert answer.headers["Allow"] == "POST"


async def test_sessions_by_plain_http_are_told_of_websockets(served: Any) -> None:
    answer = await served.ask("/v2/models/trunk/sessions")

    assert (answer.status, answer.headers["Upgrade"]) == (426, "websocket")
    assert "splitlearn.v1" in answer.json["error"]


async def test_a_bug_is_answered_with_an_id_alone(served: Any, manager: Any) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    manager.list_models = broken
    answer = await served.ask("/v2/repository/index", "POST", X_Request_ID="abc")

    assert answer.status == 500
    assert answer.json == {"error": "internal error; the log has it as request abc"}
    assert answer.headers.get_all("X-Request-ID") == ["abc"]


@pytest.mark.parametrize("given", ["abc-123", "a" * 128])
async def test_a_request_id_is_repeated(served: Any, given: str) -> None:
    answer = await served.ask("/v2", X_Request_ID=given)

    assert answer.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "a" * 129, "\u00e4"])
async def test_a_request_without_a_good_id_gets_one(served: Any, given: str | None) -> None:
    answer = await served.ask("/v2", **({} if given is None else {"X_Request_ID": given}))

    assert answer.headers["X-Request-ID"] != given
    assert len(answer.headers["X-Request-ID"]) == 32


@pytest.mark.usefixtures("failed")
async def test_metrics_show_models_memory_and_requests(served: Any) -> None:
    await served.ask("/v2/models/trunk")
    await served.ask("/v2/models/../../etc/passwd", "BREW")

    answer = await served.ask("/metrics")

    assert answer.headers["Content-Type"] == "text/plain; version=1.0.0; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert 'splitlearn_model_state{model="trunk",state="ready"} 1.0' in lines
    assert 'splitlearn_model_state{model="broken",state="failed"} 1.0' in lines
    assert 'splitlearn_memory_capacity_bytes{device="cpu"} 1.048576e+06' in lines
    assert 'splitlearn_memory_reserved_bytes{device="cpu"} 80.0' in lines
    route = 'route="/v2/models/{model}"'
    assert f'splitlearn_requests_total{{code="200",method="GET",{route}}} 1.0' in lines
    unmatched = 'code="404",method="other",route="unmatched"'
    assert f"splitlearn_requests_total{{{unmatched}}} 1.0" in lines
    assert any(line.startswith('splitlearn_build_info{python="3.') for line in lines)


async def test_the_systems_figures_are_not_looked_up_on_the_event_loop(
    served: Any, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(device: str) -> Any:
        threads.append(threading.current_thread())
        return usage(device)

    threads: list[threading.Thread] = []
    usage = manager.resource_manager.get_current_usage
    monkeypatch.setattr(manager.resource_manager, "get_current_usage", look)

    await served.ask("/metrics")

    assert threads
    assert threading.current_thread() not in threads


async def test_probes_and_metrics_are_not_counted(served: Any) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/metrics"):
        await served.ask(path)

    assert b"splitlearn_requests_total{" not in (await served.ask("/metrics")).body


@pytest.mark.usefixtures("loading", "failed")
async def test_tritons_client_understands_it_all(served: Any) -> None:
    def use_client() -> None:
        address = served.url.removeprefix("http://")
        with tritonclient.http.InferenceServerClient(address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.get_server_metadata()["name"] == "splitlearn"
            assert client.get_model_metadata("trunk")["platform"] == "splitlearn_safetensors"
            assert client.get_model_metadata("trunk", "1")["outputs"][0]["shape"] == [-1, -1, 4]
            assert client.is_model_ready("trunk")
            assert client.is_model_ready("trunk", "1")
            assert not client.is_model_ready("late")
            assert not client.is_model_ready("broken")
            assert not client.is_model_ready("nothing")
            states = {e["name"]: e["state"] for e in client.get_model_repository_index()}
            assert states == {"trunk": "READY", "late": "LOADING", "broken": "UNAVAILABLE"}
            with pytest.raises(InferenceServerException, match="there is no model 'nothing'"):
                client.get_model_metadata("nothing")
            with pytest.raises(InferenceServerException, match=r"server\.management"):
                client.load_model("trunk")

    await asyncio.to_thread(use_client)


async def test_a_model_that_will_be_loaded_is_not_said_to_be_unknown(manager: Any) -> None:
    """Who asks a server that has just started would not ask it again."""
    with pytest.raises(ModelLoadingError, match="'soon' is waiting to be loaded"):
        await ready_model(manager, "soon", {"soon"})
    with pytest.raises(ModelNotFoundError, match="no model 'never'"):
        await ready_model(manager, "never", {"soon"})
