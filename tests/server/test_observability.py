"""Metrics that are set from snapshots, and the two forms of logs."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from splitlearn_manager import ModelInfo, ModelStatus
from splitlearn_manager.core.events import ReloadFailedEvent, TransitionEvent
from splitlearn_manager.core.resources import ResourceUsage
from splitlearn_manager.core.states import State
from splitlearn_manager.observability import (
    CURRENT_REQUEST,
    JsonFormatter,
    Metrics,
    configure_logging,
)


def moved(old: State, new: State, code: str = "", **changes: Any) -> TransitionEvent:
    return TransitionEvent("trunk", 1, old, new, "why", 2.0, 0.0, code=code, **changes)


def test_a_model_has_one_state_at_a_time() -> None:
    metrics = Metrics()

    metrics.observe_models([ModelInfo("trunk", ModelStatus.LOADING)])
    metrics.observe_models([ModelInfo("trunk", ModelStatus.READY)])

    states = {
        status.value: metrics.registry.get_sample_value(
            "splitlearn_model_state", {"model": "trunk", "state": status.value}
        )
        for status in ModelStatus
    }
    assert states == {"loading": 0, "ready": 1, "unloading": 0, "failed": 0}


def test_a_model_that_is_gone_has_no_state() -> None:
    metrics = Metrics()
    metrics.observe_models([ModelInfo("trunk", ModelStatus.READY)])

    metrics.observe_models([])

    assert b'model="trunk"' not in metrics.render()


def test_loads_are_counted_when_they_end() -> None:
    metrics = Metrics()

    metrics.model_moved(moved(None, ModelStatus.LOADING))
    metrics.model_moved(moved(ModelStatus.LOADING, ModelStatus.READY, load_s=3.0, queued_s=1.0))
    metrics.model_moved(moved(ModelStatus.READY, ModelStatus.READY, load_s=4.0, queued_s=2.0))
    metrics.model_moved(moved(ModelStatus.LOADING, ModelStatus.FAILED, "fetch_failed", load_s=9.0))
    metrics.reload_failed(ReloadFailedEvent("trunk", 2, "", "why", "fetch_failed", 0.0))

    value = metrics.registry.get_sample_value
    assert value("splitlearn_model_load_duration_seconds_sum") == 7.0
    assert value("splitlearn_model_load_duration_seconds_count") == 2
    assert value("splitlearn_model_load_queue_seconds_sum") == 3.0
    assert value("splitlearn_model_load_failures_total", {"reason": "fetch_failed"}) == 2


def test_unloads_and_evictions_are_counted() -> None:
    metrics = Metrics()

    metrics.model_moved(moved(ModelStatus.READY, ModelStatus.UNLOADING))
    metrics.model_moved(moved(ModelStatus.UNLOADING, None))
    metrics.model_moved(moved(ModelStatus.READY, ModelStatus.UNLOADING, "idle"))
    metrics.model_moved(moved(ModelStatus.FAILED, None))

    value = metrics.registry.get_sample_value
    assert value("splitlearn_model_unload_duration_seconds_count") == 1
    assert value("splitlearn_model_unload_duration_seconds_sum") == 2.0
    assert value("splitlearn_model_evictions_total", {"reason": "idle"}) == 1
    assert value("splitlearn_model_age_at_eviction_seconds_sum") == 2.0


def test_sizes_and_loads_under_way_are_shown() -> None:
    metrics = Metrics()

    metrics.observe_models(
        [
            ModelInfo("a", ModelStatus.LOADING, predicted_bytes=7),
            ModelInfo("b", ModelStatus.READY, reloading=True, predicted_bytes=8, resident_bytes=9),
            ModelInfo("c", ModelStatus.READY, kv_cache_budget=6, kv_cache_bytes=5),
        ]
    )

    value = metrics.registry.get_sample_value
    assert value("splitlearn_model_loads_in_progress") == 2
    for model, kind, size in (("a", "predicted", 7), ("b", "predicted", 8), ("b", "actual", 9)):
        assert value("splitlearn_model_size_bytes", {"model": model, "kind": kind}) == size
    for model, kind, nbytes in (("c", "budget", 6), ("c", "used", 5), ("b", "budget", None)):
        labels = {"model": model, "kind": kind}
        assert value("splitlearn_model_kv_cache_bytes", labels) == nbytes


def test_requests_in_flight_and_the_loops_lag() -> None:
    metrics = Metrics()

    metrics.request_began(1)
    metrics.request_began(1)
    metrics.request_began(-1)
    metrics.loop_lag(0.5)

    value = metrics.registry.get_sample_value
    assert value("splitlearn_requests_in_flight") == 1
    assert value("splitlearn_event_loop_lag_seconds_sum") == 0.5


def test_memory_is_shown_for_each_device() -> None:
    metrics = Metrics()

    metrics.observe_memory(ResourceUsage("cpu", 100, 30, 50, {}), used=20)

    value = metrics.registry.get_sample_value
    assert value("splitlearn_memory_capacity_bytes", {"device": "cpu"}) == 100
    assert value("splitlearn_memory_reserved_bytes", {"device": "cpu"}) == 30
    assert value("splitlearn_memory_used_bytes", {"device": "cpu"}) == 20


def test_two_daemons_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()

    one.session_opened("trunk")

    opened = "splitlearn_sessions_opened_total"
    assert one.registry.get_sample_value(opened, {"model": "trunk"}) == 1
    assert other.registry.get_sample_value(opened, {"model": "trunk"}) is None


def test_json_logs_have_the_fields_of_the_record() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "f", 1, "model %s", ("x",), None)
    record.created = 0.25
    record.model_id = "x"

    assert json.loads(JsonFormatter().format(record)) == {
        "ts": "1970-01-01T00:00:00.250Z",
        "level": "warning",
        "logger": "a.b",
        "message": "model x",
        "model_id": "x",
    }


def test_json_logs_have_the_exception_on_the_same_line() -> None:
    error = KeyError("boom")
    record = logging.LogRecord("a", logging.ERROR, "f", 1, "failed", (), (KeyError, error, None))

    line = JsonFormatter().format(record)

    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("KeyError: 'boom'")


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs_go_to_stderr_from_the_level_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)

    configure_logging("warning", form)  # type: ignore[arg-type]
    logging.getLogger("a").info("quiet")
    logging.getLogger("a").warning("loud")

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "loud" in captured.err
    if form == "json":
        assert json.loads(captured.err)["message"] == "loud"


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs_say_which_request_and_operation_they_are_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging("info", form)  # type: ignore[arg-type]
    token = CURRENT_REQUEST.set("req-1")

    logging.getLogger("a").info("one", extra={"operation_id": "op-1"})
    CURRENT_REQUEST.reset(token)
    logging.getLogger("a").info("two")

    one, two = capsys.readouterr().err.splitlines()
    if form == "json":
        assert (json.loads(one)["request_id"], json.loads(one)["operation_id"]) == ("req-1", "op-1")
        assert "request_id" not in json.loads(two)
    else:
        assert one.endswith("one [operation_id=op-1 request_id=req-1]")
        assert two.endswith(": two")
