from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import splitlearn_manager
from splitlearn_manager import AsyncModelManager, ModelInfo

NAMES = {
    "AsyncManagedModel",
    "AsyncModelManager",
    "ModelConfig",
    "ModelInfo",
    "ModelLoader",
    "ModelStatus",
    "ResourceManager",
    "ServerConfig",
}
METHODS = {
    "adopt_config",
    "cancel_load",
    "check_alive",
    "ensure_model",
    "events",
    "get_model",
    "get_model_info",
    "infer",
    "list_models",
    "load_model",
    "reload_model",
    "set_limits",
    "shutdown",
    "start_ensure",
    "start_load",
    "start_reload",
    "start_unload",
    "stop_loading",
    "subscribe",
    "unload_model",
    "use",
}


def test_the_public_names_are_these() -> None:
    assert set(splitlearn_manager.__all__) == NAMES
    for name in NAMES:
        assert getattr(splitlearn_manager, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'splitlearn_manager' has no attribute 'Nothing'"):
        _ = splitlearn_manager.Nothing


def test_the_methods_of_the_manager_are_these() -> None:
    members = inspect.getmembers(AsyncModelManager, inspect.isfunction)

    assert {name for name, _ in members if not name.startswith("_")} == METHODS


def test_a_snapshot_has_these_fields() -> None:
    assert [field.name for field in fields(ModelInfo)] == [
        "model_id",
        "status",
        "component",
        "start_layer",
        "end_layer",
        "device",
        "dtype",
        "loaded_at",
        "last_used",
        "request_count",
        "in_flight",
        "bytes_total",
        "bytes_done",
        "reserved_bytes",
        "resident_bytes",
        "error",
        "generation",
        "phase",
        "elapsed_s",
        "bytes_per_second",
        "seconds_left",
        "reloading",
        "failed_at",
        "retry_at",
        "pinned",
        "predicted_bytes",
        "quantization",
        "kv_cache_budget",
        "kv_cache_bytes",
    ]
