"""What users are told of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitlearn_manager.core.states import LoadPhase, ModelStatus


@dataclass(frozen=True)
class ModelInfo:
    """A snapshot of one model, for users.

    Attributes:
        model_id: Its id.
        status: Its state.
        component: `bottom`, `trunk`, …; `None` for a pipeline.
        start_layer: First layer; `None` while not known, and where it has no one range of layers.
        end_layer: One past the last layer; `None` likewise.
        device: Where it is, or is to be.
        dtype: Name of the weights' dtype; `None` while not known.
        loaded_at: When it became ready, in seconds since the epoch.
        last_used: When it was last used, likewise.
        request_count: Uses since it became ready.
        in_flight: Uses that have not ended.
        bytes_total: Bytes of weights to load.
        bytes_done: How many of them are in.
        reserved_bytes: Memory promised to it, the budget for its sessions included.
        resident_bytes: Memory that its weights take, measured when it was loaded.
        error: Why it failed; of a load that is tried again, why its last attempt did.
        generation: Number of the load that made it; a reload has a higher one.
        phase: What a load is at; `None` when none is under way.
        elapsed_s: Seconds since the load under way was asked for.
        bytes_per_second: How fast its bytes come; `None` while not known.
        seconds_left: How long the rest of them will take at that rate; `None` while not known.
        reloading: Whether a newer load is to take the place of this one; phase, bytes done and
            total, elapsed, rate and time left are then of that load.
        failed_at: When it failed, in seconds since the epoch.
        retry_at: When loading it again may help, with nothing changed; `None` if that never will.
        pinned: Whether it is never unloaded to make room, or because nobody uses it.
        predicted_bytes: What its weights were estimated to take; 0 while not known.
        quantization: How its linear layers are packed, once it is loaded; `None`: not at all.
        kv_cache_budget: What of `reserved_bytes` the KV caches of its sessions may have, at most;
            `None` where they reserve what they take, beside it.
        kv_cache_bytes: What those have now.
    """

    model_id: str
    status: ModelStatus
    component: str | None = None
    start_layer: int | None = None
    end_layer: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    loaded_at: float | None = None
    last_used: float | None = None
    request_count: int = 0
    in_flight: int = 0
    bytes_total: int = 0
    bytes_done: int = 0
    reserved_bytes: int = 0
    resident_bytes: int = 0
    error: str | None = None
    generation: int = field(default=0, compare=False)
    phase: LoadPhase | None = None
    elapsed_s: float | None = field(default=None, compare=False)
    bytes_per_second: float | None = field(default=None, compare=False)
    seconds_left: float | None = field(default=None, compare=False)
    reloading: bool = False
    failed_at: float | None = field(default=None, compare=False)
    retry_at: float | None = field(default=None, compare=False)
    pinned: bool = False
    predicted_bytes: int = field(default=0, compare=False)
    quantization: str | None = None
    kv_cache_budget: int | None = None
    kv_cache_bytes: int = 0
