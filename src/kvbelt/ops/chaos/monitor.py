"""Observes a deployment: the proxy's records, what workers hold, memory, and processes that exit unexpectedly."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvbelt.ops.chaos.endpoints import RECORDS, Endpoints
from kvbelt.ops.chaos.holdings import Holdings, holdings_of
from kvbelt.ops.chaos.inject import Injector
from kvbelt.ops.chaos.memory import resident_bytes
from kvbelt.ops.chaos.participants import Participants, participants_of
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.http_client import Reply, UnreadableReplyError, get
from kvbelt.wire.health import WORKER_HEALTH
from kvbelt.wire.request_record import REQUEST_LIST

#: The proxy lists its last 100 requests, so fewer than 100 may end in this time.
_RECORDS_SECONDS = 1.0
_HOLDINGS_SECONDS = 1.0
_MEMORY_SECONDS = 5.0
_DEATHS_SECONDS = 0.25
_LAG_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class UnexpectedExit:
    """A process that exited by itself, and the end of its log."""

    process: str
    log: str


class Monitor:
    """Observes until cancelled.

    Attributes:
        participants: which workers took part in a request, by request id.
        lives: resident bytes over time, by process and pid.
        quarantined_most: the most bytes in quarantine at once.
        queued: samples in which a transfer waited for space in a receive buffer.
        deaths: processes that exited unexpectedly.
        lag: the longest delay of this event loop, in seconds.
    """

    def __init__(self, endpoints: Endpoints, deployment: Deployment | None, injector: Injector) -> None:
        self._endpoints = endpoints
        self._deployment = deployment
        self._injector = injector
        self._addresses = frozenset(map(str, endpoints.workers.values()))
        self.participants: dict[str, Participants] = {}
        self.lives: dict[tuple[str, int], list[tuple[float, int]]] = {}
        self.quarantined_most = 0
        self.queued = 0
        self.deaths: list[UnexpectedExit] = []
        self.lag = 0.0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(_RECORDS_SECONDS, self.read_records))
            group.create_task(_every(_HOLDINGS_SECONDS, self._sample_holdings))
            group.create_task(self._measure_lag())
            if self._deployment is not None:
                group.create_task(_every(_MEMORY_SECONDS, self._sample_memory))
                group.create_task(_every(_DEATHS_SECONDS, self._check_processes))

    async def read_records(self) -> None:
        """Read the proxy's last requests."""
        reply = await get(self._endpoints.proxy, RECORDS, key=self._endpoints.admin_key)
        if reply is None or reply.status != 200:
            return
        for record in reply.read(REQUEST_LIST, "the proxy").requests:
            if record.ended:
                self.participants[record.request_id] = participants_of(record, self._addresses)

    async def record(self, request_id: str) -> str:
        """The proxy's record of one request, as JSON."""
        reply = await get(self._endpoints.proxy, f"{RECORDS}/{request_id}", key=self._endpoints.admin_key)
        if reply is None or reply.status != 200:
            return "the proxy has no record of it"
        return reply.body.decode(errors="replace")

    async def holdings(self) -> dict[str, Holdings]:
        """What every worker holds now."""
        names = list(self._endpoints.workers)
        replies = await asyncio.gather(*(get(self._endpoints.workers[name], "/health") for name in names))
        return {name: _holdings(reply) for name, reply in zip(names, replies, strict=True)}

    async def _sample_holdings(self) -> None:
        held = (await self.holdings()).values()
        self.quarantined_most = max(self.quarantined_most, sum(one.quarantined_bytes for one in held))
        self.queued += any(one.queued for one in held)

    async def _sample_memory(self) -> None:
        assert self._deployment is not None
        for process in self._deployment.processes:
            size = resident_bytes(process.pid)
            if size is not None and process.running and process.name not in self._injector.restarting:
                self.lives.setdefault((process.name, process.pid), []).append((time.monotonic(), size))

    async def _check_processes(self) -> None:
        assert self._deployment is not None
        for process in self._deployment.processes:
            name = process.name
            if process.running or name in self._injector.restarting or name in self._injector.not_back:
                continue
            self.deaths.append(UnexpectedExit(name, "\n".join(self._deployment.log_tail(name))))
            await self._injector.restart(name)

    async def _measure_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_SECONDS)
            self.lag = max(self.lag, time.monotonic() - before - _LAG_SECONDS)


async def _every(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    while True:
        await action()
        await asyncio.sleep(seconds)


def _holdings(reply: Reply | None) -> Holdings:
    if reply is None:
        return Holdings("silent")
    try:
        return holdings_of(reply.read(WORKER_HEALTH, "the worker"))
    except UnreadableReplyError as error:
        return Holdings(str(error))
