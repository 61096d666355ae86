"""What the belt and host memory count, as plain values on their way from where they are counted to vLLM's ``/metrics``.

Values are totals since the start, never differences: a report that is lost, or comes twice, changes nothing. Each
*source* (a worker's rank, the scheduler) reports for itself, and the newest report of a source is the one that counts.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from prometheus_client.metrics_core import Metric

from kvbelt.metrics import counter, gauge
from kvbelt.vllm.host_scheduler import HostScheduler

#: Seconds between two looks at a belt. A look waits for a turn of its thread.
LOOK_SECONDS = 0.5


class Figure(msgspec.Struct, frozen=True, array_like=True):
    """One value."""

    name: str  #: of the series, without the ``_total`` of a counter
    counter: bool
    help: str
    labels: dict[str, str]
    value: float


def figures_of(families: Iterable[Metric]) -> list[Figure]:
    """Every value of these families. A summary's count and sum become values by themselves: vLLM has no summaries."""
    figures: list[Figure] = []
    for family in families:
        counter = family.type == "counter"
        for sample in family.samples:
            name = sample.name.removesuffix("_total") if counter else sample.name
            figures.append(Figure(name, counter, family.documentation, dict(sample.labels), float(sample.value)))
    return figures


def host_families(host: HostScheduler) -> Iterator[Metric]:
    """Of mixed storage."""
    counts = host.counts
    yield gauge("kvbelt_host_blocks", host.index.capacity)
    yield gauge("kvbelt_host_blocks_used", len(host.index))
    yield counter("kvbelt_host_asked_tokens_total", counts.tokens_asked)
    yield counter("kvbelt_host_loaded_tokens_total", counts.tokens_loaded)
    yield counter("kvbelt_host_kept_blocks_total", counts.blocks_kept)
    yield counter("kvbelt_host_evicted_blocks_total", counts.blocks_evicted)


class BeltWatch:
    """Looks at a belt now and then, on a thread of its own, so that the model runner never waits for the look."""

    def __init__(self, families: Callable[[], Iterable[Metric]], clock: Callable[[], float]) -> None:
        self._families = families
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-watch")
        self._look: Future[list[Figure]] | None = None
        self._next = clock()

    def take(self) -> list[Figure] | None:
        """The figures of a look that has ended since the last call; begins another one when it is time."""
        figures = None
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            figures = look.result()
        if self._look is None and self._clock() >= self._next:
            self._next = self._clock() + LOOK_SECONDS
            self._look = self._thread.submit(lambda: figures_of(self._families()))
        return figures

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)
