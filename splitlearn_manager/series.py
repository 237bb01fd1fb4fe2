"""Series of metrics that have a model in their labels: cheap to reach, and gone with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from splitlearn_manager.serving.usage import ModelUsage

M = TypeVar("M", bound=MetricWrapperBase)

_USAGE = {
    "sessions": ("sessions_open", "Sessions that are open"),
    "waiting": ("session_queue_steps", "Steps that wait for their turn"),
    "tokens": ("cache_tokens", "Positions in the caches of sessions, times rows"),
    "allocated_bytes": ("cache_allocated_bytes", "Memory of these caches, measured"),
    "reserved_bytes": ("cache_reserved_bytes", "Memory promised to these caches"),
}


class PerModel(Generic[M]):
    """A metric whose first label is a model.

    Its series are looked up once each: the library's own way takes longer than counting does.
    """

    def __init__(self, metric: M) -> None:
        self._metric = metric
        self._series: dict[tuple[str, ...], M] = {}

    def __call__(self, *labels: str) -> M:
        """Return the series with these labels, the model first."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = self._metric.labels(*labels)
        return series

    def models(self) -> set[str]:
        """Return the models that have a series."""
        return {labels[0] for labels in tuple(self._series)}

    def forget(self, model_id: str) -> None:
        """Drop the series of a model; it begins anew at 0 when it is used again."""
        for labels in [labels for labels in self._series if labels[0] == model_id]:
            del self._series[labels]
            self._metric.remove(*labels)


class UsageCollector(Collector):
    """Shows what sessions and requests have now, looked up when somebody asks.

    So it can't drift from what is, as a gauge could that is counted up and down.

    Args:
        models: Returns the models that are shown whatever they have: all that have series.

    Attributes:
        usage: Returns what the sessions of each model take.
        requests: Returns how many inference requests a model has.
        generation: Returns for each model how many prompts are being answered, and wait.
    """

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        self._models = models
        self.usage: Callable[[], Mapping[str, ModelUsage]] = dict
        self.requests: Callable[[str], int] = lambda _: 0
        self.generation: Callable[[], Mapping[str, tuple[int, int]]] = dict

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the metrics without their values: registering them must not look anything up."""
        return [*self._gauges().values(), self._in_flight(), *self._generating()]

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the metrics; may be called in any thread."""
        usage = self.usage()
        gauges, in_flight = self._gauges(), self._in_flight()
        generation, generating = self.generation(), self._generating()
        for model_id in sorted({*usage, *self._models()}):
            for name, gauge in gauges.items():
                gauge.add_metric([model_id], getattr(usage.get(model_id), name, 0))
            in_flight.add_metric([model_id], self.requests(model_id))
            for gauge, count in zip(generating, generation.get(model_id, (0, 0)), strict=True):
                gauge.add_metric([model_id], count)
        return [*gauges.values(), in_flight, *generating]

    @staticmethod
    def _gauges() -> dict[str, GaugeMetricFamily]:
        return {
            field: GaugeMetricFamily(f"splitlearn_{name}", text, labels=["model"])
            for field, (name, text) in _USAGE.items()
        }

    @staticmethod
    def _generating() -> list[GaugeMetricFamily]:
        return [
            GaugeMetricFamily(f"splitlearn_generation_{name}", text, labels=["model"])
            for name, text in (
                ("requests_running", "Prompts whose answers are being made"),
                ("requests_waiting", "Prompts that wait to be let in"),
            )
        ]

    @staticmethod
    def _in_flight() -> GaugeMetricFamily:
        text = "Inference requests from their first byte to the answer's last"
        return GaugeMetricFamily("splitlearn_infer_requests_in_flight", text, labels=["model"])
