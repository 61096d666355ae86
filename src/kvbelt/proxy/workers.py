"""The workers behind the proxy, and the watch over them.

One task a worker asks ``/health`` at an interval. A worker that does not answer in time, or cannot be reached,
is lost: every request that waits for it is told at once, because a process that is stopped, or whose host is
gone, never closes a connection by itself. Time in which the proxy itself did not run is nobody's silence
(patience.py). A worker that comes back, perhaps as another life of itself (a new
engine_id), is used again after its first good answer. As long as there is another one, a worker that is slow to
answer, or has not been connected to the other side yet (warming.py), is passed over.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Literal

import msgspec

from kvbelt.http import ClientLimits, ConnectError, HttpError, PeerClosedError, Pool, Response
from kvbelt.proxy import description, patience, vllm_load
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.trace_context import UNKEPT
from kvbelt.routing.endpoint import Buffers, Endpoint, Health, Load, Report, Role, Standing
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonDecoder

log = logging.getLogger("kvbelt.proxy")

_MAX_HEALTH_BYTES = 64 * 1024
_JSON = (b"content-type", b"application/json")


class _HealthBody(msgspec.Struct, frozen=True):
    state: str = "ready"
    role: Literal["prefill", "decode", "both"] | None = None
    model: str = ""
    engine_id: str | None = None
    max_model_len: int | None = None
    load: dict[str, int | float] | None = None
    belt: Buffers | None = None
    receiver: ReceiverAddress | None = None
    engine: str = ""
    hash_seed: str | None = None


_health: JsonDecoder[_HealthBody] = JsonDecoder(_HealthBody)


def report_of(status: int, body: bytes, wanted: Role) -> Report:
    """What a worker's answer to ``/health`` means. Never raises."""
    try:
        said = _health.decode(body) if body else _HealthBody()
    except ValueError as error:
        if status != 200:
            return Report(Health.UNREADY, f"/health answered {status}")
        return Report(Health.UNREADY, f"/health answered something else than the contract's JSON: {error}")
    load = said.load or {}
    report = Report(
        Health.READY,
        engine_id=EngineId(said.engine_id) if said.engine_id else None,
        model=said.model,
        role=Role(said.role) if said.role else None,
        max_model_len=said.max_model_len,
        load=Load(**{name: int(load.get(name, 0)) for name in Load.__dataclass_fields__}),
        buffers=said.belt,
        receiver=said.receiver,
        engine=said.engine[:32],
        hash_seed=said.hash_seed[:32] if said.hash_seed is not None else None,
    )
    detail = ""
    if status != 200:
        detail = f"/health answered {status}, state {said.state}"
    elif report.role is not None and not report.role.serves(wanted):
        detail = f"configured as a {wanted} worker, but it says that its role is {report.role}"
    return replace(report, health=Health.UNREADY, detail=detail) if detail else report


@dataclass(frozen=True, slots=True)
class WorkerEvents:
    """Whom a worker's watch tells."""

    #: It does not answer any more, or is another process now: what it had is gone.
    lost: "Callable[[Worker], None]"
    #: It is healthy for the first time in this life. Others are preferred to it until somebody calls ``admit``.
    appeared: "Callable[[Worker], None]"
    #: Nobody needs it any more, and it is leaving.
    left: "Callable[[Worker], None]"


class Worker:
    """One worker: its endpoint as last seen, and the connections to it."""

    def __init__(self, address: Address, role: Role, settings: ProxySettings, events: WorkerEvents) -> None:
        limits = ClientLimits(connect_seconds=settings.connect_seconds)
        self.endpoint = Endpoint(address.name, role)
        self.address = address
        #: Requests that need it: whose leg it has or is to have, or whose KV is on its way from it.
        self.in_flight = 0
        self._pool = Pool(address.host, address.port, limits=limits)
        # Apart from the requests' connections, because those are closed when this one stays silent.
        # Its questions end by their own, patient limit; a connection's ordinary timer must not be the first.
        self._health_pool = Pool(
            address.host, address.port, limits=ClientLimits(connect_seconds=10 * settings.health_timeout_seconds)
        )
        # Of what is no client's request.
        self._own_headers = (_JSON,) if settings.otlp_endpoint is None else (_JSON, UNKEPT)
        self._interval = settings.health_interval_seconds
        self._timeout = settings.health_timeout_seconds
        self._late = settings.late_seconds
        self._events = events
        self._ask_now = asyncio.Event()
        self._asked = asyncio.Event()
        self._announced: str | None = None  # the life that ``appeared`` was told of, while it is healthy
        self._admitted: str | None = None  # the life that has been connected
        # Of a vLLM server, for as long as it answers without a break.
        self._description: description.Description | None = None
        self._load: dict[str, int] = {}
        self._look_at = 0.0  # when its load is asked for again

    @property
    def name(self) -> str:
        """``host:port``."""
        return self.endpoint.name

    @property
    def role(self) -> Role:
        """What it is used for."""
        return self.endpoint.role

    @property
    def ready(self) -> bool:
        """Whether it takes new requests."""
        return self.endpoint.ready

    @property
    def healthy(self) -> bool:
        """Whether it answers and says that it is ready, whoever may not want it used."""
        return self.endpoint.report.health is Health.READY

    @property
    def lost(self) -> bool:
        """Whether it does not answer."""
        return self.endpoint.report.health is Health.LOST

    @property
    def engine_id(self) -> EngineId | None:
        """Of its present life, as far as is known."""
        return self.endpoint.report.engine_id

    # Who needs it, and who wants it

    def hold(self) -> None:
        """A request needs it from now on."""
        self.in_flight += 1

    def let_go(self) -> None:
        """... and does so no more."""
        self.in_flight -= 1
        self._leave_if_idle()

    def stand(self, standing: Standing) -> None:
        """An operator says whether it is to be used. ``left`` follows LEAVING once nobody needs it."""
        self.endpoint = replace(self.endpoint, standing=standing)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self.endpoint.standing is Standing.LEAVING and self.in_flight == 0:
            self._events.left(self)

    def admit(self, life: str) -> None:
        """This life of it, if it is still the present one, is as good as any from now on."""
        if self.endpoint.life == life and self.healthy:
            self._admitted = life
            self.endpoint = replace(self.endpoint, warming=False)

    # Asking it

    async def post(self, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Response:
        """Send a request; nothing of its answer need have come.

        Raises:
            ConnectError: nothing was sent.
        """
        try:
            return await self._pool.send("POST", target, headers, body)
        except ConnectError:
            self.suspect()
            raise

    async def get(self, target: str, headers: Sequence[tuple[bytes, bytes]]) -> Response:
        """Ask for something.

        Raises:
            HttpError: no answer.
        """
        return await self._pool.request("GET", target, headers)

    async def tell(self, target: str, body: bytes) -> Response:
        """Send something that is no client's request, on a connection apart from theirs.

        Raises:
            HttpError: no answer.
        """
        return await self._health_pool.request("POST", target, self._own_headers, body)

    def suspect(self) -> None:
        """Something went wrong with it: ask for its health now rather than at the next interval."""
        self._ask_now.set()

    async def watched(self) -> None:
        """Wait until its health is known for the first time."""
        await self._asked.wait()

    async def watch(self) -> None:
        """Ask for its health, for ever."""
        while True:
            self._ask_now.clear()
            self._take(await self._ask())
            self._asked.set()
            try:
                async with asyncio.timeout(self._interval):
                    await self._ask_now.wait()
            except TimeoutError:
                continue
            # Suspected again and again, a worker is still not asked without pause.
            await asyncio.sleep(min(0.05, self._interval))

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()
        self._health_pool.close()

    async def _ask(self) -> Report:
        alarm = patience.Alarm(self._late, self._be_late)
        try:
            return await self._ask_in_time()
        finally:
            alarm.cancel()

    def _be_late(self) -> None:
        log.info("worker %s is slow to say how it is; others are preferred", self.name)
        self.endpoint = replace(self.endpoint, late=True)

    async def _ask_in_time(self) -> Report:
        try:
            async with patience.timeout(self._timeout):
                response = await self._health_pool.request("GET", "/health")
                body = await response.read(_MAX_HEALTH_BYTES)
        except TimeoutError:
            self._description = None
            return Report(Health.LOST, f"no answer to /health within {self._timeout} s")
        except HttpError as error:
            self._description = None
            return Report(Health.LOST, str(error))
        if response.status == 200 and not body:
            body = await self._describe()
        return report_of(response.status, body, self.endpoint.role)

    async def _describe(self) -> bytes:
        """A vLLM server's health, as a worker of ours would tell it; empty if it cannot be had now."""
        if self._description is None:
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self.tell(description.PATH, description.BODY)
                    answer = await response.read(description.MAX_BYTES)
            except (TimeoutError, HttpError) as error:
                log.warning("worker %s does not say who it is: %s", self.name, error or "no answer in time")
                return b""
            self._description = description.description_of(response.status, answer)
            if self._description is None:
                log.warning("worker %s does not say who it is: status %d, %r", self.name, response.status, answer[:200])
                return b""
        said = msgspec.to_builtins(self._description)
        return msgspec.json.encode(said | {"load": await self._load_of_vllm()})

    async def _load_of_vllm(self) -> dict[str, int]:
        """A vLLM server's load, as of the last look; what it does not say in time stays as it was."""
        now = monotonic()
        if now < self._look_at:
            return self._load
        self._look_at = now + vllm_load.EVERY_SECONDS
        try:
            async with asyncio.timeout(min(self._timeout, vllm_load.LOOK_SECONDS)):
                response = await self._health_pool.request("GET", vllm_load.PATH)
                self._load = vllm_load.load_of(await response.read(vllm_load.MAX_BYTES))
        except (TimeoutError, HttpError) as error:
            log.info("worker %s does not say how busy it is: %s", self.name, error or "no answer in time")
        return self._load

    def _take(self, report: Report) -> None:
        before = self.endpoint.report
        self.endpoint = replace(self.endpoint, report=report, late=False)
        if report.health is not before.health:
            log.info("worker %s (%s) is %s %s", self.name, self.role, report.health, report.detail)
        restarted = before.engine_id is not None and report.engine_id not in (None, before.engine_id)
        if report.health is Health.LOST:
            if before.health is not Health.LOST:
                self._lose(report.detail)
        elif restarted:
            log.info("worker %s has restarted: engine %s, was %s", self.name, report.engine_id, before.engine_id)
            self._lose("it was restarted")
        self._announce()

    def _announce(self) -> None:
        """Have a new life connected."""
        life = self.endpoint.life if self.healthy else None
        warming = life not in (None, self._admitted)
        if warming is not self.endpoint.warming:
            self.endpoint = replace(self.endpoint, warming=warming)
        announced, self._announced = self._announced, life
        if warming and life != announced:
            self._events.appeared(self)

    def _lose(self, why: str) -> None:
        self._admitted = None  # its connections are lost as well, should it come back
        self._pool.abort_all(PeerClosedError(f"worker {self.name} is lost: {why}"))
        self._events.lost(self)
