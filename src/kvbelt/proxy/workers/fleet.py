"""The workers of a proxy: which there are, whose turn it is, and who comes and goes at run time.

A worker that is to leave gets no new request, finishes what it has, and is forgotten then. Nothing in flight is
disturbed by anybody's coming or going.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator

from kvbelt.errors import RequestError
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers import Worker, WorkerEvents
from kvbelt.routing.endpoint import Endpoint, Role, Standing
from kvbelt.routing.pairs import Pairs
from kvbelt.routing.policy import Policy
from kvbelt.wire.ids import EngineId

#: Of one role. Each is asked for its health all the time.
MAX_WORKERS = 256


class Fleet:
    """Every worker, and the choice among them. Touched from the event loop only."""

    def __init__(
        self, settings: ProxySettings, lost: Callable[[Worker], None], appeared: Callable[[Worker], None]
    ) -> None:
        self._settings = settings
        self._events = WorkerEvents(lost, self._appeared, self._forget)
        self._on_appeared = appeared
        # The same workers twice: in the order in which they came, which is that of their turns, and by name.
        self._of: dict[Role, list[Worker]] = {Role.PREFILL: [], Role.DECODE: []}
        self._by_name: dict[tuple[Role, str], Worker] = {}
        self._policies = {Role.PREFILL: Policy(), Role.DECODE: Policy()}
        self._engines: dict[Worker, EngineId] = {}  # of the latest life of each that was healthy
        self._watches: dict[Worker, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # watches that were cancelled
        self._running = False
        self.pairs = Pairs()
        if not settings.discover:  # else they are names, and discovery.py finds out whose
            for role, addresses in ((Role.PREFILL, settings.prefill), (Role.DECODE, settings.decode)):
                for address in addresses:
                    self._take_in(role, address)

    def __iter__(self) -> Iterator[Worker]:
        """All of them, prefill workers first."""
        return iter([*self._of[Role.PREFILL], *self._of[Role.DECODE]])

    def of(self, role: Role) -> list[Worker]:
        """Those of one role."""
        return self._of[role]

    def start(self) -> None:
        """Begin to watch."""
        self._running = True
        for worker in self:
            self._watch(worker)

    async def close(self) -> None:
        """Stop watching, and close every connection."""
        self._running = False
        for watch in self._watches.values():
            self._end(watch)
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._watches.clear()
        for worker in self:
            worker.close()

    # Whose turn it is

    def pick_decode(self, exclude: Collection[str] = ()) -> Worker | None:
        """The decode worker whose turn it is. ``exclude``: lives that were tried already."""
        return self._pick(Role.DECODE, exclude, None)

    def pick_prefill(self, decode: Worker, exclude: Collection[str] = ()) -> Worker | None:
        """The prefill worker whose turn it is, of those that this decode worker has not refused."""
        pairs, there = self.pairs, decode.engine_id
        only = (lambda one: pairs.usable(one.report.engine_id, there)) if pairs.any_refused else None
        return self._pick(Role.PREFILL, exclude, only)

    def any_prefill_ready(self, exclude: Collection[str] = ()) -> bool:
        """Whether a prefill worker is ready, be it refused or not."""
        return any(one.ready and one.endpoint.life not in exclude for one in self._of[Role.PREFILL])

    def _pick(self, role: Role, exclude: Collection[str], only: Callable[[Endpoint], bool] | None) -> Worker | None:
        endpoints = [worker.endpoint for worker in self._of[role]]
        chosen = self._policies[role].pick(endpoints, exclude=exclude, only=only)
        return None if chosen is None else self._by_name[role, chosen.name]

    def with_engine(self, engine: EngineId) -> Worker | None:
        """The worker whose present life has this name."""
        return next((worker for worker, known in self._engines.items() if known == engine), None)

    # Who comes and goes

    def add(self, role: Role, address: Address) -> Worker:
        """A worker joins. It gets requests once it says that it is ready.

        Raises:
            RequestError: 409, it is there already, or there are too many.
        """
        known = self._by_name.get((role, address.name))
        if known is not None:
            raise RequestError(
                f"{role} worker {address.name} is there already ({known.endpoint.standing}); "
                "undrain it, or wait until it is gone",
                status=409,
                kind="conflict_error",
                param="host",
            )
        if len(self._of[role]) >= MAX_WORKERS:
            raise RequestError(
                f"there are {MAX_WORKERS} {role} workers; remove one first", status=409, kind="conflict_error"
            )
        worker = self._take_in(role, address)
        if self._running:
            self._watch(worker)
        return worker

    def named(self, name: str, role: Role | None = None) -> Worker:
        """The worker of this name.

        Raises:
            RequestError: 404, there is none; 409, there are two and no role was given.
        """
        found = [worker for worker in self if worker.name == name and role in (None, worker.role)]
        if not found:
            names = ", ".join(sorted({worker.name for worker in self})) or "none"
            what = "worker" if role is None else f"{role} worker"
            raise RequestError(f"there is no {what} {name!r}; there are {names}", status=404, kind="not_found_error")
        if len(found) > 1:
            raise RequestError(
                f"{name} is a prefill and a decode worker; say which with ?role=prefill or ?role=decode",
                status=409,
                kind="conflict_error",
                param="role",
            )
        return found[0]

    def remove(self, worker: Worker) -> None:
        """A worker leaves as soon as nobody needs it."""
        worker.stand(Standing.LEAVING)

    # How

    def _take_in(self, role: Role, address: Address) -> Worker:
        worker = Worker(address, role, self._settings, self._events)
        self._of[role].append(worker)
        self._by_name[role, worker.name] = worker
        return worker

    def _watch(self, worker: Worker) -> None:
        self._watches[worker] = asyncio.create_task(worker.watch(), name=f"watch {worker.name}")

    def _end(self, watch: asyncio.Task[None]) -> None:
        self._ending.add(watch)
        watch.add_done_callback(self._ending.discard)
        watch.cancel()

    def _appeared(self, worker: Worker) -> None:
        before, engine = self._engines.get(worker), worker.engine_id
        if before is not None and before != engine:
            self.pairs.forget(before)
        if engine is not None:
            self._engines[worker] = engine
        self._on_appeared(worker)

    def _forget(self, worker: Worker) -> None:
        if self._by_name.pop((worker.role, worker.name), None) is not worker:
            return
        self._of[worker.role].remove(worker)
        watch = self._watches.pop(worker, None)
        if watch is not None:
            self._end(watch)
        engine = self._engines.pop(worker, None)
        if engine is not None:
            self.pairs.forget(engine)
        worker.close()
