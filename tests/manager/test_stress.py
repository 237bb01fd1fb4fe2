"""A slice of `scripts/soak stress`."""

from __future__ import annotations

import pytest
from lifecycle_stress import Stress

pytestmark = pytest.mark.anyio


async def test_nothing_is_lost_while_many_load_and_unload_one_model() -> None:
    stress = Stress()

    await stress.pairs(tasks=32, times=12)

    assert stress.wrong == []
    loads = stress.moves["loading", "ready"]
    assert loads == stress.moves["unloading", None] > 10
    assert set(stress.told) <= {
        "model_already_loaded",
        "model_loading",
        "model_unloading",
        "model_not_found",
    }


async def test_no_request_fails_while_a_model_is_reloaded_now_and_then_in_vain() -> None:
    stress = Stress(share=0.2, seed=3)

    await stress.reloads(times=60)

    assert stress.wrong == []
    assert stress.told == {"reload failed": stress.loader.failed}
    assert 0 < stress.loader.failed < 60
    assert stress.moves["ready", "ready"] == 60 - stress.loader.failed
    assert stress.served > 60
