"""The access log: what it says of requests and sessions, and that clients can't write in it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from websockets.asyncio.client import connect

from splitlearn_manager import AsyncModelManager
from splitlearn_manager.observability import ACCESS_LOG, RequestIdFilter, configure_logging
from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.wire import SUBPROTOCOL, Frame, Kind, TensorName, decode, encode

pytestmark = pytest.mark.anyio


class Lines(logging.Handler):
    """Keeps the records, in the form in which the daemon writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(record.getMessage() for record in self.records)

    def of(self, event: str) -> list[Any]:
        return [record for record in self.records if record.event == event]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger(ACCESS_LOG), Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
async def served(serve: Any) -> Any:
    return await serve("trunk", access_log=True)


def infer_body() -> bytes:
    given = {"name": "hidden_states", "shape": [1, 1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    return json.dumps({"inputs": [given]}).encode()


async def test_a_request_is_one_line(served: Any, lines: Lines) -> None:
    body = infer_body()

    answer = await served.ask(
        "/v2/models/trunk/infer?token=sesame", "POST", body, X_Request_ID="req-1"
    )

    (record,) = lines.records
    assert answer.status == 200
    assert (record.event, record.levelname) == ("request", "INFO")
    assert (record.method, record.route, record.status) == (
        "POST",
        "/v2/models/{model}/infer",
        200,
    )
    assert (record.bytes_in, record.bytes_out) == (len(body), len(answer.body))
    assert (record.model, record.request_id) == ("trunk", "req-1")
    assert record.peer.startswith("127.0.0.1:")
    assert 0 < record.duration_s < 60
    assert lines.text.startswith("POST /v2/models/{model}/infer 200 model=trunk bytes_in=")
    assert "sesame" not in lines.text


@pytest.mark.parametrize(
    ("path", "status", "route"),
    [
        ("/v2/models/trunk?x=1", 200, "/v2/models/{model}"),
        ("/v2/models/absent", 404, "/v2/models/{model}"),
        ("/made/up", 404, "unmatched"),
    ],
)
async def test_what_is_refused_is_logged_too(
    served: Any, lines: Lines, path: str, status: int, route: str
) -> None:
    await served.ask(path)

    (record,) = lines.records
    assert (record.status, record.route) == (status, route)


async def test_a_wrong_token_is_logged_and_not_shown(
    serve: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESAME", "a-right-token")
    served = await serve("trunk", access_log=True, token_env="SESAME")  # noqa: S106

    await served.ask("/v2", Authorization="Bearer a-wrong-token")

    (record,) = lines.records
    assert record.status == 401
    assert "token" not in str(vars(record))


async def test_probes_are_not_logged(served: Any, lines: Lines) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/metrics"):
        await served.ask(path)

    assert lines.records == []


@pytest.mark.parametrize(
    "given", ["two words", "x" * 129, "a%0d%0ab", '"', "\x1b[31m", "é", "x\tevent=ended"]
)
async def test_clients_write_nothing_into_the_log(served: Any, lines: Lines, given: str) -> None:
    answer = await served.ask(f"/v2/models/a%0A{len(given)}%1B[31m", X_Request_ID=given)

    (record,) = lines.records
    assert record.request_id == answer.headers["X-Request-ID"]
    assert len(record.request_id) == 32
    assert record.model is None
    assert lines.text.isprintable()
    assert given not in lines.text


async def test_a_request_without_a_client_is_logged(served: Any, lines: Lines) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    host = served.url.removeprefix("http://").encode()
    writer.write(
        b"POST /v2/models/trunk/infer HTTP/1.1\r\nHost: "
        + host
        + b"\r\nContent-Length: 9\r\n\r\nabc"
    )
    await writer.drain()
    writer.close()
    await reader.read()

    async with asyncio.timeout(30):
        while not lines.records:  # noqa: ASYNC110 - the other side of a socket has no event
            await asyncio.sleep(0.001)
    (record,) = lines.records
    assert (record.status, record.bytes_in, record.bytes_out) == (499, 3, 0)


async def test_a_session_is_two_lines(served: Any, lines: Lines) -> None:
    hidden = tensor_to_wire(TensorName.HIDDEN_STATES, torch.ones(1, 2, 4))
    headers = {"X-Request-ID": "req-2"}
    sent, received = 0, 0
    async with connect(
        served.sessions_url(), subprotocols=[SUBPROTOCOL], additional_headers=headers
    ) as client:  # type: ignore[var-annotated]
        await client.send(encode(Frame(Kind.OPEN, 1)))
        session = decode(await client.recv(decode=False)).session
        for position in (0, 2):
            message = encode(Frame(Kind.STEP, 2, session, position, tensors=(hidden,)))
            await client.send(message)
            sent, received = sent + len(message), received + len(await client.recv(decode=False))
        message = encode(Frame(Kind.CLOSE, 3, session))
        await client.send(message)
        await client.recv()
        sent += len(message)
    await served.stop()

    opened, ended, connection = lines.records
    assert [record.event for record in lines.records] == [
        "session_opened",
        "session_ended",
        "request",
    ]
    assert {record.request_id for record in lines.records} == {"req-2"}
    assert {record.peer for record in lines.records} == {connection.peer}
    assert (opened.model, opened.session) == ("trunk", f"{session:#010x}")
    assert (ended.reason, ended.steps, ended.tokens) == ("closed", 2, 4)
    assert (ended.bytes_in, ended.bytes_out) == (sent, received)
    assert (connection.status, connection.route) == (101, "/v2/models/{model}/sessions")
    assert connection.bytes_in > sent
    assert connection.bytes_out > received
    assert f"session ended model=trunk session={session:#010x} reason=closed steps=2" in lines.text


async def test_it_is_off_by_default(serve: Any, lines: Lines) -> None:
    served = await serve("trunk")

    await served.ask("/v2")

    assert lines.records == []


async def test_what_goes_wrong_is_logged_under_the_id_of_its_request(
    served: Any,
    manager: AsyncModelManager,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(manager, "list_models", fail)
    caplog.handler.addFilter(RequestIdFilter())

    answer = await served.ask("/v2/repository/index", "POST", X_Request_ID="req-3")

    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert answer.status == 500
    assert answer.json == {"error": "internal error; the log has it as request req-3"}
    assert any(record.exc_info for record in errors)
    assert [getattr(record, "request_id", None) for record in errors] == ["req-3"] * len(errors)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Put what `configure_logging` changes back as it was."""
    loggers = [logging.getLogger(name) for name in (None, ACCESS_LOG, "uvicorn.error")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("own_logging")
async def test_no_log_shows_what_a_client_keeps_secret(
    serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("debug", access_log=True)
    served = await serve("trunk", access_log=True)
    headers = {"Authorization": "Bearer sesame"}
    quiet = logging.getLogger("quiet")  # the test's client tells all that it sends
    quiet.setLevel(logging.CRITICAL)

    await served.ask("/v2/models/trunk?token=sesame", **headers)
    async with connect(
        served.sessions_url() + "?token=sesame",
        subprotocols=[SUBPROTOCOL],
        additional_headers=headers,
        logger=quiet,
    ):
        pass
    await served.stop()

    shown = capsys.readouterr().err
    assert "GET /v2/models/{model}/sessions 101" in shown
    assert "sesame" not in shown


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(("on", "shown"), [(True, 1), (False, 0)])
def test_it_is_written_at_whatever_level(
    capsys: pytest.CaptureFixture[str], on: bool, shown: int
) -> None:
    configure_logging("warning", access_log=on)
    logging.getLogger(ACCESS_LOG).info("GET /v2 200")

    assert capsys.readouterr().err.count("GET /v2 200") == shown
