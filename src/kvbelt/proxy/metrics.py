"""What the proxy counts. A request costs a few additions; the text is made when somebody asks for it.

Names: the seed's alerts and commands read ``lmcache_ttft`` (in milliseconds), ``lmcache_nixl_transfer_failures_total``,
``lmcache_prefill_queue_size`` and ``nixl_transfer_*``; ``kvbelt_*`` follow Prometheus' conventions.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role
from kvbelt.security.refusals import Refusals, Tally
from kvbelt.wire.notification import ENDED_ON_PURPOSE, Notification, TransferDone

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by upper bound. A tenth of the cost of prometheus_client's, which locks and looks labels up."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help_text: str, scale: float = 1.0) -> HistogramMetricFamily:
        """For a scrape; ``scale`` multiplies bounds and sum."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound * scale), total))
        return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=self._sum * scale)


class Metrics(Collector):
    """Every number, and their text."""

    def __init__(self, workers: Callable[[], Iterable[Worker]]) -> None:
        self.requests: Counter[tuple[str, ...]] = Counter()  #: by path and reason
        self.answers: Counter[int] = Counter()  #: by HTTP status
        self.failures = Tally()  #: transfers, by reason
        self.refusals = Refusals()
        self.ttft = Histogram(_SECONDS)
        self.duration = Histogram(_LONG_SECONDS)
        self.transfer_seconds = Histogram(_SECONDS)
        self.in_flight = 0
        self.prefill_legs = 0  #: prefill legs under way
        self.transfers_done = 0
        self.transfer_bytes = 0
        self.broken_streams = 0
        self._workers = workers
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def notified(self, notification: Notification) -> None:
        """A transfer has ended."""
        if isinstance(notification, TransferDone):
            self.transfers_done += 1
            self.transfer_bytes += notification.num_bytes
            self.transfer_seconds.observe(notification.seconds)
        elif notification.reason not in ENDED_ON_PURPOSE:
            self.failures.add(notification.reason)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return bytes(generate_latest(self._registry))

    def describe(self) -> Iterable[Metric]:
        """Nothing is announced ahead."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """For a scrape."""
        yield self.ttft.family("lmcache_ttft", "Time to first token in milliseconds", 1000.0)
        yield self.ttft.family("kvbelt_ttft_seconds", "Time to first token, at this proxy")
        yield self.duration.family("kvbelt_proxy_request_seconds", "Whole requests")
        yield CounterMetricFamily(
            "lmcache_nixl_transfer_failures", "Transfers that ended without a commit", sum(self.failures.values())
        )
        waiting = sum(
            worker.endpoint.report.load.waiting for worker in self._workers() if worker.endpoint.role is Role.PREFILL
        )
        yield GaugeMetricFamily("lmcache_prefill_queue_size", "Prompts that wait in the prefill workers", waiting)
        yield GaugeMetricFamily("kvbelt_proxy_prefill_legs", "Prefill legs under way", self.prefill_legs)
        yield CounterMetricFamily("nixl_transfer", "Transfers done", self.transfers_done)
        yield CounterMetricFamily("nixl_transfer_bytes", "Bytes of transfers done", self.transfer_bytes)
        yield self.transfer_seconds.family("nixl_transfer_seconds", "First write posted to last completed")
        yield _labelled(
            "kvbelt_proxy_transfer_failures", "By reason", ["reason"], {(r,): n for r, n in self.failures.items()}
        )
        yield _labelled(
            "kvbelt_proxy_requests", "Requests by the path taken and why", ["path", "reason"], self.requests
        )
        yield _labelled(
            "kvbelt_proxy_answers", "By HTTP status", ["status"], {(str(s),): n for s, n in self.answers.items()}
        )
        yield GaugeMetricFamily("kvbelt_proxy_requests_in_flight", "Requests under way", self.in_flight)
        yield _labelled(
            "kvbelt_refused_messages",
            "Messages and peers refused on the notification port",
            ["socket", "reason"],
            {(s, r): n for s, reasons in self.refusals.totals().items() for r, n in reasons.items()},
        )
        yield CounterMetricFamily(
            "kvbelt_proxy_broken_streams", "Streams that ended with an error event", self.broken_streams
        )
        ready = GaugeMetricFamily("kvbelt_proxy_worker_ready", "1: takes requests", labels=["worker", "role"])
        flying = GaugeMetricFamily("kvbelt_proxy_worker_requests", "Legs under way", labels=["worker", "role"])
        for worker in self._workers():
            labels = [worker.name, str(worker.endpoint.role)]
            ready.add_metric(labels, float(worker.ready))
            flying.add_metric(labels, worker.in_flight)
        yield ready
        yield flying


def _labelled(
    name: str, help_text: str, labels: list[str], values: Mapping[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
