"""A bar on standard error that shows how far a load is: bytes, rate, time left, stage."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from splitlearn_core.loading.stages import LoadStage, Progress

_DELAY = 0.5
"""Seconds until a bar appears: what is done before then needs none."""


class LoadBar:
    """A bar that can be given as `progress` to whatever loads.

    Args:
        label: What is loaded.
        show: `None` shows the bar where standard error is a terminal.
    """

    def __init__(self, label: str, *, show: bool | None = None) -> None:
        self._label = label
        hidden = not (sys.stderr.isatty() if show is None else show)
        self._bar: tqdm[Any] = tqdm(
            desc=label,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            disable=hidden,
            delay=0 if show else _DELAY,
            leave=bool(show),
        )

    def __call__(self, done: int, total: int) -> None:
        """Show how many bytes are done, of how many."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def enter_stage(self, stage: LoadStage) -> None:
        """Show what the load is at."""
        self._bar.set_description(f"{self._label}: {stage.value}", refresh=False)

    def close(self) -> None:
        """Let it stand as it is, or go."""
        self._bar.close()


@contextmanager
def showing(label: str, wish: bool | Progress | None) -> Iterator[Progress | None]:
    """Yield the `progress` of one load.

    Args:
        label: What is loaded.
        wish: `True` or `False` for a bar or none, `None` for one where standard error is a
            terminal, or what is to be called instead.
    """
    if callable(wish):
        yield wish
        return
    if wish is False:
        yield None
        return
    bar = LoadBar(label, show=wish)
    try:
        yield bar
    finally:
        bar.close()
