"""The counts of the belt and of host memory, as plain values on their way to vLLM's ``/metrics``.

Values are totals since the start, never differences: a report that is lost, or comes twice, changes nothing. Each
*source* (a worker's rank, or the scheduler) reports for itself, and its newest report counts.
"""

from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client.metrics_core import Metric

from kvbelt.belt_facts import transports_of
from kvbelt.belt_metrics import belt_families, link_families, transport_families
from kvbelt.channels.factory import VendorChannel
from kvbelt.metrics import counter, gauge
from kvbelt.transfer.belt import Belt
from kvbelt.vllm.host_scheduler import HostScheduler

#: Seconds between two reports of a belt, each of which waits for a turn of the belt's thread.
REPORT_SECONDS = 0.5


class Figure(msgspec.Struct, frozen=True, array_like=True):
    name: str  #: of the series, without the ``_total`` of a counter
    counter: bool
    help: str
    labels: dict[str, str]
    value: float


def families_of(belt: Belt, channel: VendorChannel) -> list[Metric]:
    """A belt's metrics, as of now. Waits a turn of it."""
    return [*belt_families(belt.snapshot()), *link_families(belt.links()), *transport_families(transports_of(channel))]


def figures_of(families: Iterable[Metric]) -> list[Figure]:
    """Every value of these families. vLLM has no summaries, so a summary's count and sum become two values."""
    figures: list[Figure] = []
    for family in families:
        counter = family.type == "counter"
        for sample in family.samples:
            name = sample.name.removesuffix("_total") if counter else sample.name
            figures.append(Figure(name, counter, family.documentation, dict(sample.labels), float(sample.value)))
    return figures


def host_families(host: HostScheduler) -> Iterator[Metric]:
    yield gauge("kvbelt_host_blocks", host.index.capacity)
    yield gauge("kvbelt_host_blocks_used", len(host.index))
    yield counter("kvbelt_host_asked_tokens_total", host.tokens_asked)
    yield counter("kvbelt_host_loaded_tokens_total", host.tokens_loaded)
    yield counter("kvbelt_host_kept_blocks_total", host.blocks_kept)
    yield counter("kvbelt_host_evicted_blocks_total", host.index.num_evicted)
