"""Traces: what spans there are, where they hang, and what is not in them."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import gateways
import pytest
import torch
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving_fakes import FakeLoader, ask, daemon_in_thread, trunk_config

from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager import tracing as tracing_module
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.management import ManagementClient
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.core.events import ProgressEvent, TransitionEvent
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.trace_context import in_context, trace_headers
from splitlearn_manager.tracing import Tracing, start

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def daemon(
    provider: TracerProvider, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Daemon]:
    monkeypatch.setattr("splitlearn_manager.server.daemon.start", lambda _: Tracing(provider))
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 20), loader=loader, single_threaded=False
    )
    config = DaemonConfig(
        server=ServerConfig(port=0, management=True, session_resume_timeout=0),
        models=(trunk_config("trunk"), trunk_config("broken?")),
    )
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon
        loader.parts.clear()


@pytest.fixture
def spans(daemon: Daemon, exporter: InMemorySpanExporter) -> Any:
    """Return what ends the daemon, and returns the spans by their names, the first one first."""

    def end() -> dict[str, list[ReadableSpan]]:
        daemon.stop()
        for thread in threading.enumerate():
            if thread.name == "daemon":
                thread.join(60)
        named: dict[str, list[ReadableSpan]] = {}
        for span in sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0):
            named.setdefault(span.name, []).append(span)
        return named

    return end


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def infer_body(**changes: Any) -> bytes:
    given = {
        "name": "hidden_states",
        "shape": [1, 1, 4],
        "datatype": "FP32",
        "data": [71, 72, 73, 74],
    }
    return json.dumps({"inputs": [{**given, **changes}]}).encode()


# --- A daemon's spans -------------------------------------------------------------------------


def test_a_request_is_a_span_in_the_trace_of_its_client(daemon: Daemon, spans: Any) -> None:
    headers = {"traceparent": TRACEPARENT, "X-Request-ID": "req-1"}

    answer = ask(daemon.url, "/v2/models/trunk/infer?a=b", "POST", infer_body(), headers)

    assert answer.status == 200
    found = spans()
    (request,) = found["POST /v2/models/{model}/infer"]
    assert (trace_of(request), parent_of(request)) == (TRACE, PARENT)
    assert request.kind is trace.SpanKind.SERVER
    attributes = dict(request.attributes or {})
    assert attributes.pop("network.peer.port")
    assert attributes.pop("server.port") == int(daemon.url.rsplit(":", 1)[1])
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v2/models/{model}/infer",
        "network.peer.address": "127.0.0.1",
        "network.protocol.version": "1.1",
        "server.address": "127.0.0.1",
        "splitlearn.model": "trunk",
        "splitlearn.request_id": "req-1",
        "url.path": "/v2/models/trunk/infer",
        "url.scheme": "http",
    }
    for name in ("queue", "forward"):
        (child,) = found[name]
        assert parent_of(child) == id_of(request)
        assert request.start_time <= child.start_time <= child.end_time <= request.end_time


def test_a_session_and_its_steps_are_in_the_trace_of_whoever_opened_it(
    daemon: Daemon, provider: TracerProvider, spans: Any
) -> None:
    tracer = provider.get_tracer("client")
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        with tracer.start_as_current_span("first"):
            cache = trunk.new_cache()
            trunk(torch.ones(1, 3, 4), past_key_values=cache)
            trunk(torch.ones(1, 1, 4), past_key_values=cache)
            cache.close()
        with tracer.start_as_current_span("second"):
            trunk(torch.ones(1, 1, 4))

    found = spans()
    (first,), (second,) = found["first"], found["second"]
    session, other = found["session"]
    assert (trace_of(session), parent_of(session)) == (trace_of(first), id_of(first))
    assert (trace_of(other), parent_of(other)) == (trace_of(second), id_of(second))
    assert session.attributes is not None
    assert session.attributes["splitlearn.session.reason"] == "closed"
    assert session.attributes["splitlearn.session.steps"] == 2
    assert session.attributes["splitlearn.tokens"] == 4
    steps = found["step"]
    assert [parent_of(step) for step in steps] == [id_of(session)] * 2 + [id_of(other)]
    assert [dict(step.attributes or {})["splitlearn.tokens"] for step in steps] == [3, 1, 1]
    for name in ("queue", "forward"):
        assert [parent_of(child) for child in found[name]] == [id_of(step) for step in steps]
    for step, forward in zip(steps, found["forward"], strict=True):
        assert step.start_time <= forward.end_time <= step.end_time + 1_000_000  # two clocks
    (connection,) = found["GET /v2/models/{model}/sessions"]
    assert trace_of(connection) == trace_of(first)


def test_a_gateways_requests_reach_to_the_sessions_of_its_trunk(
    provider: TracerProvider, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests share forwards, but each has a session of its own, which is in its trace."""
    monkeypatch.setattr("splitlearn_manager.server.daemon.start", lambda _: Tracing(provider))
    others = TRACE[::-1]
    body = {"model": "demo", "prompt": "The", "max_tokens": 4, "temperature": 0}
    headers = [f"00-{trace}-{PARENT}-01" for trace in (TRACE, others)]
    with (
        gateways.daemon_of(gateways.trunk_config()) as trunk,
        gateways.daemon_of(gateways.pipeline_config(trunk.url)) as gateway,
        ThreadPoolExecutor() as threads,
    ):
        assert len(set(threads.map(partial(complete, gateway.url, body), headers))) == 1

    spans = exporter.get_finished_spans()
    requests = {trace_of(s): id_of(s) for s in spans if s.name == "POST /v1/completions"}
    sessions = {trace_of(s): parent_of(s) for s in spans if s.name == "session"}
    assert requests.keys() == {TRACE, others}
    assert sessions == requests


def complete(url: str, body: dict[str, Any], traceparent: str) -> str:
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "traceparent": traceparent},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def test_a_step_that_fails_says_how_and_not_what(
    daemon: Daemon, loader: FakeLoader, spans: Any
) -> None:
    loader.parts["trunk"].fail_with = ValueError("the secret text")
    with RemoteTrunk(daemon.url, "trunk") as trunk, pytest.raises(RuntimeError):
        trunk(torch.ones(1, 3, 4))

    (step,) = spans()["step"]
    assert step.status.status_code is trace.StatusCode.ERROR
    assert step.status.description is None
    assert dict(step.attributes or {})["error.type"] == "internal"
    assert "secret" not in step.to_json()


def test_nothing_of_what_is_sent_is_in_a_span(
    daemon: Daemon, exporter: InMemorySpanExporter, spans: Any
) -> None:
    ask(daemon.url, "/v2?token=sesame", headers={"Authorization": "Bearer sesame"})
    ask(daemon.url, "/v2/models/trunk/infer", "POST", infer_body())
    refused = ask(daemon.url, "/v2/models/trunk/infer", "POST", infer_body(name="sesame"))
    spans()

    text = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert refused.status == 400
    assert "sesame" not in text
    assert "71" not in json.dumps(
        [
            dict(s.attributes or {})
            for s in exporter.get_finished_spans()
            if s.name in {"queue", "forward"}
        ]
    )


@pytest.mark.parametrize("given", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_begins_a_trace(daemon: Daemon, spans: Any, given: str) -> None:
    assert ask(daemon.url, "/v2", headers={"traceparent": given}).status == 200

    (request,) = spans()["GET /v2"]
    assert request.parent is None


def test_an_error_of_the_server_is_one_of_the_span(daemon: Daemon, spans: Any) -> None:
    client = ManagementClient(Address.parse(daemon.url))
    with pytest.raises(Exception, match="cut off"):
        client.finish("broken", "load")

    (request,) = spans()["POST /v2/repository/models/{model}/load"]
    assert request.status.status_code is trace.StatusCode.ERROR
    assert dict(request.attributes or {})["error.type"] == "503"


def test_probes_are_not_traced(daemon: Daemon, spans: Any) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/metrics"):
        ask(daemon.url, path)

    assert not [name for name in spans() if name.startswith("GET")]


def test_a_load_is_a_span_in_the_trace_of_who_asked_for_it(
    daemon: Daemon, provider: TracerProvider, spans: Any
) -> None:
    client = ManagementClient(Address.parse(daemon.url))
    with provider.get_tracer("client").start_as_current_span("mine"):
        client.finish("trunk", "reload")
        with pytest.raises(Exception, match="cut off"):
            client.finish("broken", "load")

    found = spans()
    preload, *others = found["load"]
    (mine,) = found["mine"]
    assert preload.parent is None
    assert dict(preload.attributes or {})["splitlearn.model"] == "trunk"
    reload, broken = others
    assert trace_of(broken) == trace_of(mine)
    assert dict(broken.attributes or {})["splitlearn.model"] == "broken"
    assert broken.status.status_code is trace.StatusCode.ERROR
    assert "cut off" not in broken.to_json()
    assert dict(reload.attributes or {})["splitlearn.generation"] == 2


# --- Loads' phases ----------------------------------------------------------------------------


def test_phases_of_a_load_are_events_of_its_span(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    def at(phase: LoadPhase, done: int) -> ProgressEvent:
        return ProgressEvent("m", 1, "op", phase, done, 9, 1.0, None, None, 101.0 + done)

    def moved(old: Any, new: Any, when: float, **more: Any) -> TransitionEvent:
        return TransitionEvent("m", 1, old, new, "why", 0.0, when, operation_id="op", **more)

    tracing = Tracing(provider)
    tracing.model_moved(moved(None, ModelStatus.LOADING, 100.0))
    for phase, done in ((LoadPhase.QUEUED, 0), (LoadPhase.READING, 1), (LoadPhase.READING, 5)):
        tracing.progress(at(phase, done))
    tracing.model_moved(moved(ModelStatus.LOADING, ModelStatus.READY, 110.0, load_s=10.0))
    tracing.progress(at(LoadPhase.READING, 9))
    tracing.stop()

    (load,) = exporter.get_finished_spans()
    assert [event.name for event in load.events] == ["queued", "reading"]
    assert [dict(event.attributes or {}) for event in load.events] == [
        {"splitlearn.bytes_done": 0},
        {"splitlearn.bytes_done": 1},
    ]
    assert (load.start_time, load.end_time) == (100_000_000_000, 110_000_000_000)


# --- Clients ----------------------------------------------------------------------------------


def test_a_client_sends_the_span_that_it_runs_in(provider: TracerProvider) -> None:
    address = Address.parse("http://127.0.0.1:1", "sesame")
    with provider.get_tracer("client").start_as_current_span("mine") as span:
        context = span.get_span_context()
        headers = address.headers

    traceparent = headers.pop("traceparent")
    assert traceparent.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert headers == {"Authorization": "Bearer sesame"}
    assert Address.parse("http://127.0.0.1:1").headers == {}


def test_a_span_goes_with_a_function_into_another_thread(provider: TracerProvider) -> None:
    with ThreadPoolExecutor(1) as pool:
        with provider.get_tracer("client").start_as_current_span("mine"):
            bound, expected = in_context(trace_headers), trace_headers()
        assert pool.submit(bound).result() == expected
        assert pool.submit(trace_headers).result() == {}


# --- On and off -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "environ", "on"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        (False, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        (False, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (False, {"OTEL_TRACES_EXPORTER": "console"}, False),
        (True, {"OTEL_SDK_DISABLED": "true"}, False),
        (True, {"OTEL_TRACES_EXPORTER": "none"}, False),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_when_there_are_traces(wanted: bool, environ: dict[str, str], on: bool) -> None:
    tracing = start(wanted, environ)

    assert (tracing is not None) is on
    if tracing is not None:
        tracing.stop()


def test_the_service_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    plain = tracing_module._provider()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    named = tracing_module._provider()

    assert plain.resource.attributes["service.name"] == "splitlearn"
    assert named.resource.attributes["service.name"] == "mine"
    for provider in (plain, named):
        provider.shutdown()


def test_without_opentelemetry_the_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_module, "NEEDED", "not_installed_at_all.exporter")
    caplog.set_level(logging.WARNING)

    with pytest.raises(ConfigError, match=r"server\.tracing: .* pip install 'splitlearn\[otel\]'"):
        start(wanted=True, environ={})
    assert start(wanted=False, environ={"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "there will be no traces" in caplog.text


def test_nothing_of_it_is_imported_where_it_is_off() -> None:
    code = (
        "import sys, splitlearn_manager.server.daemon, splitlearn_manager.client.management\n"
        "from splitlearn_manager.trace_context import in_context, trace_headers\n"
        "from splitlearn_manager.tracing import start\n"
        "assert start(False, {}) is None and trace_headers() == {} and in_context(id) is id\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_collector_that_does_not_answer_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
        tracing = start(wanted=True)
        assert tracing is not None
        tracing._tracer.start_span("one").end()

        began = time.monotonic()
        tracing.stop()

        assert time.monotonic() - began < tracing_module.LAST_EXPORT + 1

    # it would go on trying, in a thread that is in the way of the tests that come next
    processor = tracing._provider._active_span_processor._span_processors[0]
    processor.span_exporter.shutdown()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name in {"last-traces", "OtelBatchSpanRecordProcessor"}:
            thread.join(30)
            assert not thread.is_alive()


def test_spans_arrive_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            requests.append((self.path, self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        tracing = start(wanted=False)
        assert tracing is not None
        tracing._tracer.start_span("one").end()
        tracing.stop()
        serving.join(30)

    ((path, body),) = requests
    assert path == "/v1/traces"
    sent = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    assert [span.name for span in sent.scope_spans[0].spans] == ["one"]
    assert "splitlearn" in [value.value.string_value for value in sent.resource.attributes]
