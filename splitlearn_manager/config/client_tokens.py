"""Clients that have bearer tokens of their own, and what each may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from splitlearn_manager.config.fields import ByteCount, ModelId, PathText, Text
from splitlearn_manager.config.secrets import read_token
from splitlearn_manager.config.section import Findings, build, found, section
from splitlearn_manager.errors import ConfigError, Problem


@section
class ClientToken:
    """One client.

    Attributes:
        name: What messages call it; of the form of a model's id.
        token_file: File with its token.
        token_env: Environment variable with it, instead.
        max_sessions: Most sessions that it may hold, instead of `max_sessions_per_client`.
        max_positions: Most positions, instead of `max_positions_per_client`.
        max_cache_bytes: Most bytes of its caches, instead of `max_cache_bytes_per_client`.
        max_infer: Most inference requests at once, instead of `max_infer_per_client`.
    """

    name: ModelId
    token_file: PathText | None = None
    token_env: Text | None = None
    max_sessions: Annotated[int, Field(ge=1)] | None = None
    max_positions: Annotated[int, Field(ge=1)] | None = None
    max_cache_bytes: Annotated[ByteCount, Field(ge=1)] | None = None
    max_infer: Annotated[int, Field(ge=1)] | None = None


def _clients(value: Any) -> Any:
    """Return the clients of a list, whose names must differ."""
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"must be a list of clients, each with a name and a token, {found(value)}"
        )
    findings = Findings()
    clients: dict[str, ClientToken] = {}
    for number, item in enumerate(value):
        with findings.at(number):
            client = item if isinstance(item, ClientToken) else _client(item)
            if client.name in clients:
                raise ConfigError(Problem(f"stands here twice, {found(client.name)}", ("name",)))
            clients[client.name] = client
    findings.raise_if_any()
    return tuple(clients.values())


def _client(item: Any) -> ClientToken:
    """Return a client that has one source for its token."""
    if not isinstance(item, Mapping):
        raise ConfigError(f"must be a client, with name and token_file or token_env, {found(item)}")
    client = build(ClientToken, item)
    if (client.token_file is None) == (client.token_env is None):
        raise ConfigError(Problem("a client has token_file or token_env", ("name",)))
    return client


ClientTokens = Annotated[tuple[ClientToken, ...], BeforeValidator(_clients)]


def read_tokens(clients: tuple[ClientToken, ...]) -> dict[str, str]:
    """Return the clients' tokens by their names.

    Raises:
        ConfigError: One is not there, or two are the same.
    """
    tokens: dict[str, str] = {}
    for number, client in enumerate(clients):
        try:
            token = read_token(client.token_file, client.token_env)
        except ConfigError as error:
            raise error.within("server", "tokens", number) from None
        same = [name for name, known in tokens.items() if known == token]
        if same:
            message = f"{client.name!r} has the same token as {same[0]!r}"
            raise ConfigError(Problem(message, ("server", "tokens", number)))
        tokens[client.name] = token or ""
    return tokens
