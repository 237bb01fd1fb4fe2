"""A slice of `scripts/soak lifecycle`."""

from __future__ import annotations

import time

import pytest
from lifecycle_storm.driver import storm
from lifecycle_storm.watchdog import Watchdog


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("number", range(6))
def test_nothing_is_wrong_after_any_operation_of_a_storm(number: int, uvloop: bool) -> None:
    trials = storm(4, number, 60, uvloop=uvloop)

    wrong = [f"{place}: {what}: {said}" for place, (what, said) in enumerate(trials) if said]
    assert wrong == [], [what for what, _ in trials]
    assert len(trials) == 62


@pytest.mark.anyio
async def test_the_watchdog_sees_a_blocked_loop() -> None:
    async with Watchdog(0.2) as watchdog:
        time.sleep(0.6)  # noqa: ASYNC251 - that is the point

    assert "test_the_watchdog_sees_a_blocked_loop" in watchdog.blocked[0]
