"""Writing what several ranks hold shares of: one writes, the others give, all hear how it went."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import distributed

from splitlearn_core.errors import StorageError

T = TypeVar("T")

Read = Callable[[str], torch.Tensor]


def write_together(names: Iterable[str], gather: Read, write: Callable[[Read], T]) -> T:
    """Run `write` on rank 0, while every rank gathers the tensors that it reads.

    Where `write` fails, the tensors that it did not come to are gathered all the same: the others
    wait in those.  Then every rank raises.

    Args:
        names: Of the tensors that must be gathered together, in the order in which they are read.
        gather: Returns one tensor whole; all ranks call it for the same names in the same order.
        write: Given what reads; returns what all ranks are to have, which can be pickled.

    Raises:
        Exception: On rank 0, what `write` raised.
        StorageError: (an `OSError`) On the others, with what rank 0 said.
    """
    if distributed.get_rank():
        for name in names:
            gather(name)
        heard: T = _hear()
        return heard
    waiting = deque(names)

    def read(name: str) -> torch.Tensor:
        if waiting and waiting[0] == name:
            waiting.popleft()
        return gather(name)

    try:
        result = write(read)
    except BaseException as error:
        for name in waiting:
            gather(name)
        _tell(None, f"{type(error).__name__}: {error}")
        raise
    _tell(result, None)
    return result


def _tell(result: object, error: str | None) -> None:
    """Tell the other ranks how it went."""
    distributed.broadcast_object_list([result, error], src=0)


def _hear() -> Any:
    """Hear from rank 0 how it went."""
    told: list[Any] = [None, None]
    distributed.broadcast_object_list(told, src=0)
    result, error = told
    if error is not None:
        raise StorageError(f"rank 0 could not write: {error}")
    return result
