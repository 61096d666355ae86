"""Policies that place requests: kvbelt's placement, and those that it is compared with."""

from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush

from kvbelt.routing.booking import Action, Booking, Demand, WorkerBook
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode, Placement, Rules
from kvbelt.routing.prefixes import Prefix
from kvbelt.simulate.load import Request
from kvbelt.simulate.model import learned_costs
from kvbelt.simulate.world import SimulatedWorker, World
from kvbelt.wire.health import Role


@dataclass(slots=True, eq=False)
class _Asked(Demand):
    request: Request = field(kw_only=True)


class Placed:
    """``routing/placement.py``, as the proxy calls it."""

    proxied = True

    def __init__(self, mode: Mode, levels: ServiceLevels, rules: Rules | None = None) -> None:
        self.levels = levels
        self.itl = levels.itl
        self.placement = Placement(mode, rules or Rules())
        self.errors: list[float] = []  #: seconds by which first tokens came later than predicted
        self._workers: dict[str, SimulatedWorker] = {}
        self._books: dict[SimulatedWorker, WorkerBook] = {}
        self._bookings: dict[Request, Booking] = {}
        self._woken: float | None = None

    def enter(self, world: World) -> None:
        self._world = world
        for worker in world.workers:
            book = WorkerBook(worker.name, worker.role)
            model = worker.model
            book.costs, book.most_prompt_tokens = learned_costs(model), model.most_prompt_tokens
            book.most_requests, book.kv_capacity = model.most_requests, model.kv_capacity
            self._books[worker] = book
            self._workers[worker.name] = worker
            self.placement.join(book)

    def leave(self, worker: SimulatedWorker) -> None:
        self.placement.leave(self._books[worker])

    def arrived(self, request: Request, now: float) -> None:
        held, prefix = {}, None
        if request.conversation is not None or request.held:
            prefix = _prefix_of(request)
            held = {worker.name: tokens for worker in self._world.workers if (tokens := worker.held(request))}
        asked = _Asked(
            request.prompt + request.generated,
            request.output - request.generated,
            now,
            request.levels or self.levels,
            request.splittable,
            held=held,
            prefix=prefix,
            request=request,
        )
        self.placement.submit(asked)
        self._dispatch(now)

    def first_token(self, request: Request, now: float) -> None:
        booking = self._bookings[request]
        self.errors.append(now - booking.predicted)
        self.placement.first_token(booking, now)
        self._changed(now)

    def ended(self, request: Request, now: float) -> None:
        self.placement.end(self._bookings.pop(request), now)
        self._changed(now)

    def _changed(self, now: float) -> None:
        if self.placement.waiting:
            self._dispatch(now)

    def _wake(self, now: float) -> None:
        if self._woken is not None and now >= self._woken:
            self._woken = None
            self._changed(now)

    def _dispatch(self, now: float) -> None:
        if len(self._workers) <= _FEW:
            for request, running in self._bookings.items():
                if running.first_token is not None:
                    running.generated = self._world.generated(request, now)
        for demand, booking in self.placement.dispatch(now):
            assert isinstance(demand, _Asked)
            if booking is None:
                raise RuntimeError("no worker is left")
            self._send(demand.request, booking, now)
        wake = self.placement.wake_at
        if wake is not None and (self._woken is None or wake < self._woken or self._woken <= now):
            self._woken = max(wake, now + 1e-4)
            self._world.at(self._woken, self._wake)

    def _send(self, request: Request, booking: Booking, now: float) -> None:
        self._bookings[request] = booking
        role = f" {booking.prefill.lean}" if booking.action is Action.WHOLE else ""
        request.action = f"{booking.action}{role}"
        prefill, decode = self._workers[booking.prefill.incarnation], self._workers[booking.decode.incarnation]
        self._world.send(request, prefill, decode, now)


def _prefix_of(request: Request) -> Prefix | None:
    """A prompt of four bytes a token, which begins as the others of its conversation."""
    if request.conversation is None:
        return None
    own = request.prompt - request.shared
    prompt = b"%08d" % request.conversation * (request.shared // 2) + b"%08d" % request.number * (own // 2)
    return Prefix(prompt, request.prompt)


#: With more workers the generated tokens are not counted at every dispatch.
_FEW = 16


class Plain:
    """Plain servers, in turn or by the fewest requests outstanding."""

    proxied = False
    itl: float | None = None

    def __init__(self, *, least: bool) -> None:
        self._least = least
        self._turn = 0
        self._order: list[tuple[int, int, int]] = []  # a heap: outstanding, last turn, worker; stale ones in between
        self._outstanding: list[int] = []
        self._turns: list[int] = []
        self._at: dict[Request, int] = {}

    def enter(self, world: World) -> None:
        self._world = world
        self._outstanding, self._turns = [0] * len(world.workers), list(range(len(world.workers)))
        self._turn = len(world.workers)
        self._order = [(0, index, index) for index in self._turns]

    def leave(self, worker: SimulatedWorker) -> None:
        self._turns[self._world.workers.index(worker)] = -1

    def arrived(self, request: Request, now: float) -> None:
        while True:
            outstanding, turn, index = heappop(self._order)
            if turn == self._turns[index] and outstanding == (self._outstanding[index] if self._least else 0):
                break
        self._turns[index] = self._turn
        self._turn += 1
        self._at[request] = index
        request.action = "whole"
        self._count(index, 1)
        worker = self._world.workers[index]
        self._world.send(request, worker, worker, now)

    def first_token(self, request: Request, now: float) -> None:
        pass

    def ended(self, request: Request, now: float) -> None:  # noqa: ARG002 -- as the others
        self._count(self._at.pop(request), -1)

    def _count(self, index: int, more: int) -> None:
        self._outstanding[index] += more
        if self._turns[index] >= 0 and (self._least or more > 0):
            heappush(self._order, (self._outstanding[index] if self._least else 0, self._turns[index], index))


class FixedSplit:
    """Every prompt to a prefill worker, every answer to a decode worker, each in turn."""

    proxied = True
    itl: float | None = None

    def __init__(self) -> None:
        self._turns = Counter[Role]()

    def enter(self, world: World) -> None:
        self._world = world
        self._sides = {role: [worker for worker in world.workers if worker.role is role] for role in Role}

    def leave(self, worker: SimulatedWorker) -> None:
        self._sides[worker.role].remove(worker)

    def arrived(self, request: Request, now: float) -> None:
        prefill, decode = self._next(Role.PREFILL), self._next(Role.DECODE)
        request.action = Action.SPLIT
        self._world.send(request, prefill, decode, now)

    def _next(self, role: Role) -> SimulatedWorker:
        self._turns[role] += 1
        return self._sides[role][self._turns[role] % len(self._sides[role])]

    def first_token(self, request: Request, now: float) -> None:
        pass

    def ended(self, request: Request, now: float) -> None:
        pass
