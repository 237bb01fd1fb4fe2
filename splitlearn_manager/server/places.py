"""How many requests a model may have at once."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from splitlearn_manager.serving.infer_errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Places:
    """Counts the requests of each model; one too many is refused at once, never made to wait.

    Args:
        most: Most requests of one model at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: Counter[str] = Counter()

    def taken(self, model_id: str) -> int:
        """Return how many requests a model has."""
        return self._taken[model_id]

    @contextmanager
    def take(self, model_id: str) -> Iterator[None]:
        """Count a request, for as long as the block lasts.

        Raises:
            OverloadedError: The model has as many as it may.
        """
        if self._taken[model_id] >= self.most:
            raise OverloadedError(
                f"model {model_id!r} has {self.most} requests waiting or in flight already, which"
                " is all that it may (server.max_queue_size); try again"
            )
        self._taken[model_id] += 1
        try:
            yield
        finally:
            self._taken[model_id] -= 1
            if not self._taken[model_id]:
                del self._taken[model_id]
