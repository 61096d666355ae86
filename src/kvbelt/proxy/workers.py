"""The workers behind the proxy, and the watch over them.

One task a worker asks ``/health`` at an interval. A worker that does not answer in time, or cannot be reached,
is lost: every request that waits for it is told at once, because a process that is stopped, or whose host is
gone, never closes a connection by itself. A worker that comes back, perhaps as another life of itself (a new
engine_id), is used again after its first good answer.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import msgspec

from kvbelt.http import ClientLimits, ConnectError, HttpError, PeerClosedError, Pool, Response
from kvbelt.proxy import description
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.routing.endpoint import Endpoint, Health, Load, Report, Role
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId

log = logging.getLogger("kvbelt.proxy")

_MAX_HEALTH_BYTES = 64 * 1024


class _HealthBody(msgspec.Struct, frozen=True):
    state: str = "ready"
    role: Literal["prefill", "decode", "both"] | None = None
    model: str = ""
    engine_id: str | None = None
    max_model_len: int | None = None
    load: dict[str, int | float] | None = None
    receiver: ReceiverAddress | None = None


_health = msgspec.json.Decoder(_HealthBody)


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
        receiver=said.receiver,
    )
    detail = ""
    if status != 200:
        detail = f"/health answered {status}, state {said.state}"
    elif report.role is not None and not report.role.serves(wanted):
        detail = f"configured as a {wanted} worker, but it says that its role is {report.role}"
    return replace(report, health=Health.UNREADY, detail=detail) if detail else report


class Worker:
    """One worker: its endpoint as last seen, and the connections to it."""

    def __init__(
        self, address: Address, role: Role, settings: ProxySettings, on_lost: "Callable[[Worker], None]"
    ) -> None:
        limits = ClientLimits(connect_seconds=settings.connect_seconds)
        self.endpoint = Endpoint(address.name, role)
        self.in_flight = 0
        self._pool = Pool(address.host, address.port, limits=limits)
        # Apart from the requests' connections, because those are closed when this one stays silent.
        self._health_pool = Pool(
            address.host, address.port, limits=ClientLimits(connect_seconds=settings.health_timeout_seconds)
        )
        self._interval = settings.health_interval_seconds
        self._timeout = settings.health_timeout_seconds
        self._on_lost = on_lost
        self._ask_now = asyncio.Event()
        self._asked = asyncio.Event()
        # Of a vLLM server, for as long as it answers without a break.
        self._description: description.Description | None = None

    @property
    def name(self) -> str:
        """``host:port``."""
        return self.endpoint.name

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.endpoint.ready

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
        try:
            async with asyncio.timeout(self._timeout):
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
                    headers = ((b"content-type", b"application/json"),)
                    response = await self._health_pool.request("POST", description.PATH, headers, description.BODY)
                    answer = await response.read(description.MAX_BYTES)
            except (TimeoutError, HttpError) as error:
                log.warning("worker %s does not say who it is: %s", self.name, error or "no answer in time")
                return b""
            self._description = description.description_of(response.status, answer)
            if self._description is None:
                log.warning("worker %s does not say who it is: status %d, %r", self.name, response.status, answer[:200])
                return b""
        return msgspec.json.encode(self._description)

    def _take(self, report: Report) -> None:
        before = self.endpoint.report
        self.endpoint = Endpoint(self.endpoint.name, self.endpoint.role, report)
        if report.health is not before.health:
            log.info("worker %s (%s) is %s %s", self.name, self.endpoint.role, report.health, report.detail)
        restarted = before.engine_id is not None and report.engine_id not in (None, before.engine_id)
        if report.health is Health.LOST:
            if before.health is not Health.LOST:
                self._lose(report.detail)
        elif restarted:
            log.info("worker %s has restarted: engine %s, was %s", self.name, report.engine_id, before.engine_id)
            self._lose("it was restarted")

    def _lose(self, why: str) -> None:
        self._pool.abort_all(PeerClosedError(f"worker {self.name} is lost: {why}"))
        self._on_lost(self)
