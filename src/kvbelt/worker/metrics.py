"""A worker's ``/metrics``, rendered from the snapshots of its parts: no counter is kept twice."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvbelt.engine.api import EngineLoad
from kvbelt.transfer.snapshot import BeltSnapshot


class _Snapshots(Collector):
    """One scrape's worth of metric families."""

    def __init__(self, load: EngineLoad | None, belt: BeltSnapshot | None) -> None:
        self._load, self._belt = load, belt

    def collect(self) -> Iterator[Metric]:
        """Every family that this worker has."""
        if self._load is not None:
            yield from _engine_families(self._load)
        if self._belt is not None:
            yield from _belt_families(self._belt)


def _engine_families(load: EngineLoad) -> Iterable[Metric]:
    yield GaugeMetricFamily("kvbelt_requests_running", "Sequences in the batch.", value=load.running)
    yield GaugeMetricFamily("kvbelt_requests_waiting", "Sequences not yet admitted.", value=load.waiting)
    yield GaugeMetricFamily("kvbelt_kv_blocks", "KV blocks of the engine.", value=load.blocks_total)
    yield GaugeMetricFamily("kvbelt_kv_blocks_free", "KV blocks nobody holds.", value=load.blocks_free)
    yield CounterMetricFamily("kvbelt_preemptions", "Sequences put back to recompute.", value=load.preemptions_total)
    yield CounterMetricFamily("kvbelt_prompt_tokens", "Prompt tokens computed.", value=load.prompt_tokens_total)
    yield CounterMetricFamily("kvbelt_generated_tokens", "Tokens generated.", value=load.generated_tokens_total)


def _belt_families(belt: BeltSnapshot) -> Iterable[Metric]:
    yield GaugeMetricFamily("kvbelt_receive_buffer_bytes", "Size of the receive buffer.", value=belt.receive_bytes)
    held = GaugeMetricFamily("kvbelt_receive_bytes", "Bytes of the receive buffer in use.", labels=["state"])
    held.add_metric(["reserved"], belt.bytes_reserved)
    held.add_metric(["committed"], belt.bytes_committed)
    held.add_metric(["quarantined"], belt.bytes_quarantined)
    yield held
    yield GaugeMetricFamily("kvbelt_staging_bytes", "Bytes of the send staging in use.", value=belt.staging_bytes_used)
    states = GaugeMetricFamily("kvbelt_transfers", "Transfers now in each state.", labels=["side", "state"])
    for side, counts in (("send", belt.sends), ("receive", belt.arrivals)):
        for state, count in counts.items():
            states.add_metric([side, state], count)
    yield states
    ended = CounterMetricFamily("kvbelt_transfers_ended", "Transfers ended, by outcome.", labels=["side", "reason"])
    for side, totals in (("send", belt.sent_total), ("receive", belt.received_total)):
        for reason, count in totals.items():
            ended.add_metric([side, reason], count)
    yield ended
    yield CounterMetricFamily("kvbelt_sent_bytes", "Bytes sent by completed transfers.", value=belt.sent_bytes_total)
    yield CounterMetricFamily("kvbelt_received_bytes", "Bytes of committed KV.", value=belt.received_bytes_total)
    yield CounterMetricFamily("kvbelt_writes", "Writes posted.", value=belt.writes_total)
    yield SummaryMetricFamily(
        "kvbelt_write_seconds",
        "First write posted to last completed.",
        count_value=belt.write_seconds.count,
        sum_value=belt.write_seconds.total,
    )
    yield SummaryMetricFamily(
        "kvbelt_transfer_exposed_seconds",
        "From the end of a prompt's computation to its acknowledged commit: what compute did not hide.",
        count_value=belt.exposed_seconds.count,
        sum_value=belt.exposed_seconds.total,
    )
    refused = CounterMetricFamily(
        "kvbelt_refused_messages", "Messages and peers refused on the control ports.", labels=["socket", "reason"]
    )
    for socket, reasons in belt.refused_total.items():
        for reason, count in reasons.items():
            refused.add_metric([socket, reason], count)
    yield refused


def render_metrics(load: EngineLoad | None, belt: BeltSnapshot | None) -> bytes:
    """Prometheus text of one scrape."""
    registry = CollectorRegistry()
    registry.register(_Snapshots(load, belt))
    return generate_latest(registry)
