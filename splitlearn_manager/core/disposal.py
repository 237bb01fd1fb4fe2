"""Letting a model go: it is closed, dropped, and its memory is given back, or known to be kept."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from typing import TYPE_CHECKING, Any

from splitlearn_core.machine import return_freed_memory
from splitlearn_manager.core.failures import log_with_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.core.resources import Reservation

logger = logging.getLogger(__name__)

_LOOKS = 5
_PAUSE = 0.02
"""How often, and after how many seconds, a model is looked for again that should be gone: whoever
takes a snapshot of one has it for a moment."""


def see_it_gone(alive: Callable[[], Any]) -> Callable[[], Any] | None:
    """Give back the memory of a model that was dropped; blocks, up to a tenth of a second.

    Args:
        alive: From `weak_reference`, before the model was dropped.

    Returns:
        The same, if somebody else still has the model; `None` if it is gone.
    """
    if alive() is not None:
        gc.collect()  # only here: it stops every thread, and most models are in no cycle
    for _ in range(_LOOKS):
        if alive() is None:
            break
        time.sleep(_PAUSE)
    return_freed_memory()
    return None if alive() is None else alive


def release_when_gone(reservation: Reservation | None, alive: Callable[[], Any] | None) -> None:
    """Release a model's memory, once nothing refers to it any more.

    Args:
        reservation: What it had.
        alive: What `see_it_gone` returned.
    """
    if reservation is None:
        return
    model = None if alive is None else alive()
    if model is None:
        reservation.release()
        return
    reservation.linger()
    weakref.finalize(model, reservation.release).atexit = False


def close_model(model: Any) -> None:
    """Close what a model holds besides memory (a pipeline: its connections), if it can be closed.

    May block.  Whatever it raises is logged and goes no further: the model goes all the same.
    """
    try:
        close = getattr(model, "close", None)
        if close is not None:
            close()
    except BaseException:  # noqa: BLE001 - it is logged, as the docstring says
        log_with_frames(logger, "closing a %s failed", type(model).__name__)


def weak_reference(model: Any) -> Callable[[], Any]:
    """Return what gives the model as long as it lives; nothing, where that can't be seen."""
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: None
