"""The state of a model, in words for people and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.core.states import ABSENT, ModelStatus, state_name

if TYPE_CHECKING:
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.server.catalogue import Catalogue

NOT_LOADED = "not loaded"


def reason_of(model: ModelInfo) -> str:
    """Return in words what keeps a model from being used: how far a load is, why it failed."""
    name = f"model {model.model_id!r}"
    if model.status is ModelStatus.FAILED:
        return f"{name} failed to load: {model.error}{_try_again(model)}"
    if model.status is ModelStatus.LOADING:
        return f"{name} is loading: {_progress(model)}"
    if model.reloading:
        return f"{name} is ready, and being reloaded: {_progress(model)}"
    return f"{name} is {model.status.value}"


def _progress(model: ModelInfo) -> str:
    """Return how far a load is: phase, bytes, rate, time left, as far as they are known."""
    told = [model.phase.value.replace("_", " ")] if model.phase else []
    if model.bytes_total:
        share = 100 * model.bytes_done // model.bytes_total
        told.append(f"{model.bytes_done} of {model.bytes_total} bytes ({share} %)")
    if model.bytes_per_second:
        told.append(f"{format_bytes(int(model.bytes_per_second))}/s")
    if model.seconds_left is not None:
        told.append(f"{model.seconds_left:.0f} s left")
    setback = f"; the last attempt failed: {model.error}" if model.error else ""
    return ", ".join(told) + setback


def _try_again(model: ModelInfo) -> str:
    """Return when loading it again may help."""
    if model.retry_at is None:
        return ""
    moment = datetime.fromtimestamp(model.retry_at, UTC)
    return f"; it may be tried again from {moment.isoformat(timespec='seconds')} on"


def as_json(model: ModelInfo) -> dict[str, Any]:
    """Return a snapshot as plain values, with `reason` in words where it is not simply ready."""
    simply_ready = model.status is ModelStatus.READY and not model.reloading
    return asdict(model) | {"reason": "" if simply_ready else reason_of(model)}


def absent(model_id: str) -> dict[str, Any]:
    """Return the same for a model that is configured, and not there."""
    return {"model_id": model_id, "status": state_name(ABSENT), "reason": NOT_LOADED}


async def snapshot(manager: AsyncModelManager, catalogue: Catalogue) -> list[dict[str, Any]]:
    """Return every model: those of the manager, then those that are only configured."""
    models = [as_json(model) for model in await manager.list_models()]
    there = {model["model_id"] for model in models}
    return models + [absent(name) for name in catalogue.models if name not in there]
