"""Workers that are found by DNS, because addresses come and go, as in Kubernetes.

Each host on the command line is looked up every ``discover_seconds``, and each of its addresses is a worker. In
Kubernetes the host is a headless Service with ``publishNotReadyAddresses``: the proxy finds out by itself, and sooner,
whether a worker is ready. Workers join and leave as if an operator added and removed them: a leaving one finishes what
it has.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable

from kvbelt.errors import RequestError, SettingsError
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.proxy.workers.watch import Worker
from kvbelt.routing.endpoint import Health, Standing
from kvbelt.wire.health import Role

log = logging.getLogger("kvbelt.proxy")

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]


async def resolve(host: str, port: int) -> Iterable[str]:
    """Every address of a name. Raises OSError: it has none, or no DNS server answers."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Discovery:
    def __init__(self, fleet: Fleet, settings: ProxySettings, look_up: Resolve = resolve) -> None:
        self._fleet = fleet
        self._names = {Role.PREFILL: settings.prefill, Role.DECODE: settings.decode}
        self._seconds = settings.discover_seconds
        self._look_up = look_up
        self._failing: set[Address] = set()  # names whose last look-up failed
        self._joined: set[Worker] = set()  # workers that joined here; the others are operators'
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.refresh()
        self._task = asyncio.create_task(self._refresh_forever(), name="discovery")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Look every name up: new addresses join, missing ones leave."""
        for role, names in self._names.items():
            here: set[Address] = set()
            answered = True
            for name in names:
                found = await self._addresses(name)
                answered = answered and found is not None
                here |= found or set()
            self._add_new(role, here)
            self._remove_missing(role, here, answered=answered)

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self.refresh()

    async def _addresses(self, name: Address) -> set[Address] | None:
        """None: the look-up failed."""
        try:
            found = {Address(host, name.port) for host in await self._look_up(name.host, name.port)}
        except (OSError, SettingsError) as error:
            if name not in self._failing:
                self._failing.add(name)
                log.warning("%s has no address: %s; it is looked up again every %g s", name.host, error, self._seconds)
            return None
        self._failing.discard(name)
        return found

    def _add_new(self, role: Role, here: set[Address]) -> None:
        known = {worker.address: worker for worker in self._fleet.of(role)}
        for address in sorted(here, key=lambda one: one.name):
            worker = known.get(address)
            if worker is None:
                try:
                    self._joined.add(self._fleet.add(role, address))
                except RequestError as error:  # there are too many
                    log.warning("%s worker %s cannot join: %s", role, address.name, error.message)
                else:
                    log.info("%s worker %s has joined", role, address.name)
            elif worker in self._joined and worker.endpoint.standing is Standing.LEAVING:
                worker.set_standing(Standing.ACTIVE)  # its address was missing for a moment

    def _remove_missing(self, role: Role, here: set[Address], *, answered: bool) -> None:
        workers = self._fleet.of(role)
        self._joined = {worker for worker in self._joined if worker.role is not role or worker in workers}
        for worker in self._joined & set(workers):
            unnamed = worker.address not in here and worker.endpoint.standing is not Standing.LEAVING
            # A failed look-up is no reason to remove a healthy worker.
            if unnamed and (answered or worker.endpoint.report.health in (Health.LOST, Health.UNREADY)):
                log.info("%s worker %s is leaving: its address is not in DNS any more", role, worker.name)
                worker.set_standing(Standing.LEAVING)
