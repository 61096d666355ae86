"""A scrape's text from what was counted: names, help and labels are the catalogue's.

Nothing can be exported that the catalogue does not have: its name would not be found there.
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

#: A metric's value; or values by its labels' values, in the catalogue's order (of one label: the value itself).
Values = float | Mapping[str, float] | Mapping[tuple[str, str], float] | Mapping[tuple[str, ...], float]


def counter(name: str, values: Values) -> Metric:
    """What only grows."""
    spec = spec_of(name, Kind.COUNTER)
    return _filled(CounterMetricFamily(name.removesuffix("_total"), spec.help, labels=spec.labels), values)


def gauge(name: str, values: Values) -> Metric:
    """What is."""
    spec = spec_of(name, Kind.GAUGE)
    return _filled(GaugeMetricFamily(name, spec.help, labels=spec.labels), values)


def summary(name: str, count: int, total: float) -> Metric:
    """How many there were, and their sum."""
    return SummaryMetricFamily(name, spec_of(name, Kind.SUMMARY).help, count_value=count, sum_value=total)


def histogram(name: str, seen: Histogram, scale: float = 1.0) -> Metric:
    """Values by size; ``scale`` multiplies bounds and sum."""
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
    """This process: its version, CPU, memory, file descriptors and start. Read from /proc."""
    yield gauge("kvbelt_build_info", {__version__: 1.0})
    yield from _process.collect()


def render(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Once(list(families)))
    return bytes(generate_latest(registry))


class _Once(Collector):
    """One scrape's families."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
