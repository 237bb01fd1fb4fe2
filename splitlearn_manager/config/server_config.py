"""`ServerConfig` and `ManagerLimits`: the sections `server:` and `manager:` of a daemon's YAML."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from splitlearn_manager.config.fields import ByteCount, LogLevel, PathText, Seconds, Text
from splitlearn_manager.config.secrets import check_token_source, read_token
from splitlearn_manager.config.section import build, found, section
from splitlearn_manager.config.yaml_file import read_file
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    import os

Count = Annotated[int, Field(ge=1)]


@section
class ServerConfig:
    """How the daemon listens, and what it grants.

    Attributes:
        host: Address to listen on.  Any but loopback needs a token.
        port: Port to listen on; 0 takes any free one.
        drain_timeout: Seconds that SIGTERM gives to what is in flight.
        management: Whether models can be loaded and unloaded over the network.
        max_sessions: Most sessions, and so KV caches, at once.
        session_idle_timeout: Seconds after which a session without a step is closed.
        session_resume_timeout: Seconds that a session waits for a client whose connection was lost,
            if that client asked for it; 0 for none.
        max_batch_size: Most rows of one forward that sessions of a model share; 1 runs each step by
            itself, equal to the bit to the same forward elsewhere.
        prefill_chunk_size: Most positions of a prompt in one forward, where sessions share.
        max_queue_size: Most inference requests of one model at once, from the first byte of the
            body to the last of the answer; one more is refused with 429 and `Retry-After`.
        max_frame_bytes: Longest message, or body of a request, that is read from a client.
        log_level: `debug`, `info`, `warning`, `error` or `critical`.
        log_format: `text` for people, `json` for one object per line.
        access_log: Whether each request and each session is logged.
        tracing: Whether OpenTelemetry traces are made; the standard `OTEL_` variables say where
            they go, and can also switch them on.
        token_file: File with the bearer token that clients must send.
        token_env: Environment variable with that token; don't begin its name with
            `SPLITLEARN_SERVER_`, which is for the settings themselves.
        threads: torch's threads for one operation, for the whole process; 1024 at most.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    drain_timeout: Seconds = 20.0
    management: bool = False
    max_sessions: Count = 64
    session_idle_timeout: Seconds = 300.0
    session_resume_timeout: Seconds = 30.0
    max_batch_size: Count = 64
    prefill_chunk_size: Annotated[int, Field(ge=16)] = 512
    max_queue_size: Count = 64
    max_frame_bytes: Annotated[ByteCount, Field(ge=1024)] = 64 << 20
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False
    tracing: bool = False
    token_file: PathText | None = None
    token_env: Text | None = None
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
            ConfigError: Two sources for the token, or none where the network can reach the port.
        """
        check_token_source(self.token_file, self.token_env)
        if not self.is_loopback and self.token_file is None and self.token_env is None:
            message = "listening beyond loopback needs a token: set token_file or token_env"
            raise ConfigError(Problem(f"{message}, {found(self.host)}", ("host",)))

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
