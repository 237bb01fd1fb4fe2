"""The storm over the manager's core at full length, on asyncio and on uvloop."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from lifecycle_storm.driver import storm

_LENGTH = 60


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Do at least `count` operations, in storms of some dozens on a manager each."""
    logging.disable(logging.CRITICAL)
    tried = number = 0
    while tried < count:
        uvloop = number % 2 == 1
        for what, wrong in storm(seed, number, _LENGTH, uvloop=uvloop):
            tried += 1
            yield f"storm {number} on {'uvloop' if uvloop else 'asyncio'}: {what}", wrong
        number += 1
