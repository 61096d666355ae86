"""Looking on: the proxy's records, what workers hold, memory, and processes that end without being asked to."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvbelt.ops.chaos.client import get
from kvbelt.ops.chaos.holdings import Holdings, holdings_of
from kvbelt.ops.chaos.inject import Injector
from kvbelt.ops.chaos.memory import resident_bytes
from kvbelt.ops.chaos.site import RECORDS, Site
from kvbelt.ops.chaos.trace import Trace, trace_of
from kvbelt.ops.deployment import Deployment

#: The proxy tells its last 100 requests, so this must be less than a hundred of them take.
_RECORDS_SECONDS = 1.0
_HOLDINGS_SECONDS = 1.0
_MEMORY_SECONDS = 5.0
_DEATHS_SECONDS = 0.25
_LAG_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended by itself, and the end of its log."""

    process: str
    log: str


class Watch:
    """Looks at a deployment until cancelled.

    Attributes:
        traces: who took part in which request, by request id.
        lives: resident bytes over time, by process and pid.
        quarantined_most: the most bytes that were in quarantine at once.
        queued: looks at which a transfer waited for room in a receive buffer.
        deaths: of processes that nobody here has ended.
        lag: the longest that this process itself was late, in seconds.
    """

    def __init__(self, site: Site, deployment: Deployment | None, injector: Injector) -> None:
        self._site = site
        self._deployment = deployment
        self._injector = injector
        self._addresses = frozenset(map(str, site.workers.values()))
        self.traces: dict[str, Trace] = {}
        self.lives: dict[tuple[str, int], list[tuple[float, int]]] = {}
        self.quarantined_most = 0
        self.queued = 0
        self.deaths: list[Death] = []
        self.lag = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(_RECORDS_SECONDS, self.look_at_records))
            group.create_task(_every(_HOLDINGS_SECONDS, self._look_at_holdings))
            group.create_task(self._feel_lag())
            if self._deployment is not None:
                group.create_task(_every(_MEMORY_SECONDS, self._look_at_memory))
                group.create_task(_every(_DEATHS_SECONDS, self._look_for_deaths))

    async def look_at_records(self) -> None:
        """Take what the proxy tells of its last requests."""
        raw = await get(self._site.proxy, RECORDS, key=self._site.admin_key)
        try:
            records = json.loads(raw or b"{}").get("requests", [])
        except ValueError:
            return
        for record in records:
            if (record.get("timings_ms") or {}).get("total") is not None:  # it has ended
                self.traces[record["request_id"]] = trace_of(record, self._addresses)

    async def record(self, request_id: str) -> str:
        """What the proxy tells of one request, as it is."""
        raw = await get(self._site.proxy, f"{RECORDS}/{request_id}", key=self._site.admin_key)
        return raw.decode(errors="replace") if raw is not None else "the proxy has no record of it"

    async def holdings(self) -> dict[str, Holdings]:
        """What every worker holds now."""
        names = list(self._site.workers)
        bodies = await asyncio.gather(*(get(self._site.workers[name], "/health") for name in names))
        return {name: _holdings(body) for name, body in zip(names, bodies, strict=True)}

    async def _look_at_holdings(self) -> None:
        held = (await self.holdings()).values()
        self.quarantined_most = max(self.quarantined_most, sum(one.quarantined_bytes for one in held))
        self.queued += any(one.queued for one in held)

    async def _look_at_memory(self) -> None:
        assert self._deployment is not None
        for process in self._deployment.processes:
            size = resident_bytes(process.pid)
            if size is not None and process.running and process.name not in self._injector.restarting:
                self.lives.setdefault((process.name, process.pid), []).append((time.monotonic(), size))

    async def _look_for_deaths(self) -> None:
        assert self._deployment is not None
        for process in self._deployment.processes:
            name = process.name
            if process.running or name in self._injector.restarting or name in self._injector.not_back:
                continue
            self.deaths.append(Death(name, "\n".join(self._deployment.log_tail(name))))
            await self._injector.restart(name)

    async def _feel_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_SECONDS)
            self.lag = max(self.lag, time.monotonic() - before - _LAG_SECONDS)


async def _every(seconds: float, look: Callable[[], Awaitable[None]]) -> None:
    while True:
        await look()
        await asyncio.sleep(seconds)


def _holdings(body: bytes | None) -> Holdings:
    if body is None:
        return Holdings("silent")
    try:
        return holdings_of(body)
    except ValueError as error:
        return Holdings(f"unreadable: {error}")
