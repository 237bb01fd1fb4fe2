"""Metrics that are set from snapshots, and the two forms of logs."""

from __future__ import annotations

import json
import logging

import pytest

from splitlearn_manager import ModelInfo, ModelStatus
from splitlearn_manager.core.events import TransitionEvent
from splitlearn_manager.core.resources import ResourceUsage
from splitlearn_manager.observability import JsonFormatter, Metrics, configure_logging


def moved(old: ModelStatus, new: ModelStatus, seconds: float = 2.0) -> TransitionEvent:
    return TransitionEvent("trunk", 1, old, new, "why", seconds, 0.0)


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

    metrics.model_moved(moved(ModelStatus.LOADING, ModelStatus.READY))
    metrics.model_moved(moved(ModelStatus.LOADING, ModelStatus.FAILED))
    metrics.model_moved(moved(ModelStatus.READY, ModelStatus.UNLOADING))

    value = metrics.registry.get_sample_value
    assert value("splitlearn_model_load_duration_seconds_sum") == 2.0
    assert value("splitlearn_model_load_duration_seconds_count") == 1
    assert value("splitlearn_model_load_failures_total", {"model": "trunk"}) == 1


def test_memory_is_shown_for_each_device() -> None:
    metrics = Metrics()

    metrics.observe_memory(ResourceUsage("cpu", 100, 30, 50, {}))

    value = metrics.registry.get_sample_value
    assert value("splitlearn_memory_capacity_bytes", {"device": "cpu"}) == 100
    assert value("splitlearn_memory_reserved_bytes", {"device": "cpu"}) == 30


def test_two_daemons_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()

    one.sessions_open("trunk", 1)

    assert other.registry.get_sample_value("splitlearn_sessions_open", {"model": "trunk"}) is None


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
