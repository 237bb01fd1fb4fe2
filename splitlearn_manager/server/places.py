"""How many requests a model, and a client, may have at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitlearn_manager.serving.infer_errors import ClientBusyError, OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Shares:
    """Most requests that one client may have at once, to all models; `None` is no limit.

    Attributes:
        each: A client's.
        named: Those of clients that have tokens of their own, where theirs differ.
    """

    each: int | None = None
    named: Mapping[str, int | None] = field(default_factory=dict)

    def of(self, client: str) -> int | None:
        """Return a client's share."""
        own = self.named.get(client)
        return self.each if own is None else own


class Places:
    """Counts requests, by model and by client; one too many is refused at once, never made to wait.

    Args:
        most: Most requests of one model at once.
        shares: Most of one client.
    """

    def __init__(self, most: int, shares: Shares | None = None) -> None:
        self.most = most
        self.shares = shares or Shares()
        self._taken: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    def taken(self, model_id: str) -> int:
        """Return how many requests a model has."""
        return self._taken[model_id]

    def held(self, client: str) -> int:
        """Return how many requests a client has."""
        return self._held[client]

    @contextmanager
    def take(self, model_id: str, client: str) -> Iterator[None]:
        """Count a request of a client to a model, for as long as the block lasts.

        Raises:
            ClientBusyError: The client has as many as it may.
            OverloadedError: The model has as many as it may.
        """
        self._check(model_id, client)
        with _counted(self._held, client), _counted(self._taken, model_id):
            yield

    def _check(self, model_id: str, client: str) -> None:
        share, held = self.shares.of(client), self._held[client]
        if share is not None and held >= share:
            raise ClientBusyError(
                f"of client {client}, {held} inference requests are waiting or in flight already,"
                f" and {share} may be (server.max_infer_per_client, or its own max_infer); try"
                " again"
            )
        if self._taken[model_id] >= self.most:
            raise OverloadedError(
                f"model {model_id!r} has {self.most} requests waiting or in flight already, which"
                " is all that it may (server.max_queue_size); try again"
            )


@contextmanager
def _counted(counter: Counter[str], key: str) -> Iterator[None]:
    """Count one more while the block lasts; a key without any is not kept."""
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
