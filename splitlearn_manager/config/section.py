"""What all sections of a configuration share: strict types, no unknown keys, `ConfigError`s."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pydantic_core import ErrorDetails

T = TypeVar("T")

_STRICT = ConfigDict(strict=True, extra="forbid")
_MISSING = ("missing", "missing_argument")
_UNEXPECTED = ("unexpected_keyword_argument", "unexpected_positional_argument")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Make a class a section: a frozen dataclass whose values are checked when it is made.

    Types are strict (`"5"` is no number), unknown keys are refused by name, and what is wrong
    is told by one `ConfigError` with a problem for each value.
    """
    built: type[T] = dataclass(frozen=True, config=_STRICT)(cls)  # type: ignore[assignment]
    checked: Callable[..., None] = built.__init__

    def __init__(self: T, *args: object, **kwargs: object) -> None:  # noqa: N807 - it is one
        try:
            checked(self, *args, **kwargs)
        except ValidationError as error:
            raise config_error(error, field_names(built)) from None

    # pydantic has built its validator by now; only the door that callers use is another one.
    built.__init__ = __init__  # type: ignore[assignment, method-assign]
    return built


def build(cls: type[T], value: object) -> T:
    """Return a section made of a mapping; nothing at all (`server:` alone) is an empty one.

    Raises:
        ConfigError: It is no mapping, or not what the section wants.
    """
    if value is None:
        return cls()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"must be a mapping (key: value), {found(value)}")
    return cls(**value)


def field_names(kind: type) -> list[str]:
    """Return the keys of a section, in the order of its arguments."""
    return [item.name for item in fields(kind)]


class Findings:
    """Collects what is wrong in several places, to tell it all at once."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def add(self, problem: Problem) -> None:
        """Note a problem."""
        self._problems.append(problem)

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Note the problems of a `ConfigError` instead of letting it pass."""
        try:
            yield
        except ConfigError as error:
            self._problems.extend(error.within(*path).problems)

    def raise_if_any(self) -> None:
        """Raise one error with all that was noted."""
        if self._problems:
            raise ConfigError(*self._problems)


def config_error(error: ValidationError, names: list[str]) -> ConfigError:
    """Return pydantic's findings in our words; `names` are the keys that the section has."""
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        problems.extend(_problems(details, names))
    return ConfigError(*problems)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a key that is none of `known`, with the nearest of them."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {hint}Known are {', '.join(names)}"


def found(value: object) -> str:
    """Return a value and its type for an error message, cut where it is long."""
    return f"found {reprlib.repr(value)} ({type(value).__name__})"


def _problems(details: ErrorDetails, names: list[str]) -> Iterable[Problem]:
    """Return the problem(s) behind one of pydantic's findings."""
    path = details["loc"]
    if path and isinstance(path[0], int) and path[0] < len(names):
        path = (names[path[0]], *path[1:])  # given by position
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.within(*path).problems
    return [Problem(_message(details, cause, names), path)]


def _message(details: ErrorDetails, cause: Any, names: list[str]) -> str:
    """Return what one finding says, with what was found, unless that may be a secret."""
    if details["type"] in _UNEXPECTED:
        return unknown_key(str(details["loc"][-1]), names)
    if details["type"] in _MISSING:
        return "is missing"
    message = details["msg"].removeprefix("Input ") if cause is None else str(cause)
    return f"{message}, {found(details['input'])}"
