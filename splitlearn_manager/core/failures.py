"""What became of a load that failed: in words, in a word, and without what it would keep alive."""

from __future__ import annotations

import logging
import traceback

from splitlearn_core.errors import QuantizationError, StepGraphError
from splitlearn_manager.errors import ManagerError


def describe(error: BaseException) -> str:
    """Return an error in words: ours as they are, others with their type before them."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a load must end, whatever its loader makes up
        text = "(it can't be shown)"
    if isinstance(error, ManagerError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def failure_code(error: BaseException) -> str:
    """Return why a load failed in a word: of ours the code, of others the kind."""
    if isinstance(error, ManagerError):
        return error.code
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (MemoryError, "out_of_memory"),
        (ConnectionError, "fetch_failed"),
        (TimeoutError, "timed_out"),
        (FileNotFoundError, "not_found"),
        (OSError, "storage"),
        (KeyError, "unsupported_model"),
        (QuantizationError, "unsupported_quantization"),
        (StepGraphError, "unsupported_cuda_graphs"),
        (ValueError, "bad_checkpoint"),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), "error")


def without_frames(error: BaseException) -> BaseException:
    """Drop the frames from an error, its causes and its contexts, in place.

    A frame keeps its local variables alive: after a failed load, the tensors that were already
    read, for as long as anybody keeps the error.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            waiting += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]
    return error


def with_frames(error: BaseException) -> str:
    """Return an error and its frames as text, which keeps nothing alive."""
    return "".join(traceback.format_exception(error))


def log_with_frames(logger: logging.Logger, message: str, *args: object) -> None:
    """Log the error that is being handled, and its frames as text.

    As `Logger.exception`, but whoever keeps the record keeps no frame, and so no tensor, alive.
    """
    logger.error(f"{message}\n%s", *args, traceback.format_exc())  # noqa: G004 - joins constants
