"""What `/metrics` says after work that is known, of a daemon with real parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from infer_requests import entry, models, serving
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import FakePart, Owner, ask

from splitlearn_core.page_sizes import memory_of
from splitlearn_manager import AsyncModelManager, ModelInfo, ModelStatus
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.usage import ModelUsage
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, encode

TRUNK = "trunk-float32"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

HIDDEN = 32
KV_BYTES = 2 * 2 * (2 * 8) * 4
"""Of a position: 2 layers, keys and values, 2 heads of 8, float32."""


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Any) -> Iterator[str]:
    with serving(models(tiny_checkpoint, "float32")[:2]) as url:
        yield url


def scrape(url: str) -> Samples:
    text = ask(url, "/metrics").body.decode()
    return {
        (sample.name.removeprefix("splitlearn_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset({"model": TRUNK, **labels}.items())))


def step_bytes(new: int) -> int:
    """Return the length of a STEP, and of the RESULT that answers it."""
    tensor = tensor_to_wire(TensorName.HIDDEN_STATES, torch.zeros(1, new, HIDDEN))
    return len(encode(Frame(Kind.STEP, 1, 1, tensors=(tensor,))))


def test_sessions_are_counted_exactly(url: str) -> None:
    with RemoteTrunk(url, TRUNK) as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        for new in (20, 1, 1, 1):
            trunk(torch.ones(1, new, HIDDEN), past_key_values=cache)
        sent, received = trunk.bytes_sent, trunk.bytes_received
        open_now = scrape(url)
        cache.close()
        closed = scrape(url)

    assert value(open_now, "sessions_open") == 1
    assert value(open_now, "sessions_opened_total") == 1
    assert value(open_now, "session_steps_total", code="ok") == 4
    assert value(open_now, "session_tokens_total", phase="prefill") == 20
    assert value(open_now, "session_tokens_total", phase="decode") == 3
    assert value(open_now, "session_batch_rows_sum") == 4
    assert value(open_now, "session_forward_duration_seconds_count") == 4
    assert value(open_now, "session_step_queue_seconds_count") == 4
    assert value(open_now, "session_queue_steps") == 0
    assert value(open_now, "cache_tokens") == 23
    assert value(open_now, "cache_allocated_bytes") == memory_of(23 * KV_BYTES)
    assert value(open_now, "cache_reserved_bytes") == 64 * KV_BYTES
    assert value(open_now, "received_bytes_total", protocol="sessions") == sent
    assert value(open_now, "sent_bytes_total", protocol="sessions") == received
    assert sent > step_bytes(20) + 3 * step_bytes(1)

    assert value(closed, "sessions_open") == 0
    assert value(closed, "sessions_ended_total", reason="closed") == 1
    assert value(closed, "cache_tokens") == 0
    assert value(closed, "cache_allocated_bytes") == 0
    assert value(closed, "cache_reserved_bytes") == 0


def test_the_budget_of_caches_is_what_models_leave(url: str) -> None:
    before = scrape(url)
    with RemoteTrunk(url, TRUNK) as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(torch.ones(1, 3, HIDDEN), past_key_values=cache)
        during = scrape(url)

    cpu = frozenset({("device", "cpu")})
    assert during["cache_budget_bytes", cpu] == before["cache_budget_bytes", cpu]
    assert during["memory_reserved_bytes", cpu] == (
        before["memory_reserved_bytes", cpu] + 64 * KV_BYTES
    )
    assert before["cache_budget_bytes", cpu] == (
        before["memory_capacity_bytes", cpu] - before["memory_reserved_bytes", cpu]
    )


def test_inference_is_counted_exactly(url: str) -> None:
    body = json.dumps(
        {"inputs": [entry("hidden_states", np.zeros((2, 5, HIDDEN), dtype=np.float32))]}
    ).encode()
    path = f"/v2/models/{TRUNK}/infer"
    before = scrape(url)
    answers = [ask(url, path, "POST", body) for _ in range(3)]
    refused = ask(url, path, "POST", b"{}")
    after = scrape(url)

    def more(name: str, **labels: str) -> float:
        return (value(after, name, **labels) or 0) - (value(before, name, **labels) or 0)

    assert [answer.status for answer in (*answers, refused)] == [200, 200, 200, 400]
    assert more("infer_requests_total", code="ok") == 3
    assert more("infer_requests_total", code="bad_request") == 1
    assert more("infer_tokens_total") == 3 * 2 * 5
    assert more("infer_duration_seconds_count") == 3
    assert more("infer_queue_seconds_count") == 3
    assert more("infer_forward_duration_seconds_count") == 3
    assert more("received_bytes_total", protocol="infer") == 3 * len(body) + len(b"{}")
    assert more("sent_bytes_total", protocol="infer") == sum(len(one.body) for one in answers)
    assert value(after, "infer_requests_in_flight") == 0


def test_a_refused_model_has_no_series(url: str) -> None:
    assert ask(url, "/v2/models/made-up/infer", "POST", b"{}").status == 404

    assert not [labels for _, labels in scrape(url) if ("model", "made-up") in labels]


def test_series_of_a_model_that_is_gone_are_shown_once_more() -> None:
    metrics = Metrics()
    present = [ModelInfo("a", ModelStatus.READY), ModelInfo("b", ModelStatus.READY)]
    for model in present:
        metrics.session_opened(model.model_id)
        metrics.session_step(model.model_id, "ok", 0.1, 1, "decode")

    shown = []
    for models_now in (present, present[:1], present[:1]):
        metrics.observe_models(models_now)
        shown.append({name for name in "ab" if f'model="{name}"'.encode() in metrics.render()})

    assert shown == [{"a", "b"}, {"a", "b"}, {"a"}]


def test_a_model_that_comes_back_begins_anew() -> None:
    metrics = Metrics()
    metrics.session_opened("a")
    for _ in range(2):
        metrics.observe_models([])
    metrics.session_opened("a")

    found = metrics.registry.get_sample_value("splitlearn_sessions_opened_total", {"model": "a"})
    assert found == 1


def test_what_sessions_have_is_asked_for_when_it_is_shown() -> None:
    metrics = Metrics()
    usage = {"a": ModelUsage(sessions=2, waiting=3, tokens=4, allocated_bytes=5, reserved_bytes=6)}
    metrics.follow_sessions(lambda: usage)

    value = metrics.registry.get_sample_value
    names = ("sessions_open", "session_queue_steps", "cache_tokens", "cache_allocated_bytes")
    assert [value(f"splitlearn_{name}", {"model": "a"}) for name in names] == [2, 3, 4, 5]
    usage.clear()
    assert value("splitlearn_sessions_open", {"model": "a"}) is None


@pytest.mark.anyio
async def test_a_cache_that_changes_while_it_is_measured_keeps_its_figure(
    manager: AsyncModelManager, part: FakePart, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Any) -> int:
        if self.length:
            raise RuntimeError("dictionary changed size during iteration")
        return 7

    monkeypatch.setattr(
        type(part.new_cache()), "allocated_nbytes", property(measure), raising=False
    )
    async with SessionTable(manager, max_sessions=1, idle_timeout=9.0, metrics=Metrics()) as table:
        session = await table.open(Owner(), "trunk")
        assert table.usage()["trunk"].allocated_bytes == 7
        session.state.cache.length = 1
        session.last_used += 1

        assert table.usage()["trunk"].allocated_bytes == 7


@pytest.mark.anyio
async def test_scrapes_come_one_after_the_other(
    serve: Any, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve("trunk")
    most, now = 0, 0
    list_models = manager.list_models

    async def listed() -> Any:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.to_thread(ask, served.url, "/v2/health/live")
        now -= 1
        return await list_models()

    monkeypatch.setattr(manager, "list_models", listed)
    answers = await asyncio.gather(*(served.ask("/metrics") for _ in range(3)))

    assert most == 1
    assert [answer.status for answer in answers] == [200] * 3
