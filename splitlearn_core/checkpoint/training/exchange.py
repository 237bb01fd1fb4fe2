"""What the ranks of one run tell each other about a checkpoint, each with a deadline.

They speak through the store of torch.distributed's process group, where they met: what a rank
says stays there, so that the others can say who is missing.  Every rank takes part in every
exchange, in the same order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from splitlearn_core.errors import RankLostError
from splitlearn_core.messages import in_one_line

_PREFIX = "splitlearn/checkpoint"
_FAILED, _DONE = b"!", b"."
# How long who waits for rank 0 waits beyond it, so that rank 0 can say who is missing.
_GRACE = 5.0
_LEAST = 0.01
# How often rank 0 says that it gets on, and others look.
_SIGN_SECONDS = 1.0
_LOOK_SECONDS = 0.02

_exchanges = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: Its number.
        world_size: How many there are.
    """

    rank: int
    world_size: int

    @classmethod
    def here(cls) -> Ranks:
        """Return what torch.distributed says; without a process group there is one rank."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0


class Exchange:
    """One question that all ranks answer, and what rank 0 makes of the answers.

    Attributes:
        what: What it is about, for errors.
    """

    def __init__(self, ranks: Ranks, what: str, timeout: float) -> None:
        """Begin; every rank does, in the same order.

        Args:
            ranks: This process among the others.
            what: What it is about, for errors: `the save of step 40`.
            timeout: Seconds that the others have.
        """
        self._ranks = ranks
        self.what = what
        self._timeout = timeout
        self._next_sign = 0.0
        self._key = f"{_PREFIX}/{next(_exchanges)}"
        self._store: Any = dist.distributed_c10d._get_default_store() if self._is_shared else None  # noqa: SLF001 - no public way leads there

    @property
    def _is_shared(self) -> bool:
        return self._ranks.world_size > 1

    def gather(self, answer: bytes) -> list[bytes]:
        """Give this rank's answer; return all of them on rank 0, and only this one elsewhere.

        Raises:
            RankLostError: (a `RuntimeError`) On rank 0: some failed, or did not answer in time;
                names them.  The others are told.
        """
        if not self._is_shared:
            return [answer]
        self._answer(_DONE + answer)
        if not self._ranks.is_first:
            return [answer]
        self._await_all()
        answers = [self._take(rank) for rank in range(self._ranks.world_size)]
        failed = [
            f"rank {rank}: {text[1:].decode()}"
            for rank, text in enumerate(answers)
            if text.startswith(_FAILED)
        ]
        if failed:
            self._end(RankLostError(f"{self.what} failed on {'; '.join(failed)}"))
        return [text[1:] for text in answers]

    def tell(self, answer: bytes = b"") -> bytes:
        """Tell the others rank 0's answer; return it on every rank.

        Raises:
            RankLostError: (a `RuntimeError`) Rank 0 failed, or did not answer in time.
        """
        return self._publish(_DONE + answer)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the others of an error that the block raises, so that they don't wait in vain."""
        try:
            yield
        except BaseException as error:
            if self._is_shared:
                key = "all" if self._ranks.is_first else str(self._ranks.rank)
                with suppress(RuntimeError, OSError):
                    self._store.set(f"{self._key}/{key}", _FAILED + in_one_line(error).encode())
            raise

    def _answer(self, answer: bytes) -> None:
        with self._connected():
            self._store.set(f"{self._key}/{self._ranks.rank}", answer)

    def _end(self, error: RankLostError) -> None:
        with self.failing():
            raise error

    def _publish(self, answer: bytes) -> bytes:
        if not self._is_shared:
            return answer[1:]
        key = f"{self._key}/all"
        with self._connected():
            if self._ranks.is_first:
                self._store.set(key, answer)
            else:
                answer = self._wait_for_first(key)
        if answer.startswith(_FAILED):
            raise RankLostError(f"{self.what} failed on rank 0: {answer[1:].decode()}")
        return answer[1:]

    def sign(self) -> None:
        """Let the others know that rank 0 gets on with it; may be called often, in any thread."""
        now = time.monotonic()
        if self._is_shared and self._ranks.is_first and now >= self._next_sign:
            self._next_sign = now + _SIGN_SECONDS
            with suppress(RuntimeError, OSError):  # what is wrong shows when they are told
                self._store.set(f"{self._key}/sign", str(now).encode())

    def _wait_for_first(self, key: str) -> bytes:
        """Wait as long as rank 0 gets on."""
        patience = self._timeout + _GRACE
        deadline, last = time.monotonic() + patience, b""
        while not self._store.check([key]):
            sign = self._last_sign()
            if sign != last:
                deadline, last = time.monotonic() + patience, sign
            if time.monotonic() > deadline:
                raise RankLostError(
                    f"rank 0 did not end {self.what} within {patience:g} s: it has ended, or hangs;"
                    " see its log.  The checkpoints that were there are as they were"
                )
            time.sleep(_LOOK_SECONDS)
        answer: bytes = self._store.get(key)
        return answer

    def _last_sign(self) -> bytes:
        key = f"{self._key}/sign"
        sign: bytes = self._store.get(key) if self._store.check([key]) else b""
        return sign

    def _await_all(self) -> None:
        """Wait until every rank has answered."""
        deadline = time.monotonic() + self._timeout
        missing = [r for r in range(self._ranks.world_size) if not self._has_answered(r, deadline)]
        if not missing:
            return
        names = ", ".join(map(str, missing))
        error = RankLostError(
            f"rank{'s' if len(missing) > 1 else ''} {names} did not come to {self.what} within"
            f" {self._timeout:g} s: ended, or hanging; see"
            f" {'their logs' if len(missing) > 1 else 'its log'}.  The checkpoints that were there"
            " are as they were"
        )
        self._end(error)

    def _has_answered(self, rank: int, deadline: float) -> bool:
        left = max(_LEAST, deadline - time.monotonic())
        try:
            self._store.wait([f"{self._key}/{rank}"], timedelta(seconds=left))
        except RuntimeError:  # a FileStore raises no other
            return False
        return True

    def _take(self, rank: int) -> bytes:
        key = f"{self._key}/{rank}"
        answer: bytes = self._store.get(key)
        self._store.delete_key(key)
        return answer

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Say what it means when the store is gone: rank 0 holds it, where ranks meet at a port."""
        try:
            yield
        except RankLostError:
            raise
        except (RuntimeError, OSError) as error:
            raise RankLostError(
                f"{self.what} can't be agreed on: the place where the ranks met, at rank 0 as a"
                f" rule, is gone ({in_one_line(error)}).  The checkpoints that were there are as"
                " they were"
            ) from error
