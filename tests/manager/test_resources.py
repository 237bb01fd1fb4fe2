from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_core.machine import Memory, container_memory, host_memory
from splitlearn_manager.core import resources as module
from splitlearn_manager.core.resources import Reservation, ResourceManager, ResourceUsage, pool_of
from splitlearn_manager.errors import InsufficientResourcesError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Memory], None]:
    """Return a function that says what memory the machine has; at first 1000 bytes, all free."""

    def has(memory: Memory) -> None:
        monkeypatch.setattr(module, "host_memory", lambda: memory)

    has(Memory(1000, 1000))
    return has


@pytest.mark.usefixtures("machine")
def test_the_capacity_is_a_share_of_the_machine_or_the_limit_given() -> None:
    assert ResourceManager().capacity() == 800
    assert ResourceManager(max_memory_percent=50).capacity() == 500
    assert ResourceManager(memory_limit=5000).capacity() == 5000


def test_reservations_add_up_to_the_capacity_and_no_further() -> None:
    resources = ResourceManager(memory_limit=100)
    first = resources.reserve("a", 60)
    resources.reserve("b", 40)

    with pytest.raises(InsufficientResourcesError) as caught:
        resources.reserve("c", 1)
    assert str(caught.value).startswith(
        "model 'c' needs 1 bytes on cpu, where models may have 100 bytes: 100 bytes is reserved"
        " (a 60 bytes, b 40 bytes), and "
    )
    assert not resources.check_available_resources(1)
    assert resources.check_available_resources(0)

    first.release()
    assert resources.check_available_resources(60)
    assert resources.reserve("c", 60).nbytes == 60


def test_a_release_counts_once() -> None:
    resources = ResourceManager(memory_limit=100)
    first, second = resources.reserve("a", 30), resources.reserve("a", 30)

    first.release()
    first.release()

    assert (first.nbytes, second.nbytes) == (0, 30)
    assert resources.get_current_usage().reservations == {"a": 30}
    assert first.resize(50) == 0
    assert resources.get_current_usage().reserved_bytes == 30


def test_a_reservation_is_resized_as_far_as_there_is_room() -> None:
    resources = ResourceManager(memory_limit=100)
    first, second = resources.reserve("a", 60), resources.reserve("b", 20)

    assert first.resize(30) == 0
    assert second.resize(50) == 0
    assert first.resize(70) == 20

    assert resources.get_current_usage().reservations == {"a": 50, "b": 50}


def test_what_others_use_counts_beside_loads_that_are_under_way(
    machine: Callable[[Memory], None],
) -> None:
    resources = ResourceManager()
    machine(Memory(1000, 300))
    first = resources.reserve("a", 200)

    with pytest.raises(InsufficientResourcesError, match="and 300 bytes is available now"):
        resources.reserve("b", 200)

    machine(Memory(1000, 200))  # the first load is done: what it takes shows in what is available
    first.resize(100)
    assert resources.reserve("b", 200).nbytes == 200


def test_a_limit_that_is_given_is_taken_at_its_word(machine: Callable[[Memory], None]) -> None:
    resources = ResourceManager(memory_limit=5000)
    machine(Memory(1000, 0))

    assert resources.reserve("a", 5000).nbytes == 5000


@pytest.mark.usefixtures("machine")
def test_usage_is_a_snapshot() -> None:
    resources = ResourceManager()
    resources.reserve("a", 200)

    usage = resources.get_current_usage()
    resources.reserve("b", 100)

    assert usage == ResourceUsage("cpu", 800, 200, 1000, {"a": 200})


def test_devices_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_memory", lambda index: Memory(1000 * (index + 1), 10**6))
    resources = ResourceManager(memory_limit=100)

    resources.reserve("a", 800, "cuda")
    resources.reserve("b", 1600, "cuda:1")
    resources.reserve("c", 100, "mps")

    assert resources.devices() == ("cpu", "cuda:0", "cuda:1")
    for device in ("cpu", "cuda:0", "cuda:1"):
        with pytest.raises(InsufficientResourcesError, match=f"needs 1 bytes on {device}"):
            resources.reserve("d", 1, device)


def test_pools() -> None:
    assert [pool_of(name) for name in ("cpu", "mps", "cuda", "cuda:3")] == [
        "cpu",
        "cpu",
        "cuda:0",
        "cuda:3",
    ]


def test_nonsense_is_refused() -> None:
    for percent in (0, -1, 101):
        with pytest.raises(ValueError, match="max_memory_percent must be above 0, to 100"):
            ResourceManager(percent)
    with pytest.raises(ValueError, match="memory_limit must not be negative, found -1"):
        ResourceManager(memory_limit=-1)
    with pytest.raises(ValueError, match="can't reserve -1 bytes for model 'a'"):
        ResourceManager(memory_limit=10).reserve("a", -1)


class Roomy(ResourceManager):
    """Does not read the machine's figures, which takes long and decides nothing here."""

    def memory(self, device: str = "cpu") -> Memory:  # noqa: ARG002 - the parent's
        return Memory(1000, 1000)


@given(st.lists(st.tuples(st.sampled_from(["reserve", "resize", "release"]), st.integers(0, 150))))
def test_never_more_is_reserved_than_there_is(operations: list[tuple[str, int]]) -> None:
    resources = Roomy(memory_limit=100)
    held: list[Reservation] = []
    for verb, number in operations:
        if verb == "reserve":
            fits = resources.check_available_resources(number)
            try:
                held.append(resources.reserve("a", number))
            except InsufficientResourcesError:
                assert not fits
            else:
                assert fits
        elif held:
            one = held[number % len(held)]
            one.resize(number) if verb == "resize" else one.release()
        reserved = resources.get_current_usage().reserved_bytes
        assert reserved == sum(one.nbytes for one in held) <= 100


def test_threads_that_reserve_at_once_share_what_there_is() -> None:
    resources = ResourceManager(memory_limit=50)
    start = threading.Barrier(8)
    won: list[int] = []

    def reserve(number: int) -> None:
        start.wait()
        for _ in range(20):
            try:
                resources.reserve(str(number), 1)
            except InsufficientResourcesError:
                return
            won.append(number)

    threads = [threading.Thread(target=reserve, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 50


def test_this_machine_has_memory() -> None:
    memory = host_memory()

    assert 0 < memory.available <= memory.total


def write(root: Path, **files: str) -> None:
    """Write files below a root; `__` stands for a slash, `_dot_` for a dot."""
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_container_of_version_2_has_the_limits_of_all_its_ancestors(tmp_path: Path) -> None:
    write(
        tmp_path,
        proc__self__cgroup="0::/pod/box\n",
        sys__fs__cgroup__pod__memory_dot_max="1000\n",
        sys__fs__cgroup__pod__memory_dot_current="900\n",
        sys__fs__cgroup__pod__memory_dot_stat="anon 1\ninactive_file 50\nactive_file 20\n",
        sys__fs__cgroup__pod__box__memory_dot_max="max\n",
        sys__fs__cgroup__pod__box__memory_dot_current="900\n",
    )

    assert list(container_memory(tmp_path)) == [Memory(1000, 170)]


def test_a_container_of_version_1_may_see_only_the_root_of_its_hierarchy(tmp_path: Path) -> None:
    write(
        tmp_path,
        proc__self__cgroup="5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="500\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="600\n",
        sys__fs__cgroup__memory__memory_dot_stat="total_inactive_file 10\ninactive_file 99\n",
    )

    assert list(container_memory(tmp_path)) == [Memory(500, 0)]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(container_memory(tmp_path)) == []


def test_the_tightest_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = [Memory(5000, 10), Memory(4000, 20)]
    monkeypatch.setattr("splitlearn_core.machine.container_memory", lambda: iter(tight))

    assert host_memory() == Memory(4000, 10)
