"""A worker's ``/metrics``, rendered from the snapshots of its parts: no counter is kept twice."""

from collections.abc import Iterator, Mapping
from time import monotonic

from prometheus_client.metrics_core import Metric

from kvbelt.belt_metrics import belt_families, link_families, road_families
from kvbelt.engine.api import EngineLoad, Timing
from kvbelt.metrics import SECONDS, Histogram, counter, gauge, histogram, process_families, render
from kvbelt.transfer.snapshot import BeltSnapshot
from kvbelt.wire.about import About


class Times:
    """How long the parts of requests took. Belongs to the event loop."""

    def __init__(self) -> None:
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.kv_wait = Histogram(SECONDS)
        self.load = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)

    def first_output(self, timing: Timing | None, kv_wait: float | None) -> None:
        """A request's first token is there; ``kv_wait``: None, no KV was promised."""
        if timing is not None:
            self.queue.observe(timing.queue)
            self.prefill.observe(timing.prefill)
        if kv_wait is not None:
            self.kv_wait.observe(kv_wait)
            if timing is not None:
                self.load.observe(timing.load)

    def families(self) -> Iterator[Metric]:
        """For a scrape."""
        yield histogram("kvbelt_request_queue_seconds", self.queue)
        yield histogram("kvbelt_request_prefill_seconds", self.prefill)
        yield histogram("kvbelt_request_kv_wait_seconds", self.kv_wait)
        yield histogram("kvbelt_request_load_seconds", self.load)
        yield histogram("kvbelt_inter_token_seconds", self.inter_token)


class Gaps:
    """Of one request's outputs, by choice."""

    __slots__ = ("_last", "_seen")

    def __init__(self, times: Times) -> None:
        self._seen = times.inter_token
        self._last: dict[int, float] = {}

    def output(self, choice: int) -> None:
        """Another one."""
        now = monotonic()
        before = self._last.get(choice)
        if before is not None:
            self._seen.observe(now - before)
        self._last[choice] = now


def _engine_families(load: EngineLoad) -> Iterator[Metric]:
    yield gauge("kvbelt_requests_running", load.running)
    yield gauge("kvbelt_requests_waiting", load.waiting)
    yield gauge("kvbelt_requests_loading", load.loading)
    yield counter("kvbelt_engine_busy_seconds_total", load.busy_seconds_total)
    yield counter("kvbelt_engine_steps_total", load.steps_total)
    yield gauge("kvbelt_kv_blocks", load.blocks_total)
    yield gauge("kvbelt_kv_blocks_free", load.blocks_free)
    yield gauge("kvbelt_kv_blocks_cached", load.blocks_cached)
    yield counter("kvbelt_prefix_cache_query_tokens_total", load.cache_query_tokens_total)
    yield counter("kvbelt_prefix_cache_hit_tokens_total", load.cache_hit_tokens_total)
    yield counter("kvbelt_preemptions_total", load.preemptions_total)
    yield counter("kvbelt_prompt_tokens_total", load.prompt_tokens_total)
    yield counter("kvbelt_generated_tokens_total", load.generated_tokens_total)


def render_metrics(
    load: EngineLoad | None,
    belt: BeltSnapshot | None,
    times: Times,
    info: Mapping[tuple[str, ...], float],
    about: About,
) -> bytes:
    """Prometheus text of one scrape. ``info``: role, engine id and model."""
    families = [*process_families(), gauge("kvbelt_worker_info", info), *times.families()]
    if load is not None:
        families += _engine_families(load)
    if belt is not None:
        families += [*belt_families(belt), *link_families(about.links), *road_families(about.roads)]
    return render(families)
