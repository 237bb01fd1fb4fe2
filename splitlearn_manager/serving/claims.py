"""What clients hold here: sessions, positions and bytes of cache, each client's and all of them.

A client is who has a token of its own (`server.tokens`), and else the address that a connection
comes from.  What a session may come to take is claimed before it takes it; what is claimed is
given back when the session ends, whatever ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.serving.errors import ClientLimitError, NoMemoryError

if TYPE_CHECKING:
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.serving.cache_memory import CacheMemory
    from splitlearn_manager.serving.step import State


@dataclass(frozen=True, slots=True)
class Quota:
    """Most that may be held at once; `None` is no limit.

    Attributes:
        sessions: KV caches.
        positions: Positions of all rows of all caches, as many as were asked for or are filled.
        cache_bytes: Bytes of memory for them.
    """

    sessions: int | None = None
    positions: int | None = None
    cache_bytes: int | None = None

    def over(self, other: Quota) -> Quota:
        """Return this quota, with another one's limits where this has none."""
        mine, theirs = ((q.sessions, q.positions, q.cache_bytes) for q in (self, other))
        return Quota(*(a if a is not None else b for a, b in zip(mine, theirs, strict=True)))


@dataclass(frozen=True)
class Quotas:
    """Who may hold how much.

    Attributes:
        everyone: All clients together.
        each: A client.
        named: Clients that have tokens of their own, where theirs differs.
    """

    everyone: Quota = field(default_factory=Quota)
    each: Quota = field(default_factory=Quota)
    named: Mapping[str, Quota] = field(default_factory=dict)

    def of(self, client: str) -> Quota:
        """Return a client's quota."""
        own = self.named.get(client)
        return self.each if own is None else own.over(self.each)


@dataclass(slots=True)
class _Account:
    """What somebody holds."""

    quota: Quota
    sessions: int = 0
    positions: int = 0
    cache_bytes: int = 0

    def excess(self, sessions: int, positions: int, cache_bytes: int) -> str:
        """Return what would be too much, with every figure; nothing where nothing would be."""
        quota = self.quota
        if sessions and _beyond(quota.sessions, self.sessions + sessions):
            return f"{self.sessions} sessions are open, and {quota.sessions} may be"
        if positions and _beyond(quota.positions, self.positions + positions):
            return (
                f"{positions} positions more are wanted, {self.positions} are held in"
                f" {self.sessions} sessions, and {quota.positions} may be"
            )
        if cache_bytes and _beyond(quota.cache_bytes, self.cache_bytes + cache_bytes):
            most = format_bytes(quota.cache_bytes or 0)
            return (
                f"{format_bytes(cache_bytes)} of cache more are wanted,"
                f" {format_bytes(self.cache_bytes)} are held in {self.sessions} sessions,"
                f" and {most} may be"
            )
        return ""

    def add(self, sessions: int, positions: int, cache_bytes: int) -> None:
        self.sessions += sessions
        self.positions += positions
        self.cache_bytes += cache_bytes


class Claims:
    """The accounts of all clients, over the ledger of memory.

    Args:
        quotas: Who may hold how much.
        memory: Where bytes are reserved.
    """

    def __init__(self, quotas: Quotas, memory: CacheMemory) -> None:
        self._quotas = quotas
        self._memory = memory
        self._everyone = _Account(quotas.everyone)
        self._accounts: dict[str, _Account] = {}

    def __len__(self) -> int:
        """Return how many clients hold something."""
        return len(self._accounts)

    def reserved_on(self, device: str) -> int:
        """Return the bytes that caches have reserved on a device; may be called in any thread."""
        return self._memory.nbytes_on(device)

    def held(self, client: str | None = None) -> tuple[int, int, int]:
        """Return the sessions, positions and bytes that a client holds, or all of them."""
        account = self._everyone if client is None else self._accounts.get(client)
        if account is None:
            return (0, 0, 0)
        return (account.sessions, account.positions, account.cache_bytes)

    def check_session(self, client: str) -> None:
        """Raise if a client may not open a session now.

        Raises:
            ClientLimitError: It has as many as it may.
        """
        self._check(client, 1, 0, 0)

    def add_session(self, client: str) -> None:
        """Count a session more."""
        self._add(client, 1, 0, 0)

    def end_session(self, client: str, managed: AsyncManagedModel, state: State) -> None:
        """Count a session less, and give back what it had claimed."""
        self.lower(client, managed, state, 0, 0)
        self._add(client, -1, 0, 0)

    def raise_to(
        self,
        client: str,
        managed: AsyncManagedModel,
        state: State,
        positions: int,
        cache_bytes: int,
    ) -> None:
        """Claim so much for a session in all, where it has less.

        Args:
            client: Whose session it is.
            managed: The model that it is of.
            state: The session's; what is claimed is noted there.
            positions: Positions of all its rows.
            cache_bytes: Bytes that they take.

        Raises:
            ClientLimitError: The client would hold more than it may; nothing was claimed.
            NoMemoryError: All clients would, or there is no such memory; likewise.
        """
        positions = max(positions - state.positions, 0)
        cache_bytes = max(cache_bytes - state.reserved, 0)
        self._check(client, 0, positions, cache_bytes)
        self._memory.grow(managed, cache_bytes)
        self._note(client, state, positions, cache_bytes)

    def lower(
        self,
        client: str,
        managed: AsyncManagedModel,
        state: State,
        positions: int,
        cache_bytes: int,
    ) -> None:
        """Give back what a session has claimed beyond so much."""
        positions = min(positions - state.positions, 0)
        cache_bytes = min(cache_bytes - state.reserved, 0)
        self._memory.give_back(managed, -cache_bytes)
        self._note(client, state, positions, cache_bytes)

    def _check(self, client: str, sessions: int, positions: int, cache_bytes: int) -> None:
        account = self._accounts.get(client) or _Account(self._quotas.of(client))
        if excess := account.excess(sessions, positions, cache_bytes):
            raise ClientLimitError(f"of client {client}, {excess}")
        if excess := self._everyone.excess(sessions, positions, cache_bytes):
            raise NoMemoryError(f"of all clients, {excess}")

    def _note(self, client: str, state: State, positions: int, cache_bytes: int) -> None:
        state.positions += positions
        state.reserved += cache_bytes
        self._add(client, 0, positions, cache_bytes)

    def _add(self, client: str, sessions: int, positions: int, cache_bytes: int) -> None:
        account = self._accounts.setdefault(client, _Account(self._quotas.of(client)))
        for one in (account, self._everyone):
            one.add(sessions, positions, cache_bytes)
        if not (account.sessions or account.positions or account.cache_bytes):
            del self._accounts[client]


def _beyond(limit: int | None, wanted: int) -> bool:
    return limit is not None and wanted > limit
