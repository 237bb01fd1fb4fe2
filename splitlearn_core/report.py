"""What a split will cost, from a model's config and headers: no weight is read.

`splitlearn plan` prints it.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.builder import draw_each
from splitlearn_core.devices import check_device, resolve_devices
from splitlearn_core.dtypes import as_dtype, dtype_name, main_dtype
from splitlearn_core.errors import DoesNotFitError
from splitlearn_core.estimate import MemoryEstimate, estimate_part
from splitlearn_core.factory import AUTO, find_model
from splitlearn_core.kv_cache import kv_bytes_per_token
from splitlearn_core.loading.files import stored_config
from splitlearn_core.loading.hub_source import HubSource
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.opening import open_source
from splitlearn_core.machine import cuda_memory, host_memory
from splitlearn_core.plan import FULL, SplitPlan
from splitlearn_core.shape import shape_of
from splitlearn_core.side_values import hidden_dtype, hidden_sizes, made_values, received_values

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from splitlearn_core.builder import Blueprint
    from splitlearn_core.devices import DeviceMap
    from splitlearn_core.factory import OpenModel
    from splitlearn_core.loading.sources import StoredTensor, TensorSource
    from splitlearn_core.plan import ComponentSpec
    from splitlearn_core.side_values import CrossingValue

HIDDEN_STATES = "hidden_states"


@dataclass(frozen=True)
class PartReport:
    """What one part will cost; sizes in bytes.

    Attributes:
        component: `bottom`, `trunk`, …, `top`, or `full` for the whole model.
        start_layer: First layer.
        end_layer: One past the last.
        device: Where its weights go.
        parameters: Number of weights; one that is used twice counts once.
        disk_bytes: What it needs of the checkpoint.
        download_bytes: What of that is not on this machine yet.
        peak_bytes: Memory at the worst moment of its load, mapped pages counted fully.
        steady_bytes: Memory once it is loaded.
        kv_bytes_per_token: Growth of its KV cache by each token of each sequence; `None` where
            that is not known, see `splitlearn_core.kv_cache`.
        wire_in_bytes_per_token: What it is sent for each token; 0 for token ids, which stay with
            whoever has Bottom; `None` where what goes with the hidden state has no limit.
        wire_out_bytes_per_token: What it sends back; 0 for logits, which stay; `None` likewise.
        memory_bytes: All the memory that it can have: its device's, or what was given.
        fits: Whether its peak is no more than that.
    """

    component: str
    start_layer: int
    end_layer: int
    device: str
    parameters: int
    disk_bytes: int
    download_bytes: int
    peak_bytes: int
    steady_bytes: int
    kv_bytes_per_token: int | None
    wire_in_bytes_per_token: int | None
    wire_out_bytes_per_token: int | None
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class CutReport:
    """What goes over the wire at one cut.

    Attributes:
        layer: First layer after the cut.
        before: The part that sends.
        after: The part that receives.
        bytes_per_token: How much, at most; `None` where there is no limit.
        crosses: What: names of the values.
        reveals: Of those that tell whoever gets them more than the hidden state does: what.
    """

    layer: int
    before: str
    after: str
    bytes_per_token: int | None
    crosses: tuple[str, ...]
    reveals: Mapping[str, str]


@dataclass(frozen=True)
class HomeReport:
    """What the machine costs that has Bottom and Top, and whose Trunks are elsewhere.

    Attributes:
        parts: What is there.
        disk_bytes: What these parts need of the checkpoint; what several use counts once.
        download_bytes: What of that is not on this machine yet.
        peak_bytes: Memory at the worst moment of loading them, one after the other, mapped pages
            counted fully.
        steady_bytes: Memory once they are loaded.
        kv_bytes_per_token: Growth of their KV caches by each token of each sequence; `None` where
            that is not known.
        sent_bytes_per_token: What goes to the Trunks for each token, without the frames around it;
            `None` where it has no limit.
        received_bytes_per_token: What comes back from them.
        fits: Whether the peak is no more than what is available on this machine now.
    """

    parts: tuple[str, ...]
    disk_bytes: int
    download_bytes: int
    peak_bytes: int
    steady_bytes: int
    kv_bytes_per_token: int | None
    sent_bytes_per_token: int | None
    received_bytes_per_token: int | None
    fits: bool


@dataclass(frozen=True)
class PlanReport:
    """What a split will cost.

    Attributes:
        model: Folder or hub name.
        model_type: Architecture.
        num_layers: Of the whole model.
        hidden_size: Width of the hidden state.
        dtype: Of the weights once they are loaded.
        split_points: Where it is cut.
        parts: From Bottom to Top.
        cuts: From the first to the last.
        whole: The model unsplit, on the CPU.
        home: What a machine with Bottom and Top alone holds, fetches and sends.
        host_bytes: Memory of this machine, or of its container.
        available_bytes: What of that is not in use now.
    """

    model: str
    model_type: str
    num_layers: int
    hidden_size: int
    dtype: str
    split_points: tuple[int, ...]
    parts: tuple[PartReport, ...]
    cuts: tuple[CutReport, ...]
    whole: PartReport
    home: HomeReport
    host_bytes: int
    available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether every part fits where it is to go, by itself."""
        return all(part.fits for part in self.parts)

    @property
    def whole_fits_now(self) -> bool:
        """Whether the whole model fits into what is available on this machine now."""
        return self.whole.peak_bytes <= self.available_bytes

    @property
    def advice(self) -> str:
        """What the figures mean for this machine."""
        if self.whole_fits_now:
            return "the whole model fits here: on this machine, splitting it only makes it slower"
        if self.whole.fits:
            missing = self.whole.peak_bytes - self.available_bytes
            told = (
                f"the whole model does not fit into what is free now, {missing:,} bytes more would"
                " do"
            )
        else:
            told = "the whole model does not fit here"
        if self.home.fits:
            return f"{told}; Bottom and Top do, with the Trunk elsewhere"
        return f"{told}, and neither do Bottom and Top: cut nearer to the ends"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON: in bytes, with names that stay."""
        return {
            **asdict(self),
            "fits": self.fits,
            "whole_fits_now": self.whole_fits_now,
            "advice": self.advice,
        }


def report_plan(
    model_name_or_path: str | os.PathLike[str],
    split_points: Iterable[int],
    *,
    model_type: str = AUTO,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap = None,
    memory: int | None = None,
    mmap: bool = True,
    allow_empty: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    minimind: Mapping[str, Any] | None = None,
) -> PlanReport:
    """Work out what a split will cost; of weights only the headers are read.

    Args:
        model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file.
        split_points: Layer numbers of the cuts.
        model_type: Architecture; `auto` takes the config's.
        dtype: What weights will be cast to; `None` keeps what is stored.
        device: Device of every part that `device_map` does not name.
        device_map: `None`, `"auto"`, or part name -> device.
        memory: Bytes that the machine of each part has; by default this one's, or the device's.
        mmap: Whether weights will stay mapped where nothing must change.
        allow_empty: Let Bottom or Top have no layers.
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        token: For the hub; `None` uses `HF_TOKEN` or the login.
        allow_uncertified: Let in an architecture that was not certified.
        minimind: As in `load_component`.

    Raises:
        DoesNotFitError: (a `ValueError`) A part can't be loaded where it is to go; has the report.
        ModelSourceError, CheckpointError, UnsupportedModelError, ValueError: As `load_component`.
    """
    model = find_model(
        model_name_or_path,
        model_type=model_type,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    plan = SplitPlan.from_split_points(model.num_layers, split_points, allow_empty=allow_empty)
    resolved = as_dtype(dtype)
    devices = resolve_devices(plan, device, device_map)
    placements = {name: Placement(devices[name], resolved, mmap) for name in plan.names}
    placements[FULL] = Placement(check_device("cpu"), resolved, mmap)
    report = _report(model, plan, placements, memory)
    if not report.fits:
        raise DoesNotFitError(_misfits(report), report)
    return report


def _report(
    model: OpenModel, plan: SplitPlan, placements: Mapping[str, Placement], memory: int | None
) -> PlanReport:
    """Draw every part, and the whole, and add up."""
    specs = (*plan.components, plan.component(FULL))
    with closing(open_source(model.files)) as source:
        reporter = _Reporter(model, source, memory)
        dtype = placements[FULL].dtype
        drawn = draw_each(model.config, specs, source, model.description, model.family, dtype)
        *parts, whole = [
            reporter.part(spec, blueprint, placements[spec.name])
            for spec, blueprint in zip(specs, drawn, strict=True)
        ]
        cuts = tuple(_cuts(model, plan, parts, reporter.dtype))
        home = reporter.home(parts)
    return PlanReport(
        model=model.description,
        model_type=model.config.model_type,
        num_layers=plan.num_layers,
        hidden_size=reporter.hidden_size,
        dtype=dtype_name(reporter.dtype),
        split_points=tuple(part.end_layer for part in parts[:-1]),
        parts=tuple(parts),
        cuts=cuts,
        whole=whole,
        home=home,
        host_bytes=reporter.host.total,
        available_bytes=reporter.host.available,
    )


class _Reporter:
    """Adds up what parts need."""

    def __init__(self, model: OpenModel, source: TensorSource, memory: int | None) -> None:
        self.host = host_memory()
        self.dtype = torch.float32
        self._model = model
        self._source = source
        self._memory = memory
        self._stored: dict[str, Mapping[str, StoredTensor]] = {}
        self.hidden_size = shape_of(*stored_config(model.files), lambda _: model.family).hidden_size

    def part(self, spec: ComponentSpec, blueprint: Blueprint, placement: Placement) -> PartReport:
        """Report one part, or the whole model."""
        stored = self._stored[spec.name] = blueprint.reads.stored
        estimate = estimate_part(blueprint, placement)
        self.dtype = _final_dtype(stored.values())
        itemsize = self.dtype.itemsize
        memory = self._memory_of(spec, placement.device)
        sent, returned = _beside(self._model, spec, self.dtype)
        hidden = _hidden_bytes(self._model, self.dtype)
        return PartReport(
            component=spec.name,
            start_layer=spec.start_layer,
            end_layer=spec.end_layer,
            device=str(placement.device),
            parameters=sum(p.numel() for p in blueprint.model.parameters()),
            disk_bytes=blueprint.reads.nbytes,
            download_bytes=self._missing(stored),
            peak_bytes=estimate.peak_bytes,
            steady_bytes=estimate.steady_bytes,
            kv_bytes_per_token=kv_bytes_per_token(
                blueprint.model, blueprint.family, spec, itemsize
            ),
            wire_in_bytes_per_token=0 if spec.is_first else _add(hidden, sent),
            wire_out_bytes_per_token=0 if spec.is_last else _add(hidden, returned),
            memory_bytes=memory,
            fits=estimate.peak_bytes <= memory,
        )

    def home(self, parts: Sequence[PartReport]) -> HomeReport:
        """Report what Bottom and Top cost together; `part` has been asked of all of them."""
        ends = (parts[0], parts[-1])
        stored = {name: t for end in ends for name, t in self._stored[end.component].items()}
        loads = [MemoryEstimate(end.peak_bytes, end.steady_bytes) for end in ends]
        both = loads[0] + loads[1]
        trunks = parts[1:-1]
        return HomeReport(
            parts=tuple(end.component for end in ends),
            disk_bytes=sum(tensor.nbytes for tensor in stored.values()),
            download_bytes=self._missing(stored),
            peak_bytes=both.peak_bytes,
            steady_bytes=both.steady_bytes,
            kv_bytes_per_token=_sum(end.kv_bytes_per_token for end in ends),
            sent_bytes_per_token=_sum(trunk.wire_in_bytes_per_token for trunk in trunks),
            received_bytes_per_token=_sum(trunk.wire_out_bytes_per_token for trunk in trunks),
            fits=both.peak_bytes <= self.host.available,
        )

    def _missing(self, stored: Iterable[str]) -> int:
        """Return how many bytes of a part are not on this machine yet.

        Files that can't be read in ranges are fetched whole, before their headers are.
        """
        source = self._source
        return source.missing_bytes(stored) if isinstance(source, HubSource) else 0

    def _memory_of(self, spec: ComponentSpec, device: torch.device) -> int:
        """Return all the memory that a part can have; the whole model is always planned here."""
        if self._memory is not None and spec.name != FULL:
            return self._memory
        return cuda_memory(device.index or 0).total if device.type == "cuda" else self.host.total


def _final_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """Return the dtype that most of a part's weights will have."""
    final = [(t.final_dtype, math.prod(t.shape)) for t in stored]
    return main_dtype(final) or final[0][0]


def _cuts(
    model: OpenModel, plan: SplitPlan, parts: Sequence[PartReport], dtype: torch.dtype
) -> Iterator[CutReport]:
    """Yield what crosses between each part and the next.

    Bottom and Top have what is made of the tokens before the layers, and send each Trunk what it
    needs of that; Top gets what the last Trunk made.
    """
    for (before, after), (first, second) in zip(
        pairwise(parts), pairwise(plan.components), strict=True
    ):
        sent, _ = _beside(model, second, dtype)
        _, returned = _beside(model, first, dtype)
        beside = returned if second.is_last and not first.is_first else sent
        yield CutReport(
            layer=after.start_layer,
            before=before.component,
            after=after.component,
            bytes_per_token=_add(_hidden_bytes(model, dtype), beside),
            crosses=(HIDDEN_STATES, *(value.name for value in beside)),
            reveals={value.name: value.reveals for value in beside if value.reveals},
        )


def _beside(
    model: OpenModel, spec: ComponentSpec, dtype: torch.dtype
) -> tuple[tuple[CrossingValue, ...], tuple[CrossingValue, ...]]:
    """Return what a part is sent besides the hidden state, and what it sends back."""
    return (
        received_values(model.family, model.config, spec, dtype),
        made_values(model.family, model.config, spec, dtype),
    )


def _hidden_bytes(model: OpenModel, dtype: torch.dtype) -> int:
    """Return the bytes of the hidden state for each token."""
    elements = math.prod(hidden_sizes(model.family, model.config))
    return elements * hidden_dtype(model.family, model.config, dtype).itemsize


def _sum(figures: Iterable[int | None]) -> int | None:
    """Add up; `None` where one is not known."""
    found = list(figures)
    return None if None in found else sum(figure for figure in found if figure is not None)


def _add(hidden: int, beside: Iterable[CrossingValue]) -> int | None:
    """Add up bytes for each token; `None` where one has no limit."""
    return _sum([hidden, *(value.bytes_per_token for value in beside)])


def _misfits(report: PlanReport) -> str:
    """Say which parts are too large, and for what."""
    parts = [
        f"{part.component} needs {part.peak_bytes:,} bytes at its peak, its machine ({part.device})"
        f" has {part.memory_bytes:,}"
        for part in report.parts
        if not part.fits
    ]
    return f"{'; '.join(parts)}: cut elsewhere, make more parts, or take a smaller dtype"
