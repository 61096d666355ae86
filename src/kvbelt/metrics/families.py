"""Renders metrics in Prometheus' text format. Names, help and labels come from the catalogue.

A metric that the catalogue lacks cannot be exported.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from kvbelt import __version__
from kvbelt.metrics.catalogue import spec_of
from kvbelt.metrics.histogram import Histogram
from kvbelt.metrics.spec import Kind

#: One value, or values by label values in the catalogue's order (with one label: its value itself).
Values = float | Mapping[str, float] | Mapping[tuple[str, str], float] | Mapping[tuple[str, ...], float]


def counter(name: str, values: Values) -> Metric:
    spec = spec_of(name, Kind.COUNTER)
    return _filled(CounterMetricFamily(name.removesuffix("_total"), spec.help, labels=spec.labels), values)


def gauge(name: str, values: Values) -> Metric:
    spec = spec_of(name, Kind.GAUGE)
    return _filled(GaugeMetricFamily(name, spec.help, labels=spec.labels), values)


def summary(name: str, count: int, total: float) -> Metric:
    return SummaryMetricFamily(name, spec_of(name, Kind.SUMMARY).help, count_value=count, sum_value=total)


def histogram(name: str, seen: Histogram, scale: float = 1.0) -> Metric:
    """``scale`` multiplies bounds and sum."""
    buckets = [("+Inf" if bound == float("inf") else repr(bound * scale), n) for bound, n in seen.cumulative()]
    return HistogramMetricFamily(
        name, spec_of(name, Kind.HISTOGRAM).help, buckets=buckets, sum_value=seen.total * scale
    )


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Values) -> Metric:
    if isinstance(values, Mapping):
        for labels, value in values.items():
            family.add_metric([labels] if isinstance(labels, str) else labels, value)
    else:
        family.add_metric([], values)
    return family


_process = ProcessCollector(registry=CollectorRegistry())


def process_families() -> Iterator[Metric]:
    """This process: version, CPU, memory, file descriptors and start time, from /proc."""
    yield gauge("kvbelt_build_info", {__version__: 1.0})
    yield from _process.collect()


def render(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Once(list(families)))
    return bytes(generate_latest(registry))


class _Once(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
