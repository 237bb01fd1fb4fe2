"""The cycle collector is held back while names are read, and comes back however that ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitlearn_core.collector import collector_paused
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import parse_header, read_header


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    assert gc.isenabled()


def test_the_last_one_out_lets_it_go_on() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with collector_paused:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    with collector_paused:
        thread.start()
        assert inside.wait(30)
    assert not gc.isenabled()
    leave.set()
    thread.join()


def test_who_has_it_off_keeps_it_off() -> None:
    gc.disable()
    with collector_paused:
        pass
    assert not gc.isenabled()
    gc.enable()


def test_an_error_lets_it_go_on() -> None:
    with pytest.raises(CheckpointError):
        parse_header(b"{", 9, "it")


def test_no_collection_begins_while_a_large_header_is_read(tmp_path: Path) -> None:
    """The control is the same reading with collections after each few objects."""
    save_file({f"layer.{n}": torch.zeros(1) for n in range(2000)}, tmp_path / "f")
    seen: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    try:
        read_header(tmp_path / "f")
        during = len(seen)
        kept = [[n] for n in range(100_000)]
        assert len(seen) > during, kept
    finally:
        gc.callbacks.remove(note)
    assert during <= 2  # one that was due before
