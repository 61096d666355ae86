"""A worker's ``/metrics``, rendered from the snapshots of its parts, so that no counter is kept twice."""

from collections.abc import Iterator
from time import monotonic

from prometheus_client.metrics_core import Metric

from kvbelt.engine.api import EngineLoad, Timing
from kvbelt.metrics import SECONDS, Histogram, counter, gauge, histogram


class Times:
    """Durations of the parts of requests. For the event loop's thread only."""

    def __init__(self) -> None:
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.kv_wait = Histogram(SECONDS)
        self.load = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)

    def first_output(self, timing: Timing | None, kv_wait: float | None) -> None:
        """A request's first token has come. ``kv_wait``: None, the request did not wait for KV."""
        if timing is not None:
            self.queue.observe(timing.queue)
            self.prefill.observe(timing.prefill)
        if kv_wait is not None:
            self.kv_wait.observe(kv_wait)
            if timing is not None:
                self.load.observe(timing.load)

    def families(self) -> Iterator[Metric]:
        yield histogram("kvbelt_request_queue_seconds", self.queue)
        yield histogram("kvbelt_request_prefill_seconds", self.prefill)
        yield histogram("kvbelt_request_kv_wait_seconds", self.kv_wait)
        yield histogram("kvbelt_request_load_seconds", self.load)
        yield histogram("kvbelt_inter_token_seconds", self.inter_token)


class Gaps:
    __slots__ = ("_last", "_seen")

    def __init__(self, times: Times) -> None:
        self._seen = times.inter_token
        self._last: dict[int, float] = {}

    def output(self, choice: int) -> None:
        now = monotonic()
        before = self._last.get(choice)
        if before is not None:
            self._seen.observe(now - before)
        self._last[choice] = now


def engine_families(load: EngineLoad) -> Iterator[Metric]:
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
