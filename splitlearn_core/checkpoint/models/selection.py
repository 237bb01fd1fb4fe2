"""Which of a file's tensors are meant: names, prefixes and globs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from splitlearn_core.headers import listed


@dataclass(frozen=True)
class Selection:
    """What is wanted of the tensors by their names.

    A pattern is a tensor's name (`lm_head.weight`), the beginning of one up to a dot (`lm_head`,
    `model.layers.3`), or a glob over the whole name (`*.self_attn.*`).

    Attributes:
        only: Nothing but what one of these matches; `None` is everything.
        without: Nothing that one of these matches.
    """

    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, only: Iterable[str] | str | None, without: Iterable[str] | str) -> Selection:
        """Return the selection that one pattern or several make."""
        return cls(None if only is None else _patterns(only), _patterns(without))

    def takes(self, *names: str) -> bool:
        """Whether a tensor that goes by these names is wanted."""
        wanted = self.only is None or any(_matches(n, p) for n in names for p in self.only)
        return wanted and not any(_matches(n, p) for n in names for p in self.without)

    def check(self, names: Iterable[str], where: str) -> None:
        """Refuse patterns that match none of `names`: they are mistyped.

        Raises:
            ValueError: Names them.
        """
        known = set(names)
        patterns = (*(self.only or ()), *self.without)
        lost = [p for p in patterns if not any(_matches(name, p) for name in known)]
        if lost:
            raise ValueError(
                f"no tensor of {where} or of the model matches {listed(lost)}; there are"
                f" {listed(known, 8)}"
            )


def _patterns(given: Iterable[str] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(name: str, pattern: str) -> bool:
    prefix = pattern.removesuffix(".")
    return name == pattern or name.startswith(f"{prefix}.") or fnmatchcase(name, pattern)
