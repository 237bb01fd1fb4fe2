"""`splitlearn bench generate`: a small real run, and the proxy that it measures through."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from splitlearn_manager.bench.delaying_proxy import DelayingProxy
from splitlearn_manager.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_a_quick_run_has_its_rows_and_no_target(tmp_path: Path) -> None:
    wanted = [f"--rows={row}" for row in ("parts", "loopback", "delayed")]
    result = CliRunner().invoke(
        app, ["bench", "generate", "--quick", "--json", "--work-dir", str(tmp_path), *wanted]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["unit"] for row in rows[:4]] == ["x", "x", "x", "bytes"]
    assert 512 < rows[3]["value"] <= 512 + 128  # two hidden states, and what goes around them
    assert "the same tokens" in rows[0]["note"]
    assert "not the same" not in rows[0]["note"]
    assert all(row["target"] is None for row in rows)
    assert rows[-1]["value"] < 1.05  # nobody is faster than light


def test_the_proxy_delays_and_counts_and_names_the_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        received: list[bytes] = []

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                received.append(connection.recv(1000))
                connection.sendall(b"yes")

        thread = threading.Thread(target=answer)
        thread.start()
        with DelayingProxy(host, port, 0.1) as proxy:
            near = proxy.url.removeprefix("http://")
            with socket.create_connection(("127.0.0.1", int(near.split(":")[1]))) as client:
                start = time.monotonic()
                client.sendall(f"Host: {near}".encode())
                assert client.recv(10) == b"yes"
                took = time.monotonic() - start
        thread.join()

    assert received == [f"Host: {host}:{port}".encode()]
    assert took >= 0.1
    assert proxy.bytes_passed == len(f"Host: {near}") + 3


def test_a_quick_run_of_a_gateway_has_its_row(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["bench", "generate", "--quick", "--json", "--work-dir", str(tmp_path), "--rows=gateway"],
    )

    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert "3 requests at a home gateway" in row["name"]
    assert (row["unit"], row["target"]) == ("x", None)
    assert row["value"] > 0
