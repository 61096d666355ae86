"""One worker behind the proxy, and the watch over its health.

A task for each worker asks ``/health`` at an interval. A worker that does not answer in time, or cannot be reached, is
lost: every request that waits for it learns so at once, because a stopped process, or one whose host is gone, never
closes a connection. Time the proxy itself was not scheduled does not count (``stall_aware_clock``). A worker that
comes back, perhaps as another incarnation (a new engine_id), is used again after its first good answer. While there is
another worker, one that is slow to answer, or not connected to the other side yet (``warm_up``), is passed over.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from kvbelt import stall_aware_clock
from kvbelt.http import JSON, ClientLimits, HttpError, PeerClosedError, Pieces, Pool, Response
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers import vllm_dialect
from kvbelt.routing.endpoint import Endpoint, Health, Report, Standing
from kvbelt.wire.health import NO_DEFAULTS, WORKER_HEALTH, Role, ServerDescription, WorkerHealth
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.load import NO_LOAD, Buffers, Load
from kvbelt.wire.steps import StepsNow
from kvbelt.wire.workers import WorkerRow

log = logging.getLogger("kvbelt.proxy")

#: For the proxy's own requests: without it a vLLM server would begin a trace for each.
_UNKEPT = (b"traceparent", b"00-%b-%b-00" % (b"1".zfill(32), b"1".zfill(16)))

#: Statuses of a worker that asks for a key, or for another one.
_NEED_KEY = frozenset({401, 403})

_MAX_HEALTH_BYTES = 64 * 1024

#: At most, between two questions to a worker that answers but is not ready: it loads its model and is awaited.
_UNREADY_SECONDS = 0.1

_LOST = Health.LOST  # fast to read


def _bearer(key: str | None) -> tuple[tuple[bytes, bytes], ...]:
    return () if key is None else ((b"authorization", b"Bearer " + key.encode()),)


def report_of(status: int, body: bytes, wanted: Role, worker: str = "the worker") -> Report:
    """What a worker's answer to ``/health`` means. Never raises."""
    try:
        health = WORKER_HEALTH.parse(body, worker)
    except MessageError as error:
        return Report(Health.UNREADY, str(error) if status == 200 else f"/health answered {status}")
    report = _report(health, wanted, health.load or NO_LOAD, health.belt)
    if status != 200:
        return replace(report, health=Health.UNREADY, detail=f"/health answered {status}, state {health.state}")
    return report


def _report(said: WorkerHealth | ServerDescription, wanted: Role, load: Load, belt: Buffers | None) -> Report:
    fits = said.role.serves(wanted)
    return Report(
        Health.READY if fits else Health.UNREADY,
        "" if fits else f"configured as a {wanted} worker, but it says that its role is {said.role}",
        engine_id=said.engine_id,
        model=said.model,
        role=said.role,
        max_model_len=said.max_model_len,
        load=load,
        buffers=None if belt is None else Buffers(**{name: getattr(belt, name) for name in Buffers.__struct_fields__}),
        receiver=said.receiver,
        engine=said.engine[:32],
        hash_seed=said.hash_seed[:32] if said.hash_seed is not None else None,
        device=_device_of(said)[:64],
        steps=said.steps,
        defaults=said.defaults if isinstance(said, ServerDescription) else NO_DEFAULTS,
    )


def _device_of(said: WorkerHealth | ServerDescription) -> str:
    if isinstance(said, WorkerHealth):
        return said.device
    return said.about.device if said.about is not None else ""


def _seen(endpoint: Endpoint) -> tuple[bool, bool, str, int | None]:
    """What is told of when it changes."""
    return endpoint.ready, endpoint.settled, endpoint.incarnation, endpoint.report.max_model_len


class Held:
    """A worker that a request needs, and the incarnation in which it was picked.

    It stays in the fleet until it is released, even if it was told to leave.
    """

    __slots__ = ("_held", "chosen", "worker")

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker
        self.chosen: Endpoint = worker.endpoint
        self._held = True
        worker.hold()

    @property
    def restarted(self) -> bool:
        return self.worker.engine_id != self.chosen.report.engine_id

    def release(self) -> None:
        if self._held:
            self._held = False
            self.worker.release()


@dataclass(frozen=True, slots=True)
class WorkerEvents:
    lost: "Callable[[Worker], None]"  #: it does not answer any more, or is another process now: what it had is gone
    #: This incarnation is healthy for the first time. Others are preferred to it until ``admit`` is called.
    appeared: "Callable[[Worker], None]"
    left: "Callable[[Worker], None]"  #: it is leaving, and no request needs it any more
    #: It can be used, or not any more, is another process now, or has another context.
    changed: "Callable[[Worker], None]"
    told_steps: "Callable[[Worker], None]"


class Worker:
    """One worker: its endpoint as last seen, and the connections to it."""

    def __init__(self, address: Address, role: Role, settings: ProxySettings, events: WorkerEvents) -> None:
        limits = ClientLimits(connect_seconds=settings.connect_seconds)
        self.endpoint = Endpoint(address.name, role)
        self.name, self.role, self.address = address.name, role, address
        #: Requests that have, or will have, a leg on it, or whose KV is on its way from it.
        self.in_flight = 0
        self._pool = Pool(address.host, address.port, limits=limits)
        # Apart from the requests' connections, which are closed when the worker is lost.
        # The timeout of a whole health check ends it; that of the connection must not be the first.
        self._health_pool = Pool(
            address.host, address.port, limits=ClientLimits(connect_seconds=10 * settings.health_timeout_seconds)
        )
        self._key = _bearer(settings.worker_api_key)
        self._own_headers = (JSON, *self._key) if settings.otlp_endpoint is None else (JSON, _UNKEPT, *self._key)
        self._interval = settings.health_interval_seconds
        self._timeout = settings.health_timeout_seconds
        self._late = settings.late_seconds
        self._events = events
        self._describe = vllm_dialect.describe_question(settings.levels.itl or 0.0)
        self._ask_now = asyncio.Event()
        self._known = asyncio.Event()
        self._lives: EngineId | None = None  # the engine that its answers are of
        self._announced: str | None = None  # the incarnation that ``appeared`` was called for, while it is healthy
        self._admitted: str | None = None  # the incarnation that has been connected
        # Of a vLLM server, while it answers without a break; without a role: it has no connector.
        self._described: Report | None = None
        self._load = NO_LOAD
        self._load_due = 0.0  # when its load is asked for again

    @property
    def ready(self) -> bool:
        return self.endpoint.ready

    @property
    def healthy(self) -> bool:
        """Whether it answers and says that it is ready, also while an operator drains it."""
        return self.endpoint.report.health is Health.READY

    @property
    def lost(self) -> bool:
        return self.endpoint.report.health is _LOST

    @property
    def engine_id(self) -> EngineId | None:
        return self.endpoint.report.engine_id

    @property
    def steps(self) -> StepsNow | None:
        return self.endpoint.report.steps

    def on_steps(self, steps: StepsNow) -> None:
        """Its incarnation has told of its steps."""
        self.endpoint = replace(self.endpoint, report=replace(self.endpoint.report, steps=steps))
        self._events.told_steps(self)

    def row(self) -> WorkerRow:
        endpoint, report = self.endpoint, self.endpoint.report
        return WorkerRow(
            worker=self.name,
            role=self.role,
            state=report.health,
            detail=report.detail,
            standing=endpoint.standing,
            warming=endpoint.warming,
            engine_id=report.engine_id,
            model=report.model,
            max_model_len=report.max_model_len,
            load=report.load,
            buffers=report.buffers,
            in_flight=self.in_flight,
        )

    # Its use

    def hold(self) -> None:
        self.in_flight += 1

    def release(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._leave_if_idle()

    def set_standing(self, standing: Standing) -> None:
        """What an operator wants. After LEAVING, ``left`` is called once no request needs it."""
        before, self.endpoint = self.endpoint, replace(self.endpoint, standing=standing)
        self._tell_of_change(before)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self.in_flight == 0 and self.endpoint.standing is Standing.LEAVING:
            self._events.left(self)

    def admit(self, incarnation: str) -> None:
        """Stop preferring others to this incarnation, if it is still the present one."""
        if self.endpoint.incarnation == incarnation and self.healthy:
            self._admitted = incarnation
            before, self.endpoint = self.endpoint, replace(self.endpoint, warming=False)
            self._tell_of_change(before)

    def _tell_of_change(self, before: Endpoint) -> None:
        now = self.endpoint
        if _seen(now) != _seen(before):
            self._events.changed(self)

    # Requests to it

    def post(self, target: str, headers: bytes, body: Pieces) -> Awaitable[Response]:
        """Send a client's request; returns before its answer has come. Raises ConnectError: nothing was sent."""
        return self._pool.send("POST", target, headers, body)

    async def call(
        self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes | None = None
    ) -> Response:
        """The head of its answer. Raises HttpError: no answer."""
        return await self._pool.request(method, target, headers, body)

    async def post_own(self, target: str, body: bytes) -> Response:
        """The proxy's own request, on a connection apart from clients' requests. Raises HttpError: no answer."""
        return await self._health_pool.request("POST", target, self._own_headers, body)

    def suspect(self) -> None:
        """Something went wrong with it: ask for its health now rather than at the next interval."""
        self._ask_now.set()

    async def survived(self, incarnation: str) -> bool:
        """Whether this incarnation is well, as it says when it is asked now."""
        await self.check()
        return self.healthy and self.endpoint.incarnation == incarnation

    async def wait_until_known(self) -> None:
        await self._known.wait()

    async def watch(self) -> None:
        while True:
            self._ask_now.clear()
            await self.check()
            self._known.set()
            unready = self.endpoint.report.health is Health.UNREADY
            try:
                async with asyncio.timeout(min(_UNREADY_SECONDS, self._interval) if unready else self._interval):
                    await self._ask_now.wait()
            except TimeoutError:
                continue
            # However often it is suspected, there is a pause between two checks.
            await asyncio.sleep(min(0.05, self._interval))

    async def check(self) -> None:
        alarm = stall_aware_clock.Alarm(self._late, self._on_late)
        try:
            report = await self._ask()
        finally:
            alarm.cancel()
        self._on_report(report)

    def close(self) -> None:
        self._pool.close()
        self._health_pool.close()

    def _on_late(self) -> None:
        log.info("worker %s is slow to answer /health; others are preferred", self.name)
        before, self.endpoint = self.endpoint, replace(self.endpoint, late=True)
        self._tell_of_change(before)

    async def _ask(self) -> Report:
        try:
            async with stall_aware_clock.timeout(self._timeout):
                response = await self._health_pool.request("GET", "/health", self._key)
                body = await response.read(_MAX_HEALTH_BYTES)
        except TimeoutError:
            self._described = None
            return Report(Health.LOST, f"no answer to /health within {self._timeout:g} s", silent=True)
        except HttpError as error:
            self._described = None
            return Report(Health.LOST, str(error))
        if response.status in _NEED_KEY:
            return self._unasked("/health", response.status)
        if response.status == 200 and not body:
            return await self._report_of_vllm()
        return report_of(response.status, body, self.role, self.name)

    def _unasked(self, path: str, status: int) -> Report:
        """It takes no question without the right key, so nothing is known of it and no KV could be sent to it."""
        if self._key:
            carried, remedy = "the key of --worker-api-key-file", "put the worker's --api-key into that file"
        else:
            carried, remedy = "no key", "put the worker's --api-key into a file for --worker-api-key-file"
        detail = f"{path} answered {status} to the proxy's own question, which carried {carried}; {remedy}"
        return Report(Health.UNREADY, f"{detail}, and start the proxy again")

    async def _report_of_vllm(self) -> Report:
        """Of a vLLM server, whose ``/health`` has no body."""
        steps = None
        if self._described is None:
            try:
                async with stall_aware_clock.timeout(self._timeout):
                    response = await self.post_own(vllm_dialect.PATH, self._describe)
                    answer = await response.read(vllm_dialect.MAX_BYTES)
                if response.status in _NEED_KEY:
                    return self._unasked(vllm_dialect.PATH, response.status)
                said = vllm_dialect.description_of(response.status, answer, self.name)
            except (TimeoutError, HttpError, MessageError) as error:
                log.warning("worker %s does not describe itself: %s", self.name, error or "no answer in time")
                return Report(Health.READY)
            report = Report(Health.READY) if said is None else _report(said, self.role, NO_LOAD, None)
            # It does not say them again: they come by notifications from now on.
            self._described, steps = replace(report, steps=None), report.steps
        return replace(self._described, load=await self._load_of_vllm(), steps=steps)

    async def _load_of_vllm(self) -> Load:
        """As of the last answer in time."""
        now = monotonic()
        if now < self._load_due:
            return self._load
        self._load_due = now + vllm_dialect.METRICS_INTERVAL_SECONDS
        try:
            async with asyncio.timeout(min(self._timeout, vllm_dialect.METRICS_SECONDS)):
                response = await self._health_pool.request("GET", vllm_dialect.METRICS_PATH, self._key)
                self._load = vllm_dialect.load_of(await response.read(vllm_dialect.MAX_METRICS_BYTES))
        except (TimeoutError, HttpError) as error:
            log.info("worker %s does not report its load: %s", self.name, error or "no answer in time")
        return self._load

    def _on_report(self, report: Report) -> None:
        shown, before, said = self.endpoint, self.endpoint.report, report.steps
        if report.steps is None and report.engine_id == before.engine_id:
            report = replace(report, steps=before.steps)
        self.endpoint = replace(self.endpoint, report=report, late=False)
        if report.health is not before.health:
            self._log_change(before.health, report)
        if report.health is Health.LOST:
            if before.health is not Health.LOST or (before.silent and not report.silent):
                self._lose(report.detail, answering=not report.silent)
        elif report.engine_id is not None:
            lived, self._lives = self._lives, report.engine_id
            if lived not in (None, report.engine_id):
                log.info("worker %s has restarted: engine %s, was %s", self.name, report.engine_id, lived)
                self._lose("it was restarted")
        self._announce()
        self._tell_of_change(shown)
        if said is not None:
            self._events.told_steps(self)

    def _log_change(self, before: Health, report: Report) -> None:
        if report.health is not Health.LOST:
            log.info("worker %s (%s) is %s %s", self.name, self.role, report.health, report.detail)
        elif before is Health.UNKNOWN:
            log.info("worker %s (%s) does not answer yet: %s", self.name, self.role, report.detail)
        elif self.endpoint.standing is not Standing.ACTIVE and not self.in_flight:
            log.info("worker %s (%s), which was drained, has ended: %s", self.name, self.role, report.detail)
        else:
            log.warning("worker %s (%s) is lost: %s", self.name, self.role, report.detail)

    def _announce(self) -> None:
        incarnation = self.endpoint.incarnation if self.healthy else None
        warming = incarnation not in (None, self._admitted)
        if warming is not self.endpoint.warming:
            self.endpoint = replace(self.endpoint, warming=warming)
        announced, self._announced = self._announced, incarnation
        if warming and incarnation != announced:
            self._events.appeared(self)

    def _lose(self, why: str, *, answering: bool = True) -> None:
        """Give its calls back. A silent worker may only stand still: what it is ``answering`` goes on."""
        self._admitted = None  # its connections are lost as well, should it come back
        self._pool.abort_all(PeerClosedError(f"worker {self.name} is lost: {why}"), answering=answering)
        self._events.lost(self)
