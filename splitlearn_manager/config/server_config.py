"""`ServerConfig` and `ManagerLimits`: the sections `server:` and `manager:` of a daemon's YAML."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from splitlearn_manager.config.client_tokens import ClientTokens, read_tokens
from splitlearn_manager.config.fields import ByteCount, LogLevel, PathText, Seconds, Text
from splitlearn_manager.config.secrets import check_token_source, read_token
from splitlearn_manager.config.section import build, found, section
from splitlearn_manager.config.yaml_file import read_file
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    import os

Count = Annotated[int, Field(ge=1)]
PositiveBytes = Annotated[ByteCount, Field(ge=1)]


@section
class ServerConfig:
    """How the daemon listens, and what it grants.

    Attributes:
        host: Address to listen on.  Any but loopback needs a token.
        port: Port to listen on; 0 takes any free one.
        drain_timeout: Seconds that SIGTERM gives to what is in flight.
        management: Whether models can be loaded and unloaded over the network.
        max_sessions: Most sessions, and so KV caches, at once.
        max_positions: Most positions in all rows of all caches; `None` for as many as there is
            memory for.
        max_cache_bytes: Most bytes of all caches, as a number or `4GiB`; `None` likewise.
        max_sessions_per_client: Most sessions of one client: of who has a token of its own, and
            else of an address (a /64 of IPv6).  `None` for no limit but that of all.
        max_positions_per_client: Most positions of one client.
        max_cache_bytes_per_client: Most bytes of the caches of one client.
        session_idle_timeout: Seconds after which a session without a step is closed.
        session_resume_timeout: Seconds that a session waits for a client whose connection was lost,
            if that client asked for it; 0 for none.
        max_batch_size: Most rows of one forward that sessions of a model share; 1 runs each step by
            itself, equal to the bit to the same forward elsewhere.
        prefill_chunk_size: Most positions of a prompt in one forward, where sessions share.
        max_queue_size: Most inference requests of one model at once, from the first byte of the
            body to the last of the answer; one more is refused with 429 and `Retry-After`.
        max_infer_per_client: Most of them of one client, to all models; `None` for no limit but
            that of each model.
        max_frame_bytes: Longest message, or body of a request, that is read from a client.
        log_level: `debug`, `info`, `warning`, `error` or `critical`.
        log_format: `text` for people, `json` for one object per line.
        access_log: Whether each request and each session is logged.
        tracing: Whether OpenTelemetry traces are made; the standard `OTEL_` variables say where
            they go, and can also switch them on.
        token_file: File with the bearer token that clients must send.
        token_env: Environment variable with that token; don't begin its name with
            `SPLITLEARN_SERVER_`, which is for the settings themselves.
        tokens: Clients that have tokens of their own, which may also have their own limits.
        tls_cert_file: PEM file with the certificate, and those that it rests on; https and wss are
            then spoken, and nothing else.
        tls_key_file: PEM file with its key, which needs no password.
        threads: torch's threads for one operation, for the whole process; 1024 at most.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    drain_timeout: Seconds = 20.0
    management: bool = False
    max_sessions: Count = 64
    max_positions: Count | None = None
    max_cache_bytes: PositiveBytes | None = None
    max_sessions_per_client: Count | None = None
    max_positions_per_client: Count | None = None
    max_cache_bytes_per_client: PositiveBytes | None = None
    session_idle_timeout: Seconds = 300.0
    session_resume_timeout: Seconds = 30.0
    max_batch_size: Count = 64
    prefill_chunk_size: Annotated[int, Field(ge=16)] = 512
    max_queue_size: Count = 64
    max_infer_per_client: Count | None = None
    max_frame_bytes: Annotated[ByteCount, Field(ge=1024)] = 64 << 20
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False
    tracing: bool = False
    token_file: PathText | None = None
    token_env: Text | None = None
    tokens: ClientTokens = ()
    tls_cert_file: PathText | None = None
    tls_key_file: PathText | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] = 1

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate a file that holds this section's keys alone.

        Raises:
            ConfigError: Names file, line, key, what was found and what was expected.
        """
        return read_file(path, cls.from_dict)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the validated section that a mapping holds.

        Raises:
            ConfigError: It is no mapping, or not a valid section.
        """
        config = build(cls, data)
        config.validate()
        return config

    def validate(self) -> None:
        """Check what the single values do not show.

        Raises:
            ConfigError: Two sources for the token, or none where the network can reach the port;
                or a certificate without its key.
        """
        check_token_source(self.token_file, self.token_env)
        if not self.is_loopback and not self.asks_for_token:
            message = "listening beyond loopback needs a token: set token_file, token_env or tokens"
            raise ConfigError(Problem(f"{message}, {found(self.host)}", ("host",)))
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            missing = "tls_key_file" if self.tls_key_file is None else "tls_cert_file"
            message = "is missing: TLS takes both tls_cert_file and tls_key_file"
            raise ConfigError(Problem(message, (missing,)))

    @property
    def asks_for_token(self) -> bool:
        """Whether who has no token is refused."""
        return bool(self.token_file or self.token_env or self.tokens)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def read_token(self) -> str | None:
        """Return the bearer token, or `None` where none is asked for.

        Raises:
            ConfigError: The token is named, but not there.
        """
        return read_token(self.token_file, self.token_env)

    def read_client_tokens(self) -> dict[str, str]:
        """Return the tokens of clients that have their own, by their names.

        Raises:
            ConfigError: One is named, but not there, or two clients have the same.
        """
        return read_tokens(self.tokens)


@section
class ManagerLimits:
    """What the manager may hold.

    Attributes:
        max_models: Most models at once, those being loaded or unloaded included.
        max_workers: Most loads at once; more wait their turn.
        max_memory_percent: Share of the machine's (or container's) memory for models.
        memory_limit: Bytes for models on the CPU, as a number or `4GiB`, instead of that share.
        eviction: Whether idle models are unloaded, the least recently used first, when a load needs
            their place or their memory; never one that is in use or pinned.
        load_attempts: How often a load is tried, where a hub or a network does not answer.
        load_stall_timeout: Seconds without any progress after which a load is given up.
        memory_wait: Seconds for which a load waits for memory that is being given back.
    """

    max_models: Count = 5
    max_workers: Count = 4
    max_memory_percent: Annotated[float, Field(gt=0, le=100)] = 80.0
    memory_limit: ByteCount | None = None
    eviction: bool = False
    load_attempts: Count = 3
    load_stall_timeout: Annotated[Seconds, Field(gt=0)] = 300.0
    memory_wait: Seconds = 300.0
