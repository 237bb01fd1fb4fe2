"""The table of mutations.

A mutation takes a source of random numbers and a folder, changes files there, and says what it did
and what must follow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """What was done to a checkpoint, and what must follow from it.

    Attributes:
        words: What was done.
        refused: Whether loading everything must fail.
        said: What an error of loading everything must hold.
        altered: Stored tensors whose values may differ, unseen; `None` stands for all of them.
    """

    words: str
    refused: bool = False
    said: tuple[str, ...] = ()
    altered: frozenset[str] | None = frozenset()


Mutation = Callable[[random.Random, Path], Damage]
MUTATIONS: dict[str, tuple[tuple[str, ...], Mutation]] = {}


def on(*layouts: str) -> Callable[[Mutation], Mutation]:
    """Register a mutation for these layouts."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS[mutation.__name__] = (layouts, mutation)
        return mutation

    return register
