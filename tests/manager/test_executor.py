from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from concurrent.futures import wait

import pytest

from splitlearn_manager.core.executor import DaemonThreadPoolExecutor


def test_results_and_errors_come_back() -> None:
    with DaemonThreadPoolExecutor(2, "test") as executor:
        good = executor.submit(pow, 2, exp=5)
        bad = executor.submit(divmod, 1, 0)

        assert good.result() == 32
        with pytest.raises(ZeroDivisionError):
            bad.result()


def test_threads_are_daemons_started_when_needed_and_used_again() -> None:
    with DaemonThreadPoolExecutor(2, "test") as executor:
        names = []
        for _ in range(3):
            thread = executor.submit(threading.current_thread).result()
            wait([executor.submit(int)])
            names.append(thread.name)
            assert thread.daemon

    assert set(names) <= {"test-0", "test-1"}


def test_no_more_threads_run_than_are_allowed() -> None:
    inside, gate = threading.Semaphore(0), threading.Event()

    def work() -> None:
        inside.release()
        gate.wait(30)

    def running() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("counted-")]

    with DaemonThreadPoolExecutor(2, "counted") as executor:
        futures = [executor.submit(work) for _ in range(6)]
        assert inside.acquire(timeout=30)
        assert inside.acquire(timeout=30)
        assert not inside.acquire(blocking=False)
        assert sorted(running()) == ["counted-0", "counted-1"]
        gate.set()
        wait(futures)


def test_shutdown_does_what_is_queued_and_takes_no_more() -> None:
    gate = threading.Event()
    executor = DaemonThreadPoolExecutor(1, "test")
    first, second = executor.submit(gate.wait, 30), executor.submit(int)

    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="the executor was shut down"):
        executor.submit(int)
    gate.set()
    executor.shutdown()

    assert first.result() is True
    assert second.result() == 0


def test_shutdown_can_cancel_what_is_queued() -> None:
    gate = threading.Event()
    executor = DaemonThreadPoolExecutor(1, "test")
    entered = threading.Event()
    first = executor.submit(lambda: (entered.set(), gate.wait(30)))
    entered.wait(30)
    second = executor.submit(int)

    executor.shutdown(wait=False, cancel_futures=True)
    gate.set()
    executor.shutdown()

    assert first.done()
    assert second.cancelled()


def test_an_idle_thread_keeps_nothing_alive() -> None:
    class Result:
        pass

    with DaemonThreadPoolExecutor(1, "test") as executor:
        future = executor.submit(Result)
        alive = weakref.ref(future.result())
        del future
        wait([executor.submit(int)])  # behind it, the thread has let go of the first

        assert alive() is None


def test_it_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="max_workers must be at least 1, found 0"):
        DaemonThreadPoolExecutor(0, "test")


_AT_THE_EXIT = """
import sys, threading, time, torch
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor

torch.set_num_threads(1)
started, executor = threading.Event(), DaemonThreadPoolExecutor(1, "left")

def forwards():
    matrix = torch.ones(200, 200)
    started.set()
    while True:
        torch.mm(matrix, matrix)

def hang():
    started.set()
    time.sleep(600)

executor.submit({work})
executor.submit(print, "this was queued")
started.wait()
print("main ends", flush=True)
sys.exit(3)
"""


@pytest.mark.parametrize("work", ["forwards", "hang", "started.set"])
def test_an_interpreter_that_exits_ends_its_threads_and_is_not_aborted(work: str) -> None:
    # torch's code can't be left by the interpreter's end: a process would end with SIGABRT
    child = subprocess.run(
        [sys.executable, "-c", _AT_THE_EXIT.format(work=work)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (child.returncode, child.stderr) == (3, "")
    if work != "started.set":
        assert child.stdout == "main ends\n"
