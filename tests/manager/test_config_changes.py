"""What differs between two configurations, as values."""

from __future__ import annotations

from typing import Any

from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.config.changes import compare, in_force


def config(*models: dict[str, Any], **sections: Any) -> DaemonConfig:
    return DaemonConfig.from_dict({"models": list(models), **sections})


def model(name: str, **changes: Any) -> dict[str, Any]:
    return {"model_id": name, "model_path": "builtin:demo", **changes}


def ids(models: Any) -> list[str]:
    return [model.model_id for model in models]


def test_models_are_told_apart_by_what_must_be_done_with_them() -> None:
    old = config(*map(model, ("same", "gone", "cast", "kept")))
    new = config(
        model("new"), model("same"), model("cast", dtype="float32"), model("kept", ttl=5.0)
    )

    changes = compare(old, new)

    assert ids(changes.added) == ["new"]
    assert changes.removed == ("gone",)
    assert ids(changes.changed) == ["cast"]
    assert changes.changed[0].dtype == "float32"
    assert ids(changes.adjusted) == ["kept"]
    assert ids(changes.unchanged) == ["same"]
    assert str(changes) == "added: new; removed: gone; to be loaded again: cast; adjusted: kept"


def test_what_is_done_with_a_model_is_no_part_of_its_load() -> None:
    old = config(model("a"))
    for changes in (
        {"ttl": 1.0},
        {"pinned": True},
        {"preload": False},
        {"reload": "unload_first"},
    ):
        assert ids(compare(old, config(model("a", **changes))).adjusted) == ["a"]
    for changes in ({"warmup": True}, {"device": "cuda"}, {"config": {"component": "full"}}):
        assert ids(compare(old, config(model("a", **changes))).changed) == ["a"]


def test_the_order_of_models_changes_nothing() -> None:
    changes = compare(config(model("a"), model("b")), config(model("b"), model("a")))

    assert ids(changes.unchanged) == ["b", "a"]
    assert str(changes) == "nothing that can change while the daemon runs"


def test_limits_that_can_change_and_keys_that_can_not() -> None:
    old = config(server={"port": 1}, manager={"max_models": 2})
    new = config(
        server={"port": 2, "management": True, "log_level": "debug"},
        manager={"max_models": 3, "memory_limit": "1GiB", "max_workers": 9},
    )

    changes = compare(old, new)

    assert changes.limits == ("max_models", "memory_limit")
    assert changes.server == ("log_level",)
    assert changes.fixed == ("server.port", "server.management", "manager.max_workers")


def test_what_is_in_force_keeps_what_can_not_change() -> None:
    old = config(model("a"), server={"port": 1}, manager={"max_workers": 2})
    new = config(
        model("b"),
        server={"port": 2, "log_level": "debug"},
        manager={"max_workers": 9, "eviction": True},
    )

    now = in_force(old, new)

    assert ids(now.models) == ["b"]
    assert (now.server.port, now.server.log_level) == (1, "debug")
    assert (now.manager.max_workers, now.manager.eviction) == (2, True)
    assert compare(now, new).fixed == ("server.port", "manager.max_workers")
