"""Every error that the manager raises on purpose.

Those of sessions are in `serving/errors.py`, those of parts that live elsewhere in
`client/errors.py`: each is read where it is raised.

    ManagerError (SplitLearnError)                    HTTP  code
    ├── ConfigError (ValueError)                      400   bad_config
    ├── ModelNotFoundError (KeyError)                 404   model_not_found
    ├── ModelAlreadyLoadedError (ValueError)          409   model_already_loaded
    ├── ModelLoadingError (ValueError)                503   model_loading
    ├── ModelUnloadingError (RuntimeError)            503   model_unloading
    ├── ModelFailedError (RuntimeError)               503   model_failed
    ├── ModelNotLoadingError (ValueError)             409   model_not_loading
    ├── LoadCancelledError (RuntimeError)             503   load_cancelled
    ├── LoadTimeoutError (TimeoutError)               504   load_timeout
    ├── InsufficientResourcesError (RuntimeError)     507   insufficient_resources
    ├── DrainTimeoutError (TimeoutError)              503   drain_timeout
    ├── ManagerClosedError (RuntimeError)             503   manager_closed
    └── IllegalTransitionError (RuntimeError)         500   illegal_transition

Each also is the builtin that callers already catch, and carries the HTTP status that suits it
(`http_status`), a word for programs (`code`), and, where asking again later makes sense, after
how many seconds (`retry_after`), so that a server needs one handler for them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from splitlearn_core.errors import SplitLearnError

if TYPE_CHECKING:
    from collections.abc import Sequence

KeyPath = tuple[str | int, ...]
"""Where a value stands in a configuration: `("models", 0, "config", "split_points")`."""


class ManagerError(SplitLearnError):
    """Base of the manager's errors; catch it to catch them all."""

    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    retry_after: ClassVar[int | None] = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    Attributes:
        message: What was expected, what was found, what to do.
        path: Keys from the root of the configuration to the value.
        source: File name, or what else the value came from.
        line: Line in that file, from 1.
    """

    message: str
    path: KeyPath = ()
    source: str | None = None
    line: int | None = None

    def within(self, *prefix: str | int) -> Problem:
        """Return the same problem as seen from further out."""
        return replace(self, path=(*prefix, *self.path))

    def __str__(self) -> str:
        """Return `file:line: key.path[0]: message`, without what is not known."""
        place = self.source or ""
        if place and self.line is not None:
            place = f"{place}:{self.line}"
        return ": ".join(part for part in (place, show_path(self.path), self.message) if part)


def show_path(path: Sequence[str | int]) -> str:
    """Return `models[0].config.split_points` for `("models", 0, "config", "split_points")`."""
    shown = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return shown.removeprefix(".")


class ConfigError(ManagerError, ValueError):
    """A configuration is wrong; the message has a line for each of its `problems`.

    Whoever wrote the file (or the arguments) is to mend it: nothing was started or changed.
    """

    http_status = 400
    code = "bad_config"

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        """Return one line for each problem."""
        return "\n".join(map(str, self.problems))

    def within(self, *prefix: str | int) -> ConfigError:
        """Return the same error as seen from further out in the configuration."""
        return ConfigError(*(problem.within(*prefix) for problem in self.problems))


class ModelNotFoundError(ManagerError, KeyError):
    """No model has that id; the message lists those that there are."""

    http_status = 404
    code = "model_not_found"

    def __str__(self) -> str:
        """Return the sentence itself: `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class ModelAlreadyLoadedError(ManagerError, ValueError):
    """A model with that id is loaded, or not yet unloaded.  Unload it first, or use it."""

    http_status = 409
    code = "model_already_loaded"


class ModelLoadingError(ManagerError, ValueError):
    """The model is being loaded, so it can be neither used, loaded again nor unloaded now."""

    http_status = 503
    code = "model_loading"
    retry_after = 1


class ModelUnloadingError(ManagerError, RuntimeError):
    """The model is being unloaded and takes no new use."""

    http_status = 503
    code = "model_unloading"
    retry_after = 1


class ModelFailedError(ManagerError, RuntimeError):
    """Loading the model failed; the message has the reason, `__cause__` the original error.

    Loading it again is allowed and replaces the failed entry.
    """

    http_status = 503
    code = "model_failed"


class ModelNotLoadingError(ManagerError, ValueError):
    """There is nothing to cancel: no load of the model is under way."""

    http_status = 409
    code = "model_not_loading"


class LoadCancelledError(ManagerError, RuntimeError):
    """The load was cancelled before it was finished; nothing of it stays in memory."""

    http_status = 503
    code = "load_cancelled"


class LoadTimeoutError(ManagerError, TimeoutError):
    """The load did not move, or took longer than its size can explain; it was given up.

    Not tried again by itself: what hung once hangs again, and its thread may still be at it.
    """

    http_status = 504
    code = "load_timeout"
    final: ClassVar[bool] = True


class InsufficientResourcesError(ManagerError, RuntimeError):
    """The model does not fit beside what is there; the message has every figure.

    Unload something, raise the limit, or take a smaller part or dtype.
    """

    http_status = 507
    code = "insufficient_resources"


class DrainTimeoutError(ManagerError, TimeoutError):
    """A use of a model was ended: the model is being unloaded, and its deadline has come."""

    http_status = 503
    code = "drain_timeout"
    retry_after = 1


class ManagerClosedError(ManagerError, RuntimeError):
    """The manager is shutting down, or has; it takes no more work."""

    http_status = 503
    code = "manager_closed"


class IllegalTransitionError(ManagerError, RuntimeError):
    """The table of states has no such move.  A bug in the manager, never the caller's fault."""

    code = "illegal_transition"
