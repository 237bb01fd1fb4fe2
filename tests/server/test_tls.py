"""TLS with certificates that are made on the spot, by `openssl`."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from joining import load_ends
from serving_fakes import OnePart, daemon_in_thread, trunk_config

from splitlearn_core import SplitModel
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteUnavailable
from splitlearn_manager.client.trunks import reach_all
from splitlearn_manager.config import DaemonConfig, PipelineOptions
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.server.tls import server_context

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@dataclass(frozen=True)
class Certificate:
    """A certificate that signs itself, for 127.0.0.1."""

    cert: str
    key: str


def made(folder: Path, name: str, address: str = "127.0.0.1", *options: str) -> Certificate:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-days", "2", "-subj", "/CN=splitlearn", "-addext", f"subjectAltName=IP:{address}"),
            *("-keyout", str(key), "-out", str(cert), *(options or ("-nodes",))),
        ],
        check=True,
        capture_output=True,
    )
    return Certificate(str(cert), str(key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Certificate:
    return made(folder, "ours")


@pytest.fixture(scope="module")
def other(folder: Path) -> Certificate:
    return made(folder, "other")


@pytest.fixture(scope="module")
def part() -> SplitModel:
    return load_ends("llama")[1]


@pytest.fixture(scope="module")
def daemon(part: SplitModel, ours: Certificate) -> Iterator[Daemon]:
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    server = ServerConfig(port=0, tls_cert_file=ours.cert, tls_key_file=ours.key)
    config = DaemonConfig(server=server, models=(trunk_config("trunk"),))
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon


def test_sessions_over_wss_are_exact(daemon: Daemon, part: SplitModel, ours: Certificate) -> None:
    given = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with (
        RemoteTrunk(daemon.url, "trunk", ca_file=ours.cert) as trunk,
        torch.inference_mode(),
    ):
        found = trunk(given, past_key_values=trunk.new_cache())

        assert daemon.url.startswith("https://127.0.0.1:")
        assert torch.equal(found, part(given))


def test_a_long_step_goes_both_ways(daemon: Daemon, part: SplitModel, ours: Certificate) -> None:
    given = torch.randn(200, 100, 64, generator=torch.Generator().manual_seed(0))
    with RemoteTrunk(daemon.url, "trunk", ca_file=ours.cert) as trunk, torch.inference_mode():
        assert torch.equal(trunk(given), part(given))


def test_requests_over_https(daemon: Daemon, ours: Certificate) -> None:
    address = Address.parse(daemon.url, ca_file=ours.cert)

    assert address.get_json("/v2", 30)["name"] == "splitlearn"


def test_the_environment_can_say_whom_to_trust(
    daemon: Daemon, ours: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every program that uses OpenSSL; the commands have no option of their own."""
    monkeypatch.setenv("SSL_CERT_FILE", ours.cert)

    assert Address.parse(daemon.url).get_json("/v2", 30)["name"] == "splitlearn"


def test_a_pipeline_says_whom_to_trust(daemon: Daemon, ours: Certificate) -> None:
    options = PipelineOptions((1, 3), trunk=(daemon.url,), ca_file=ours.cert)

    (trunk,) = reach_all(options.links, None, options.ca_file)
    with trunk:
        assert trunk.component == "trunk"
    with pytest.raises(RemoteUnavailable, match=r"(?i:certificate)"):
        reach_all(options.links, None, None)


def test_a_server_that_nobody_vouches_for_is_refused(daemon: Daemon, other: Certificate) -> None:
    for ca_file in (None, other.cert):
        trunk = RemoteTrunk(daemon.url, "trunk", ca_file=ca_file)
        with trunk, pytest.raises(RemoteUnavailable, match=r"cannot reach https.*(?i:certificate)"):
            trunk.component  # noqa: B018


def test_a_session_makes_sure_of_the_server_too(daemon: Daemon, other: Certificate) -> None:
    """What the part is may be known; the socket of the sessions is another one."""
    connection = RemoteTrunk(daemon.url, "trunk", ca_file=other.cert)._connection
    with pytest.raises(RemoteUnavailable, match=r"(?i:certificate)"):
        connection.open_session()


def test_a_name_that_the_certificate_has_not_is_refused(daemon: Daemon, ours: Certificate) -> None:
    url = daemon.url.replace("127.0.0.1", "localhost")
    with (
        RemoteTrunk(url, "trunk", ca_file=ours.cert) as trunk,
        pytest.raises(RemoteUnavailable, match=r"(?i:certificate)"),
    ):
        trunk.component  # noqa: B018


def test_plain_http_gets_nothing(daemon: Daemon) -> None:
    address = Address.parse(daemon.url.replace("https", "http"))
    with pytest.raises(RemoteUnavailable):
        address.get_json("/v2", 30)


def test_old_versions_of_tls_are_refused(daemon: Daemon) -> None:
    parts = urlsplit(daemon.url)
    assert parts.hostname is not None
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((parts.hostname, parts.port or 0), 30) as sock,
        pytest.raises(OSError, match=r"(?i)ssl|reset|closed"),
    ):
        old.wrap_socket(sock)


def test_what_is_no_certificate_is_named(
    folder: Path, ours: Certificate, other: Certificate
) -> None:
    locked = made(folder, "locked", "127.0.0.1", "-passout", "pass:secret")
    (folder / "empty").write_text("")
    cases = [
        (str(folder / "nothing"), ours.key, r"tls_cert_file: cannot read .*nothing: No such file"),
        (ours.cert, str(folder / "nothing"), r"tls_key_file: cannot read .*nothing: No such file"),
        (ours.cert, other.key, "no certificate in .* with its key in .*other.key: KEY_VALUES_MIS"),
        (str(folder / "empty"), ours.key, "no certificate in .*empty"),
        (locked.cert, locked.key, "the key has a password"),
    ]
    for cert, key, message in cases:
        with pytest.raises(ConfigError, match=message):
            server_context(cert, key)


def test_what_a_client_can_not_use_is_named(folder: Path, ours: Certificate) -> None:
    (folder / "empty").write_text("")

    with pytest.raises(ValueError, match="is not https, and has no use for the ca_file"):
        RemoteTrunk("http://host", "trunk", ca_file=ours.cert)
    for name in ("nothing", "empty"):
        with pytest.raises(ValueError, match="no certificates can be read from"):
            RemoteTrunk("https://host", "trunk", ca_file=folder / name)
