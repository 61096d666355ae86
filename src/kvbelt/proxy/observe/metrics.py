"""The proxy's metrics. A request costs a few additions; the text is made at each scrape.

``metrics/catalogue.py`` has their names, labels and meaning.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

from kvbelt.metrics import (
    BYTES,
    LONG_SECONDS,
    SECONDS,
    SIGNED_SECONDS,
    Histogram,
    counter,
    gauge,
    histogram,
    process_families,
    render,
)
from kvbelt.proxy.observe.records import Leg, Record
from kvbelt.proxy.workers.watch import Worker
from kvbelt.routing.pairs import Pairs
from kvbelt.routing.placement import Mode
from kvbelt.security.refusals import Refusals, Tally
from kvbelt.wire.health import PlacementNow, Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.notification import ENDED_ON_PURPOSE, TransferDone, TransferEnd
from kvbelt.wire.reasons import REASONS, Where

#: Series that are 0 from the start: a rate misses the first event of a series that did not exist before it.
_STATUSES = (200, 400, 499, 500, 502, 503, 504)


def _none(where: Where) -> dict[str, int]:
    return {reason.name: 0 for reason in REASONS if reason.where & where and not reason.name.endswith("*")}


_NO_ANSWERS = dict.fromkeys(_STATUSES, 0)
_NO_ERRORS = _none(Where.ERROR)
_NO_FAILURES = {reason: 0 for reason in _none(Where.SEND) if reason not in ENDED_ON_PURPOSE | {"done"}}
_NO_ATTEMPTS = {"prefill": _none(Where.PREFILL), "decode": _none(Where.DECODE)}


@dataclass(slots=True)
class _Moved:
    """What one prefill worker has sent to one decode worker."""

    transfers: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


#: Requests that are counted together: one by one, each would load the counting code into the core's cache again.
_BATCH = 64


class Metrics:
    def __init__(
        self,
        workers: Callable[[], Iterable[Worker]],
        pairs: Pairs,
        traces: Mapping[str, int] | None = None,
        waiting: Callable[[], int] = lambda: 0,
        placement: Callable[[], PlacementNow | None] = lambda: None,
    ) -> None:
        self.requests: Counter[tuple[str, ...]] = Counter()  #: by path and reason
        self.answers: Counter[int] = Counter()  #: by HTTP status
        self.errors: Counter[str] = Counter()  #: of the proxy's own, by reason
        self.failed_attempts: dict[Leg, Tally] = {"prefill": Tally(), "decode": Tally()}  #: by reason
        self.failures = Tally()  #: transfers, by reason
        self.refusals = Refusals()
        self.ttft = Histogram(SECONDS)
        self.tpot = Histogram(SECONDS)
        self.duration = Histogram(LONG_SECONDS)
        self.prefill_leg = Histogram(SECONDS)
        self.decode_wait = Histogram(SECONDS)
        self.placements: Counter[tuple[str, ...]] = Counter()  #: requests by the action and the reason of their place
        self.queue_wait = Histogram(SECONDS)
        self.prediction_error = Histogram(SIGNED_SECONDS)
        self.transfer_seconds = Histogram(SECONDS)
        self.transfer_exposed = Histogram(SECONDS)
        self.transfer_size = Histogram(BYTES)
        self._moved: dict[tuple[EngineId, EngineId], _Moved] = {}
        self.in_flight = 0
        self.prefill_legs = 0  #: prefill legs under way
        self.broken_streams = 0
        self._uncounted: list[Record] = []
        self._first_tokens: list[float] = []
        self._workers = workers
        self._pairs = pairs
        self._waiting = waiting
        self._placement = placement
        self._traces = traces if traces is not None else {}

    def notified(self, told: TransferEnd) -> None:
        if isinstance(told, TransferDone):
            self.transfer_seconds.observe(told.seconds)
            self.transfer_exposed.observe(told.exposed_seconds)
            self.transfer_size.observe(told.num_bytes)
            moved = self._moved.setdefault((told.sender, told.receiver), _Moved())
            moved.transfers += 1
            moved.num_bytes += told.num_bytes
            moved.seconds += told.seconds
        elif told.reason not in ENDED_ON_PURPOSE:
            self.failures.add(told.reason)

    def first_token(self, record: Record) -> None:
        """It has been handed to the client's socket. An answer in one piece does not tell when it was known."""
        if (seconds := record.time_to_first_token) is not None:
            self._first_tokens.append(seconds)

    def ended(self, record: Record) -> None:
        self.in_flight -= 1
        self._uncounted.append(record)
        if len(self._uncounted) == _BATCH:
            self.count()

    def count(self) -> None:
        """Count the requests that have ended since the last call. Call it before reading a number."""
        records, self._uncounted = self._uncounted, []
        self.requests.update([(r.path or "refused", r.reason or "") for r in records])
        self.answers.update([r.status for r in records])
        self.ttft.observe_all(self._first_tokens)
        self._first_tokens.clear()
        self.tpot.observe_all([gap for r in records if (gap := r.between_tokens) is not None])
        self.duration.observe_all([r.ended - r.began for r in records if r.ended is not None])
        self.prefill_leg.observe_all(
            [r.prefill_answered - r.prefill_sent for r in records if r.prefill_answered and r.prefill_sent]
        )
        self.decode_wait.observe_all(
            [r.decode_answered - r.decode_sent for r in records if r.decode_answered and r.decode_sent]
        )
        self.placements.update([(r.action, r.placed_because) for r in records if r.action])
        self.queue_wait.observe_all([r.waited for r in records if r.action])
        self.prediction_error.observe_all([error for r in records if (error := r.prediction_error) is not None])

    def text(self) -> bytes:
        self.count()
        of_requests = (*self._of_requests(), *self._of_placement())
        return render((*of_requests, *self._of_transfers(), *self._of_workers(), *process_families()))

    def _of_requests(self) -> Iterator[Metric]:
        yield histogram("lmcache_ttft", self.ttft, 1000.0)
        yield histogram("kvbelt_ttft_seconds", self.ttft)
        yield histogram("kvbelt_tpot_seconds", self.tpot)
        yield histogram("kvbelt_proxy_request_seconds", self.duration)
        yield histogram("kvbelt_proxy_prefill_leg_seconds", self.prefill_leg)
        yield histogram("kvbelt_proxy_decode_wait_seconds", self.decode_wait)
        yield counter("kvbelt_proxy_requests_total", self.requests)
        yield counter("kvbelt_placements_total", self.placements)
        yield gauge("kvbelt_proxy_requests_waiting", self._waiting())
        yield histogram("kvbelt_queue_wait_seconds", self.queue_wait)
        yield histogram("kvbelt_ttft_prediction_error_seconds", self.prediction_error)
        yield counter("kvbelt_proxy_answers_total", {str(s): n for s, n in (_NO_ANSWERS | self.answers).items()})
        yield counter("kvbelt_proxy_errors_total", _NO_ERRORS | self.errors)
        attempts: dict[tuple[str, ...], float] = {
            (leg, reason): n
            for leg, tally in self.failed_attempts.items()
            for reason, n in (_NO_ATTEMPTS[leg] | tally).items()
        }
        yield counter("kvbelt_proxy_failed_attempts_total", attempts)
        yield counter("kvbelt_proxy_broken_streams_total", self.broken_streams)
        yield counter("kvbelt_proxy_traces_total", self._traces)
        yield gauge("kvbelt_proxy_requests_in_flight", self.in_flight)
        yield gauge("kvbelt_proxy_prefill_legs", self.prefill_legs)
        refused = {
            (socket, reason): n for socket, reasons in self.refusals.totals().items() for reason, n in reasons.items()
        }
        yield counter("kvbelt_refused_messages_total", refused)

    def _of_placement(self) -> Iterator[Metric]:
        now = self._placement()
        if now is None:
            return
        yield gauge("kvbelt_placement_mode", {str(mode): float(mode == now.mode) for mode in Mode})
        yield gauge("kvbelt_placement_regret_ratio", now.regret or 0.0)
        shares = {"actual": now.actual, "expected": now.expected}
        yield gauge(
            "kvbelt_placement_within_levels_ratio", {name: one for name, one in shares.items() if one is not None}
        )

    def _of_transfers(self) -> Iterator[Metric]:
        yield counter("nixl_transfer_total", self.transfer_size.count)
        yield counter("nixl_transfer_bytes_total", self.transfer_size.total)
        yield histogram("nixl_transfer_seconds", self.transfer_seconds)
        yield counter("lmcache_nixl_transfer_failures_total", sum(self.failures.values()))
        yield counter("kvbelt_proxy_transfer_failures_total", _NO_FAILURES | self.failures)
        yield histogram("kvbelt_proxy_transfer_exposed_seconds", self.transfer_exposed)
        yield histogram("kvbelt_proxy_transfer_size_bytes", self.transfer_size)
        moved = self._moved_by_pair()
        yield counter("kvbelt_pair_transfers_total", {pair: one.transfers for pair, one in moved.items()})
        yield counter("kvbelt_pair_transfer_bytes_total", {pair: one.num_bytes for pair, one in moved.items()})
        yield counter("kvbelt_pair_transfer_seconds_total", {pair: one.seconds for pair, one in moved.items()})

    def _moved_by_pair(self) -> dict[tuple[str, ...], _Moved]:
        """By names and devices. What processes that are gone have moved is forgotten."""
        known = {
            worker.endpoint.report.engine_id: (worker.name, worker.endpoint.report.device)
            for worker in self._workers()
            if worker.endpoint.report.engine_id is not None
        }
        self._moved = {pair: one for pair, one in self._moved.items() if known.keys() >= set(pair)}
        found: dict[tuple[str, ...], _Moved] = {}
        for (sender, receiver), one in self._moved.items():
            (prefill, from_device), (decode, to_device) = known[sender], known[receiver]
            found[prefill, decode, from_device, to_device] = one
        return found

    def _of_workers(self) -> Iterator[Metric]:
        waiting = dict.fromkeys(Role, 0)
        info: dict[tuple[str, ...], float] = {}
        state: dict[tuple[str, ...], float] = {}
        by_worker: dict[str, dict[tuple[str, ...], float]] = {
            name: {} for name in ("ready", "requests", "running", "waiting", "kv_free_ratio")
        }
        for worker in self._workers():
            endpoint, report = worker.endpoint, worker.endpoint.report
            labels = (worker.name, str(endpoint.role))
            waiting[endpoint.role] += report.load.waiting
            state[*labels, endpoint.state] = 1.0
            by_worker["ready"][labels] = float(worker.ready)
            by_worker["requests"][labels] = worker.in_flight
            if report.engine_id is not None:
                info[*labels, report.engine_id, report.model] = 1.0
            if worker.healthy:
                by_worker["running"][labels] = report.load.running
                by_worker["waiting"][labels] = report.load.waiting
            if worker.healthy and report.load.blocks_total:
                by_worker["kv_free_ratio"][labels] = report.load.blocks_free / report.load.blocks_total
        yield gauge("lmcache_prefill_queue_size", waiting[Role.PREFILL])
        yield gauge("kvbelt_decode_queue_size", waiting[Role.DECODE])
        for name, values in by_worker.items():
            yield gauge(f"kvbelt_proxy_worker_{name}", values)
        yield gauge("kvbelt_proxy_worker_state", state)
        yield gauge("kvbelt_proxy_worker_info", info)
        yield gauge("kvbelt_proxy_pairs", self._pairs.states())
