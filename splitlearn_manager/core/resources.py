"""Memory for models: promised before a load starts, given back when the model is gone.

Looking whether there is room and then loading lets two loads both find the same room.  So what a
load will need is *reserved*, in the same step that looks, and counts as used from then on.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.machine import Memory, cuda_memory, host_memory
from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.errors import InsufficientResourcesError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HOST = "cpu"


@dataclass(frozen=True)
class ResourceUsage:
    """A snapshot of one device's memory, in bytes.

    Attributes:
        device: `cpu`, `cuda:0`, …
        capacity_bytes: Most that may be reserved.
        reserved_bytes: What is.
        available_bytes: What the operating system (or the driver) could give now.
        reservations: What is reserved by each model.
        leaving_bytes: What of `reserved_bytes` is of models that are going, or gone while something
            still refers to them.
    """

    device: str
    capacity_bytes: int
    reserved_bytes: int
    available_bytes: int
    reservations: Mapping[str, int]
    leaving_bytes: int = 0


class Reservation:
    """Bytes promised to one model, until they are released.

    Attributes:
        model_id: Whose they are.
        device: Where they are.
        nbytes: How many they are now; 0 once released.
        leaving: Whether their model is going, so that others may wait for them.
        lingering: Whether it is gone, but something else still refers to it, for who knows how
            long.
    """

    def __init__(self, model_id: str, nbytes: int, device: str, owner: ResourceManager) -> None:
        self.model_id = model_id
        self.device = device
        self.nbytes = nbytes
        self.leaving = False
        self.lingering = False
        self._owner = owner

    def resize(self, nbytes: int) -> int:
        """Let what was measured replace what was estimated.

        Returns:
            The bytes that could not be promised, because others have them: 0, unless the estimate
            was too low on a device that is full.
        """
        return self._owner._resize(self, nbytes)  # noqa: SLF001 - two halves of one thing

    def linger(self) -> None:
        """Note that the model is gone, and that nobody knows when its memory will be.

        Whoever waits for it looks again: there may be nothing left to wait for.
        """
        self.leaving, self.lingering = False, True
        self._owner._changed()  # noqa: SLF001

    def release(self) -> None:
        """Give the bytes back; a second time does nothing."""
        self._owner._release(self)  # noqa: SLF001


class ResourceManager:
    """Promises memory, never more than there is.

    The capacity of the CPU is `memory_limit`, or `max_memory_percent` of the machine's memory, of
    the container's where that is smaller; that of an accelerator is the same share of its memory.
    `mps` shares the CPU's.  At no moment is more reserved than the capacity.

    Without `memory_limit`, what others use counts too: a load is refused when less is available
    now than it asks for beside the loads that are still under way.

    Any thread may call.  Looking at the system's figures takes up to milliseconds (the first time
    on a CUDA device, seconds); nothing else here waits for more than a lock held for microseconds.

    Args:
        max_memory_percent: Share of a device's memory that models may have.
        memory_limit: Bytes that models on the CPU may have, whatever the machine has.

    Attributes:
        on_change: Called, in any thread and holding no lock, when less is reserved than before, or
            what was about to be given back is not.
    """

    def __init__(self, max_memory_percent: float = 80.0, memory_limit: int | None = None) -> None:
        if not 0 < max_memory_percent <= 100:  # noqa: PLR2004 - it is a percentage
            raise ValueError(f"max_memory_percent must be above 0, to 100: {max_memory_percent}")
        if memory_limit is not None and memory_limit < 0:
            raise ValueError(f"memory_limit must not be negative, found {memory_limit}")
        self.max_memory_percent = max_memory_percent
        self.memory_limit = memory_limit
        # a finalizer may release a reservation wherever the collector runs, here included
        self._mutex = threading.RLock()
        self._held: list[Reservation] = []
        self._under_way: set[Reservation] = set()
        self._capacities: dict[str, int] = {}
        self.on_change: list[Callable[[], None]] = []

    def capacity(self, device: str = HOST) -> int:
        """Return the most bytes that may be reserved on a device; looked up once."""
        pool = pool_of(device)
        if pool == HOST and self.memory_limit is not None:
            return self.memory_limit
        if pool not in self._capacities:
            share = self.max_memory_percent / 100
            self._capacities[pool] = int(self.memory(pool).total * share)
        return self._capacities[pool]

    def set_memory_limit(self, memory_limit: int | None) -> None:
        """Change what models on the CPU may have; what is reserved above it stays so for now."""
        if memory_limit is not None and memory_limit < 0:
            raise ValueError(f"memory_limit must not be negative, found {memory_limit}")
        self.memory_limit = memory_limit
        self._changed()

    def memory(self, device: str = HOST) -> Memory:
        """Return what a device has, and what of it is available now."""
        pool = pool_of(device)
        return host_memory() if pool == HOST else cuda_memory(int(pool.removeprefix("cuda:")))

    def reserve(
        self, model_id: str, nbytes: int, device: str = HOST, memory: Memory | None = None
    ) -> Reservation:
        """Promise bytes to a model.

        Args:
            model_id: Whose they are.
            nbytes: How many.
            device: Where.
            memory: What `memory(device)` said a moment ago, for those who can't wait for it here:
                with it, nothing is read from the system.

        Raises:
            InsufficientResourcesError: They don't fit; the message has every figure.
        """
        if nbytes < 0:
            raise ValueError(f"can't reserve {nbytes} bytes for model {model_id!r}")
        pool = pool_of(device)
        available = (memory or self.memory(pool)).available
        capacity = self.capacity(pool)
        with self._mutex:
            if nbytes > self._room(pool, capacity, available):
                raise InsufficientResourcesError(
                    self._refusal(model_id, nbytes, pool, capacity, available)
                )
            reservation = Reservation(model_id, nbytes, pool, self)
            self._held.append(reservation)
            self._under_way.add(reservation)
            return reservation

    def get_current_usage(self, device: str = HOST) -> ResourceUsage:
        """Return what is promised and what there is on a device."""
        pool = pool_of(device)
        capacity, available = self.capacity(pool), self.memory(pool).available
        with self._mutex:
            by_model = self._by_model(pool)
            gone = [r for r in tuple(self._held) if r.device == pool and (r.leaving or r.lingering)]
            leaving = sum(r.nbytes for r in gone)
        return ResourceUsage(pool, capacity, by_model.total(), available, dict(by_model), leaving)

    def check_available_resources(self, nbytes: int = 0, device: str = HOST) -> bool:
        """Whether so many bytes could be reserved now.  An answer, not a promise: `reserve`."""
        pool = pool_of(device)
        capacity, available = self.capacity(pool), self.memory(pool).available
        with self._mutex:
            return nbytes <= self._room(pool, capacity, available)

    def shortfall(self, nbytes: int, device: str, memory: Memory | None = None) -> int:
        """Return how many bytes must be given back before so many can be reserved; 0 for none."""
        pool = pool_of(device)
        available = (memory or self.memory(pool)).available
        capacity = self.capacity(pool)
        with self._mutex:
            return max(0, nbytes - self._room(pool, capacity, available))

    def is_changing(self, device: str) -> bool:
        """Whether something reserved there will be given back without anybody asking.

        Loads under way shrink to their measured size, or fail; models that are going, go.
        """
        pool = pool_of(device)
        with self._mutex:
            return any(
                held.device == pool and (held.leaving or held in self._under_way)
                for held in tuple(self._held)
            )

    def devices(self) -> tuple[str, ...]:
        """Return the CPU and every other device on which something is reserved."""
        with self._mutex:
            return tuple(sorted({HOST, *(held.device for held in self._held)}))

    def _room(self, pool: str, capacity: int, available: int) -> int:
        """Return how many bytes can be promised now."""
        room = capacity - self._by_model(pool).total()
        if pool == HOST and self.memory_limit is not None:
            return room
        coming = sum(held.nbytes for held in tuple(self._under_way) if held.device == pool)
        return min(room, available - coming)

    def _by_model(self, pool: str) -> Counter[str]:
        """Return what each model has reserved on a device."""
        by_model: Counter[str] = Counter()
        for held in tuple(self._held):
            if held.device == pool:
                by_model[held.model_id] += held.nbytes
        return by_model

    def _refusal(self, model_id: str, nbytes: int, pool: str, capacity: int, available: int) -> str:
        """Return the message with every figure."""
        by_model = self._by_model(pool)
        holders = ", ".join(f"{name} {format_bytes(size)}" for name, size in by_model.items())
        return (
            f"model {model_id!r} needs {format_bytes(nbytes)} on {pool}, where models may have"
            f" {format_bytes(capacity)}: {format_bytes(by_model.total())} is reserved"
            f" ({holders or 'by none'}), and {format_bytes(available)} is available now"
        )

    def _resize(self, reservation: Reservation, nbytes: int) -> int:
        """Change a reservation that is held, as far as the capacity goes."""
        capacity = self.capacity(reservation.device)
        with self._mutex:
            if reservation not in self._held:
                return 0
            others = self._by_model(reservation.device).total() - reservation.nbytes
            reservation.nbytes = min(nbytes, max(reservation.nbytes, capacity - others))
            self._under_way.discard(reservation)
            short = nbytes - reservation.nbytes
        self._changed()
        return short

    def _release(self, reservation: Reservation) -> None:
        """Forget a reservation, if it is held."""
        with self._mutex:
            if reservation in self._held:
                self._held.remove(reservation)
            self._under_way.discard(reservation)
            reservation.nbytes = 0
        self._changed()

    def _changed(self) -> None:
        """Tell whoever waits for memory."""
        for tell in tuple(self.on_change):
            tell()


def pool_of(device: str) -> str:
    """Return the memory that a device takes from: `cuda` is `cuda:0`, `mps` is the CPU's."""
    if device == "cuda":
        return "cuda:0"
    return HOST if device == "mps" else device
