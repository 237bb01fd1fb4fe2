from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from splitlearn_manager.config import DaemonConfig, ManagerLimits, ModelConfig, ServerConfig
from splitlearn_manager.config.environment import environment_settings, merge
from splitlearn_manager.config.secrets import read_token
from splitlearn_manager.config.units import format_bytes, parse_bytes
from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
server:
  port: 9000
manager:
  max_models: 2
  memory_limit: 4GiB
models:
- model_id: trunk
  model_path: builtin:demo
  config:
    split_points: [2, 6]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "daemon.yaml"


def read(file: Path, **environ: str) -> DaemonConfig:
    """Read a daemon's YAML with no environment but what is given."""
    return DaemonConfig.from_yaml(file, environ=environ)


def refused(file: Path, text: str, **environ: str) -> str:
    """Return the error that a YAML ends in."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(file, **environ)
    return str(caught.value)


def test_a_daemon_is_read(file: Path) -> None:
    file.write_text(GOOD)

    assert read(file) == DaemonConfig(
        ServerConfig(port=9000),
        ManagerLimits(max_models=2, memory_limit=4 << 30),
        (ModelConfig("trunk", "builtin:demo", config={"split_points": [2, 6]}),),
    )


def test_sections_may_be_absent_or_empty(file: Path) -> None:
    file.write_text("server:\nmanager:\nmodels:\n")

    assert read(file) == DaemonConfig() == DaemonConfig.from_dict({})


def test_a_daemon_is_the_same_after_to_dict_and_back(file: Path) -> None:
    file.write_text(GOOD)

    assert DaemonConfig.from_dict(read(file).to_dict()) == read(file)


def test_every_problem_of_a_file_is_told_with_line_and_key(file: Path) -> None:
    error = refused(
        file,
        "server:\n  port: '9000'\n  hots: x\nmodels:\n- model_id: a\n"
        "- model_id: b\n  model_path: p\n  config: {component: trunk}\nmodel: 1\n",
    )

    assert error.splitlines() == [
        f"{file}:9: model: unknown key; did you mean 'models'? Known are manager, models, server",
        f"{file}:2: server.port: should be a valid integer, found '9000' (str)",
        (
            f"{file}:3: server.hots: unknown key; did you mean 'host'? Known are"
            " access_log, drain_timeout, host, log_format, log_level, management, max_batch_size,"
            " max_cache_bytes, max_cache_bytes_per_client, max_frame_bytes, max_infer_per_client,"
            " max_positions, max_positions_per_client, max_queue_size, max_sessions,"
            " max_sessions_per_client, port, prefill_chunk_size, session_idle_timeout,"
            " session_resume_timeout, threads, tls_cert_file, tls_key_file, token_env, token_file,"
            " tokens, tracing"
        ),
        f"{file}:5: models[0].model_path: is missing",
        (
            f"{file}:8: models[1].config.component: needs split_points, as in [8, 24],"
            " found 'trunk' (str)"
        ),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: [1]", "server: must be a mapping (key: value), found [1] (list)"),
        ("models: {a: 1}", "models: must be a list of models, found {'a': 1} (dict)"),
        ("models: [a]", "models[0]: must be a mapping (key: value), found 'a' (str)"),
        ("models: [null]", "models[0].model_id: is missing"),
        ("server: {port: 70000}", "server.port: should be less than or equal to 65535, found 7"),
        ("server: {port: true}", "server.port: should be a valid integer, found True (bool)"),
        ("server: {drain_timeout: -1}", "server.drain_timeout: must be a number of seconds, 0 or"),
        ("server: {drain_timeout: .nan}", "found nan (float)"),
        ("server: {log_level: loud}", "server.log_level: must be one of debug, info, warning"),
        ("server: {tokens: x}", "server.tokens: must be a list of clients, each with a name and a"),
        (
            "server: {tokens: [x]}",
            "server.tokens[0]: must be a client, with name and token_file or",
        ),
        ("server: {tokens: [{name: a}]}", "server.tokens[0].name: a client has token_file or"),
        ("server: {tokens: [{token_env: A}]}", "server.tokens[0].name: is missing"),
        (
            "server: {tokens: [{name: a, token_env: A}, {name: a, token_env: B}]}",
            "server.tokens[1].name: stands here twice, found 'a' (str)",
        ),
        (
            "server: {tokens: [{name: a b, token_env: A}]}",
            "server.tokens[0].name: must be 1 to 128",
        ),
        (
            "server: {tokens: [{name: a, token_env: A, max_sessions: 0}]}",
            "server.tokens[0].max_sessions: should be greater than or equal to 1",
        ),
        ("server: {max_cache_bytes: 0}", "server.max_cache_bytes: should be greater than or"),
        ("server: {tls_cert_file: a}", "server.tls_key_file: is missing: TLS takes both"),
        ("server: {tls_key_file: a}", "server.tls_cert_file: is missing: TLS takes both"),
        ("server: {max_sessions: 0}", "server.max_sessions: should be greater than or equal to 1"),
        ("server: {threads: 9999999999}", "server.threads: should be less than or equal to 1024"),
        ("server: {max_frame_bytes: 1KB}", "server.max_frame_bytes: should be greater than or"),
        ("manager: {memory_limit: much}", "manager.memory_limit: must be a number of bytes, or a"),
        ("manager: {max_memory_percent: 101}", "should be less than or equal to 100, found 101"),
        ("server: {host: 0.0.0.0}", "server.host: listening beyond loopback needs a token"),
        ("server: {token_file: a, token_env: B}", "server.token_env: give token_file or token_env"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(file: Path, text: str, message: str) -> None:
    error = refused(file, text)

    assert error.startswith(f"{file}:1: ")
    assert message in error


def test_two_models_can_not_have_one_id(file: Path) -> None:
    model = "- model_id: a\n  model_path: p\n"

    assert refused(file, f"models:\n{model}{model}") == (
        f"{file}:4: models[1].model_id: stands here twice, found 'a' (str)"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert ServerConfig.from_dict({"host": host}).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])  # noqa: S104
def test_any_other_address_is_fine_with_a_token(host: str) -> None:
    assert not ServerConfig.from_dict({"host": host, "token_env": "TOKEN"}).is_loopback


def test_a_section_can_have_a_file_of_its_own(file: Path) -> None:
    file.write_text("port: 0\nlog_level: DEBUG\n")
    assert ServerConfig.from_yaml(file) == ServerConfig(port=0, log_level="debug")

    file.write_text("host: 0.0.0.0\n")
    with pytest.raises(ConfigError, match=r"daemon\.yaml:1: host: listening beyond loopback"):
        ServerConfig.from_yaml(file)


def test_command_line_over_environment_over_file_over_default(file: Path) -> None:
    file.write_text("server: {port: 1, threads: 2, max_sessions: 3}")

    config = DaemonConfig.from_yaml(
        file,
        environ={"SPLITLEARN_SERVER_THREADS": "20", "SPLITLEARN_SERVER_MAX_SESSIONS": "30"},
        overrides={"server": {"max_sessions": 300}},
    )

    assert config.server == ServerConfig(port=1, threads=20, max_sessions=300)


def test_environment_texts_are_read_as_the_settings_types(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    settings = environment_settings(
        {
            "SPLITLEARN_SERVER_PORT": "0",
            "SPLITLEARN_SERVER_MANAGEMENT": "true",
            "SPLITLEARN_SERVER_DRAIN_TIMEOUT": "2.5",
            "SPLITLEARN_SERVER_TOKEN_ENV": "123",
            "SPLITLEARN_MANAGER_MEMORY_LIMIT": "1 MiB",
            "SPLITLEARN_CACHE_DIR": "elsewhere",
            "PATH": "/bin",
        }
    )

    assert settings == {
        "server": {"port": 0, "management": True, "drain_timeout": 2.5, "token_env": "123"},
        "manager": {"memory_limit": 1 << 20},
    }
    assert "server.management is set by the environment (SPLITLEARN_SERVER_MANAGEMENT)" in (
        caplog.messages
    )


def test_the_process_environment_is_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(GOOD)
    monkeypatch.setenv("SPLITLEARN_SERVER_PORT", "9001")

    assert DaemonConfig.from_yaml(file).server.port == 9001


def test_a_wrong_variable_is_named(file: Path) -> None:
    error = refused(file, GOOD, SPLITLEARN_SERVER_PORT="x", SPLITLEARN_SERVER_HOTS="y")

    assert error.splitlines()[0].startswith(
        "SPLITLEARN_SERVER_HOTS: unknown key; did you mean 'host'?"
    )
    assert error.splitlines()[1].startswith("SPLITLEARN_SERVER_PORT: should be a valid integer")


def test_a_problem_names_the_layer_that_its_value_came_from(file: Path) -> None:
    error = refused(file, GOOD, SPLITLEARN_SERVER_HOST="0.0.0.0")  # noqa: S104
    assert error.startswith("SPLITLEARN_SERVER_HOST: server.host: listening beyond loopback")

    with pytest.raises(ConfigError, match=r"^command line: server\.port: should be a valid int"):
        DaemonConfig.from_yaml(file, environ={}, overrides={"server": {"port": "x"}})


def test_an_override_does_not_hide_a_section_that_is_no_mapping(file: Path) -> None:
    error = refused(file, "server: [1]", SPLITLEARN_SERVER_PORT="1")

    assert "server: must be a mapping" in error


def test_merge_goes_section_by_section_and_changes_neither() -> None:
    base, over = {"a": {"x": 1, "y": 2}, "b": None}, {"a": {"y": 3}, "b": {"z": 4}}

    assert merge(base, over) == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}
    assert base == {"a": {"x": 1, "y": 2}, "b": None}


def test_a_token_comes_from_a_file_or_a_variable(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("abc\n")
    secret.chmod(0o600)

    assert read_token(str(secret), None) == "abc"
    assert read_token(None, "T", {"T": "def"}) == "def"
    assert read_token(None, None) is None
    assert ServerConfig(token_file=str(secret)).read_token() == "abc"


@pytest.mark.parametrize("content", ["", "\n", "two words", "tokén", "a\x00b"])
def test_a_token_is_one_printable_word_and_never_shown(tmp_path: Path, content: str) -> None:
    secret = tmp_path / "token"
    secret.write_text(content)

    with pytest.raises(ConfigError) as caught:
        read_token(str(secret), None)

    assert str(caught.value) == (
        f"token_file: the file {secret} must hold one token of printable ASCII"
    )


def test_a_token_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_env: the environment variable T must hold one"):
        read_token(None, "T", {})
    with pytest.raises(ConfigError, match=r"token_file: cannot read .*: No such file"):
        read_token(str(tmp_path / "nowhere"), None)


def test_a_token_that_others_can_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "token"
    secret.write_text("abc")
    secret.chmod(0o644)

    read_token(str(secret), None)

    assert caplog.messages == [f"other users can read the token in {secret}; chmod 600 it"]


@pytest.mark.parametrize(
    ("text", "count"),
    [(0, 0), (5, 5), ("7", 7), ("1KB", 1000), ("1 KiB", 1024), ("0.5gib", 1 << 29), ("2T", None)],
)
def test_sizes_are_parsed(text: int | str, count: int | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match="must be a number of bytes"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == count


@pytest.mark.parametrize("bad", [-1, 1.5, True, "-1", "1 e3", "", "\u0661"])
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="must be a number of bytes"):
        parse_bytes(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "text"),
    [(640, "640 bytes"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 42, "12.0 TiB")],
)
def test_sizes_are_shown(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_configurations_do_not_import_torch(file: Path) -> None:
    file.write_text(GOOD)
    program = (
        "import sys; from splitlearn_manager.config import DaemonConfig;"
        "from splitlearn_manager import ModelConfig, ServerConfig, ModelStatus;"
        f"DaemonConfig.from_yaml({str(file)!r});"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", program], check=False)

    assert done.returncode == 0
