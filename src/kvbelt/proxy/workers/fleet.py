"""The workers of a proxy: which there are, and which join and leave at run time.

A worker that leaves gets no new requests, finishes what it has, and is forgotten then. A worker that joins or leaves
disturbs no request under way.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

from kvbelt.errors import RequestError
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers.watch import Worker, WorkerEvents
from kvbelt.routing.pairs import Pairs
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.steps import StepsNow
from kvbelt.wire.workers import PairRow, WorkerRow

log = logging.getLogger("kvbelt.proxy")

MAX_WORKERS = 256  #: of one role; the health of each is checked all the time


class Fleet:
    """Every worker. For the event loop's thread only."""

    def __init__(
        self,
        settings: ProxySettings,
        *,
        lost: Callable[[Worker], None],
        appeared: Callable[[Worker], None],
        changed: Callable[[Worker], None],
        told_steps: Callable[[Worker], None],
    ) -> None:
        self._settings = settings
        self._events = WorkerEvents(lost, self._appeared, self._forget, self._changed, told_steps)
        self._on_changed = changed
        self._on_appeared = appeared
        # By name, in the order in which they joined.
        self._of: dict[Role, dict[str, Worker]] = {Role.PREFILL: {}, Role.DECODE: {}}
        self._engines: dict[Worker, EngineId] = {}  # of each one's latest healthy incarnation
        # The same by engine. A server of both roles may be two workers.
        self._by_engine: dict[EngineId, list[Worker]] = {}
        self._watches: dict[Worker, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # cancelled watches
        self._seeds_logged: set[frozenset[str | None]] = set()
        self._running = False
        self._contexts: tuple[int | None, int | None] | None = None  # if they were asked for since the last change
        self.pairs = Pairs()
        if not settings.discover:  # else they are names, and discovery.py adds the workers
            for role, addresses in ((Role.PREFILL, settings.prefill), (Role.DECODE, settings.decode)):
                for address in addresses:
                    self._join(role, address)

    def __iter__(self) -> Iterator[Worker]:
        return iter([*self.of(Role.PREFILL), *self.of(Role.DECODE)])

    def of(self, role: Role) -> list[Worker]:
        return list(self._of[role].values())

    def start(self) -> None:
        self._running = True
        for worker in self:
            self._watch(worker)

    async def close(self) -> None:
        self._running = False
        for watch in self._watches.values():
            self._end(watch)
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._watches.clear()
        for worker in self:
            worker.close()

    def rows(self) -> list[WorkerRow]:
        return [worker.row() for worker in self]

    def pair_rows(self) -> list[PairRow]:
        """Every pair that has been tried: whether the one can send to the other, and if not, why."""
        return [
            PairRow(prefill=p.name, decode=d.name, state=pair.state, reason=pair.reason, detail=pair.detail)
            for p in self.of(Role.PREFILL)
            for d in self.of(Role.DECODE)
            if (pair := self.pairs.get(p.engine_id, d.engine_id)) is not None
        ]

    @property
    def shortest_context(self) -> int | None:
        """Tokens of the shortest context that a worker has said; None: none has."""
        return self._extreme_contexts()[0]

    @property
    def longest_context(self) -> int | None:
        """Tokens of the longest context; None: a worker has not said its own."""
        return self._extreme_contexts()[1]

    def _extreme_contexts(self) -> tuple[int | None, int | None]:
        if self._contexts is None:
            said = [one.endpoint.report.max_model_len for one in self]
            known = [tokens for tokens in said if tokens is not None]
            longest = max(known) if known and len(known) == len(said) else None
            self._contexts = min(known, default=None), longest
        return self._contexts

    def with_engine(self, engine: EngineId) -> Worker | None:
        """The worker whose latest healthy incarnation has this engine_id."""
        return next(iter(self._by_engine.get(engine, ())), None)

    def on_steps(self, engine: EngineId, steps: StepsNow) -> None:
        """An engine has told of its steps. One that is not known yet is asked for them when it is."""
        for worker in self._by_engine.get(engine, ()):
            if worker.engine_id == engine:
                worker.on_steps(steps)

    # Joining and leaving

    def add(self, role: Role, address: Address) -> Worker:
        """A worker joins. Raises RequestError 409: it is there already, or there are too many."""
        known = self._of[role].get(address.name)
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
        worker = self._join(role, address)
        if self._running:
            self._watch(worker)
        return worker

    def named(self, name: str, role: Role | None = None) -> Worker:
        """The worker of this name. Raises RequestError: 404, there is none; 409, there are two and no role given."""
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

    def _join(self, role: Role, address: Address) -> Worker:
        worker = Worker(address, role, self._settings, self._events)
        self._of[role][worker.name] = worker
        self._contexts = None
        return worker

    def _changed(self, worker: Worker) -> None:
        self._contexts = None
        self._on_changed(worker)

    def _watch(self, worker: Worker) -> None:
        self._watches[worker] = asyncio.create_task(worker.watch(), name=f"watch {worker.name}")

    def _end(self, watch: asyncio.Task[None]) -> None:
        self._ending.add(watch)
        watch.add_done_callback(self._ending.discard)
        watch.cancel()

    def _appeared(self, worker: Worker) -> None:
        engine = worker.engine_id
        if self._engines.get(worker) != engine:
            self._forget_engine(worker)
            if engine is not None:
                self._engines[worker] = engine
                self._by_engine.setdefault(engine, []).append(worker)
        self._warn_of_hash_seeds(worker)
        self._on_appeared(worker)

    def _warn_of_hash_seeds(self, worker: Worker) -> None:
        """Log once that two workers' PYTHONHASHSEED differ: no handshake refuses it, but it is seldom meant."""
        mine = worker.endpoint.report
        for other in self:
            theirs = other.endpoint.report
            seeds = frozenset({mine.hash_seed, theirs.hash_seed})
            if not other.healthy or len(seeds) < 2 or None in seeds or seeds in self._seeds_logged:
                continue
            self._seeds_logged.add(seeds)
            vllm = "vllm" in (mine.engine, theirs.engine)
            log.log(
                logging.WARNING if vllm else logging.INFO,
                "PYTHONHASHSEED is %s at %s and %s at %s. kvbelt's block hashes do not depend on it%s. "
                "Export PYTHONHASHSEED=0 before each worker starts",
                mine.hash_seed,
                worker.name,
                theirs.hash_seed,
                other.name,
                ", but vLLM's own do" if vllm else "",
            )

    def _forget(self, worker: Worker) -> None:
        if self._of[worker.role].pop(worker.name, None) is not worker:
            return
        self._contexts = None
        watch = self._watches.pop(worker, None)
        if watch is not None:
            self._end(watch)
        self._forget_engine(worker)
        worker.close()

    def _forget_engine(self, worker: Worker) -> None:
        engine = self._engines.pop(worker, None)
        if engine is None:
            return
        self._by_engine[engine].remove(worker)
        if not self._by_engine[engine]:
            del self._by_engine[engine]
        self.pairs.forget(engine)
