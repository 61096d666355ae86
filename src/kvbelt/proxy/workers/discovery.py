"""Workers that DNS names: where they come and go, as in Kubernetes, nobody need tell the proxy.

Each host that the command line names is looked up every ``discover_seconds``, and each address that it has is a
worker. In Kubernetes it is a headless Service with ``publishNotReadyAddresses``: whether a worker is ready the proxy
finds out by itself, and sooner. Who joins and leaves so is treated as one that an operator adds and removes: whoever
leaves finishes what it has.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable

from kvbelt.errors import RequestError, SettingsError
from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Health, Role, Standing

log = logging.getLogger("kvbelt.proxy")

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]


async def resolve(host: str, port: int) -> Iterable[str]:
    """Every address of a name.

    Raises:
        OSError: it has none, or nobody could be asked.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Discovery:
    """Owns the task that looks names up. Touches the fleet from the event loop."""

    def __init__(self, fleet: Fleet, settings: ProxySettings, look_up: Resolve = resolve) -> None:
        self._fleet = fleet
        self._names = {Role.PREFILL: settings.prefill, Role.DECODE: settings.decode}
        self._seconds = settings.discover_seconds
        self._look_up = look_up
        self._failing: set[Address] = set()  # names that had no answer when they were last looked up
        self._taken: set[Worker] = set()  # who was taken in here; others are their operator's
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look every name up once, then now and then."""
        await self.refresh()
        self._task = asyncio.create_task(self._keep_looking(), name="discovery")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Take in whoever is named now; whoever is not named any more leaves."""
        for role, names in self._names.items():
            here: set[Address] = set()
            answered = True
            for name in names:
                found = await self._addresses(name)
                answered = answered and found is not None
                here |= found or set()
            self._take_in(role, here)
            self._let_go(role, here, answered=answered)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self.refresh()

    async def _addresses(self, name: Address) -> set[Address] | None:
        """None: there was no answer."""
        try:
            found = {Address(host, name.port) for host in await self._look_up(name.host, name.port)}
        except (OSError, SettingsError) as error:
            if name not in self._failing:
                self._failing.add(name)
                log.warning("%s has no address: %s; it is looked up every %g s", name.host, error, self._seconds)
            return None
        self._failing.discard(name)
        return found

    def _take_in(self, role: Role, here: set[Address]) -> None:
        known = {worker.address: worker for worker in self._fleet.of(role)}
        for address in sorted(here, key=lambda one: one.name):
            worker = known.get(address)
            if worker is None:
                try:
                    self._taken.add(self._fleet.add(role, address))
                except RequestError as error:  # there are too many
                    log.warning("%s worker %s was not taken in: %s", role, address.name, error.message)
                else:
                    log.info("%s worker %s has joined", role, address.name)
            elif worker in self._taken and worker.endpoint.standing is Standing.LEAVING:
                worker.stand(Standing.ACTIVE)  # it was gone for a moment

    def _let_go(self, role: Role, here: set[Address], *, answered: bool) -> None:
        workers = self._fleet.of(role)
        self._taken = {worker for worker in self._taken if worker.role is not role or worker in workers}
        for worker in self._taken & set(workers):
            unnamed = worker.address not in here and worker.endpoint.standing is not Standing.LEAVING
            # No answer is no reason to send a healthy worker away.
            if unnamed and (answered or _does_not_serve(worker)):
                log.info("%s worker %s is leaving: no name leads to it any more", role, worker.name)
                self._fleet.remove(worker)


def _does_not_serve(worker: Worker) -> bool:
    return worker.endpoint.report.health in (Health.LOST, Health.UNREADY)
