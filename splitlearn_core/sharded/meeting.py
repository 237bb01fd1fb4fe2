"""How ranks keep an eye on one another while each of them works alone.

They talk through the store that the process group was made with: each writes signs of life, what it
has found, and why it failed.  A rank that waits for others looks there, and gives up on those that
have given no sign for too long: collectives would wait for half an hour, and name nobody.
Everything that is written is text; nothing is unpickled.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from splitlearn_core.errors import RankLostError, RanksDifferError
from splitlearn_core.messages import in_one_line, short

_LOOK_SECONDS = 0.02
_SIGN_SECONDS = 0.5
_FAILED = "failed"
_meetings = count()


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value that is there."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of these keys are there."""


class Meeting:
    """One piece of work that all ranks do together; every rank makes one, in the same order.

    Attributes:
        rank: This process's.
        size: How many ranks there are.
        timeout: Seconds without a sign of life after which a rank is given up.
    """

    def __init__(self, work: str, timeout: float, store: Store, rank: int, size: int) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._work = work
        self._store = store
        self._signs = 0
        self._next_sign = 0.0
        self._stage = ""

    @classmethod
    def of_all(cls, work: str, timeout: float) -> Meeting:
        """Meet the ranks of the default process group; without one, nobody.

        Args:
            work: What is done, for messages: `loading`.
            timeout: Seconds without a sign of life after which a rank is given up.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, found {timeout!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return cls(work, timeout, _Alone(), 0, 1)
        number = next(_meetings)
        store = PrefixStore(f"splitlearn/{number}/", _get_default_store())
        return cls(work, timeout, store, dist.get_rank(), dist.get_world_size())

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Let the others know, if the block fails here, or has found that a rank is gone."""
        try:
            yield
        except RankLostError as error:
            self._announce(error.ranks, str(error).removeprefix(f"{self._work}: "))
            raise
        except BaseException as error:
            self._announce((self.rank,), f"rank {self.rank} failed: {in_one_line(error)}")
            raise

    def sign(self, doing: str) -> None:
        """Give a sign of life, and hear whether another rank has failed.

        Args:
            doing: What this rank is at, for the message of those who give it up; a new first word
                is told at once, other news twice a second.

        Raises:
            RankLostError: (a `RuntimeError`) Another rank has failed; says which, and why.
        """
        now, stage = time.monotonic(), doing.partition(" ")[0]
        if now < self._next_sign and stage == self._stage:
            return
        self._stage = stage
        self._next_sign = now + _SIGN_SECONDS
        self._signs += 1
        self._put("sign", json.dumps([self._signs, doing]))
        self._look_for_failures()

    def exchange(self, topic: str, found: Any) -> list[Any]:
        """Tell what was found here, and return what each rank has found, by rank.

        Args:
            topic: Names the exchange; each is made once.
            found: Any JSON value.

        Raises:
            RankLostError: (a `RuntimeError`) A rank has failed, or given no sign for too long;
                says which, and what it did last.
        """
        self._put(topic, json.dumps(found))
        return [json.loads(text) for text in self._all(topic)]

    def tell(self, topic: str, found: Any) -> None:
        """Tell something that others `hear`."""
        self._put(topic, json.dumps(found))

    def hear(self, topic: str, rank: int = 0) -> Any:
        """Return what one rank tells; raises as `exchange`."""
        [text] = self._wait_for(topic, [rank])
        return json.loads(text)

    def agree(self, topic: str, facts: Mapping[str, Any]) -> None:
        """See that all ranks have the same facts.

        Raises:
            RanksDifferError: (a `ValueError`) They don't; says which ranks, in what, and how.
            RankLostError: (a `RuntimeError`) As `exchange`.
        """
        everybody: list[dict[str, Any]] = self.exchange(topic, dict(facts))
        for fact in facts:
            values = [json.dumps(theirs.get(fact)) for theirs in everybody]
            usual, _ = Counter(values).most_common(1)[0]
            odd = [rank for rank, value in enumerate(values) if value != usual]
            if odd:
                others = values.index(usual)
                said = ", ".join(f"rank {rank}: {short(values[rank])}" for rank in odd)
                raise RanksDifferError(
                    f"{self._work}: the ranks differ in {fact}: {said}; rank {others}:"
                    f" {short(usual)}.  Give all ranks the same arguments and the same files",
                    tuple(odd),
                )

    def failure(self) -> RankLostError | None:
        """Return why another rank has failed; `None` where none has said so."""
        with self._reachable():
            if not self._store.check([_FAILED]):
                return None
            ranks, why = json.loads(self._store.get(_FAILED))
        return RankLostError(f"{self._work}: {why}", tuple(ranks))

    def _announce(self, ranks: tuple[int, ...], why: str) -> None:
        """Write down what failed first; who has failed can do no more."""
        with suppress(RankLostError):
            if self.failure() is None:
                with self._reachable():
                    self._store.set(_FAILED, json.dumps([list(ranks), why]))

    def _look_for_failures(self) -> None:
        if (error := self.failure()) is not None:
            raise error

    def _all(self, topic: str) -> list[str]:
        return self._wait_for(topic, list(range(self.size)))

    def _wait_for(self, topic: str, ranks: list[int]) -> list[str]:
        """Return what some ranks say on a topic, once they all have."""
        watched = {rank: _Watched() for rank in ranks}
        while waiting := [rank for rank in ranks if not self._has(topic, rank)]:
            self.sign(f"waiting for {_ranks(waiting)}")
            for rank in waiting:
                watched[rank].look(self._last_sign(rank))
            silent = [rank for rank in waiting if watched[rank].silence > self.timeout]
            if silent:
                raise self._gave_up(silent)
            time.sleep(_LOOK_SECONDS)
        return [self._store.get(f"{topic}/{rank}").decode() for rank in ranks]

    def _gave_up(self, silent: list[int]) -> RankLostError:
        last = (
            json.loads(sign)[1] if (sign := self._last_sign(r)) else "never met" for r in silent
        )
        said = ", ".join(
            f"rank {rank} (last: {what})" for rank, what in zip(silent, last, strict=True)
        )
        return RankLostError(
            f"{self._work}: no sign of life for {self.timeout:g} s from {said}: it has died, hangs,"
            " or does something else; look into its log",
            tuple(silent),
        )

    def _last_sign(self, rank: int) -> str:
        return self._store.get(f"sign/{rank}").decode() if self._has("sign", rank) else ""

    def _has(self, topic: str, rank: int) -> bool:
        with self._reachable():
            return self._store.check([f"{topic}/{rank}"])

    def _put(self, topic: str, text: str) -> None:
        with self._reachable():
            self._store.set(f"{topic}/{self.rank}", text)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Say what it means when the store itself is gone."""
        try:
            yield
        except dist.DistError as error:
            raise RankLostError(
                f"{self._work}: the place where the ranks meet can't be reached; whoever keeps it"
                f" (rank 0, or the torchrun that started it) has ended: {in_one_line(error)}",
                (0,),
            ) from error


class _Watched:
    """How long a rank has given no new sign."""

    def __init__(self) -> None:
        self._sign = ""
        self._since = time.monotonic()

    def look(self, sign: str) -> None:
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds."""
        return time.monotonic() - self._since


class _Alone:
    """The store of a process without a group."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self._values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._values for key in keys)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
