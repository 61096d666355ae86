"""Gives requests their place: keeps ``routing/placement.py`` up to date, asks it, and wakes the requests that wait.

It is called on each arrival, first token and end of a request, and each change of a worker. A timer does the rest. A
request that can have its place at once gets it without a suspension.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from itertools import islice
from math import ceil
from time import monotonic

from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.proxy.workers.watch import Held, Worker
from kvbelt.routing.booking import Action, Booking, Demand, WorkerBook
from kvbelt.routing.placement import LOOKAHEAD, Mode, Placement
from kvbelt.routing.prefixes import Prefix, Prefixes
from kvbelt.wire.health import Role

#: Placements from which the speed of the queue is told.
_RECENT = 64

_SPLIT, _BY_ROLE = Action.SPLIT, Mode.SPLIT  # fast to read


class NotPlacedError(Exception):
    """A request gets no place. ``reason`` is of ``wire/reasons.py``; ``retry_after`` in seconds."""

    def __init__(self, reason: str, detail: str, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


class Place:
    """A booking, and its workers, which stay in the fleet while they are held."""

    __slots__ = ("believed", "booking", "decode", "prefill", "waited")

    def __init__(self, booking: Booking, decode: Held, prefill: Held | None, believed: int) -> None:
        self.booking = booking
        self.believed = believed  #: prompt tokens that the worker that computes it should have held before
        self.decode = decode  #: generates
        self.prefill = prefill  #: computes the prompt and sends its KV; None: the other one does it all
        self.waited = 0.0  #: seconds until the request got it


class Dispatcher:
    """For the event loop's thread only."""

    def __init__(self, fleet: Fleet, settings: ProxySettings) -> None:
        self._fleet = fleet
        self._most = settings.max_waiting
        self._seconds = settings.max_wait_seconds
        self._mode = settings.placement  # the account may have ``placement`` act otherwise
        self.placement = Placement(settings.placement, can_send=self._can_send)
        self._prefixes = Prefixes()
        self._books: dict[Worker, WorkerBook] = {}  # of each worker's present incarnation
        self._ready: dict[Role, dict[WorkerBook, Worker]] = {Role.PREFILL: {}, Role.DECODE: {}}
        self._workers: dict[WorkerBook, Worker] = {}  # of every book that is or was ready
        self._changed: set[Worker] = set()
        self._waiting: dict[Demand, asyncio.Future[Place | None]] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT)  # when requests got their places
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # Workers

    def changed(self, worker: Worker) -> None:
        """It can be used, or not any more, or is another process now."""
        self._changed.add(worker)
        if self._waiting:
            self._dispatch(monotonic())

    def told_steps(self, worker: Worker) -> None:
        """It has told what its steps cost."""
        book = self._books.get(worker)
        if book is not None and worker.steps is not None and book.incarnation == worker.endpoint.incarnation:
            book.learn(worker.steps)
            self._prefixes.join(book.incarnation, worker.steps.most_held_tokens)

    def _take_in_changes(self) -> None:
        # In the order in which they joined, so that turns do not depend on which health check ended first.
        present = list(self._fleet)
        for worker in present:
            if worker in self._changed:
                self._update(worker)
        for worker in self._changed.difference(present):
            self._leave(worker)
        self._changed.clear()

    def _update(self, worker: Worker) -> None:
        endpoint = worker.endpoint
        book = self._books.get(worker)
        if book is not None and (not endpoint.ready or book.incarnation != endpoint.incarnation):
            self.placement.leave(book)
            self._ready[worker.role].pop(book, None)
        if not endpoint.ready:
            return
        if book is None or book.incarnation != endpoint.incarnation:
            self._leave(worker)
            book = self._books[worker] = WorkerBook(endpoint.incarnation, worker.role)
            self._workers[book] = worker
            self._prefixes.join(book.incarnation)
            self.told_steps(worker)
        book.settled = endpoint.settled
        self._ready[worker.role][book] = worker
        self.placement.join(book)

    def _leave(self, worker: Worker) -> None:
        """This incarnation is over. Requests that it has not answered end by themselves."""
        book = self._books.pop(worker, None)
        if book is not None:
            self.placement.leave(book)
            self._ready[worker.role].pop(book, None)
            del self._workers[book]
            # A server of both roles has two books.
            if all(other.incarnation != book.incarnation for other in self._workers):
                self._prefixes.leave(book.incarnation)

    def _can_send(self, prefill: WorkerBook, decode: WorkerBook) -> bool:
        report, pairs = self._workers[decode].endpoint.report, self._fleet.pairs
        if report.receiver is None:
            return False
        return not pairs.any_refused or pairs.usable(self._workers[prefill].engine_id, report.engine_id)

    # Requests

    def wants_prefixes(self) -> bool:
        """Whether it matters which workers hold a prompt."""
        if self._changed:
            self._take_in_changes()
        return self._prefixes.useful and self.placement.mode is not _BY_ROLE

    async def place(self, demand: Demand) -> Place:
        """Its place, until ``give_back``. Raises NotPlacedError."""
        now = monotonic()
        if self._changed:
            self._take_in_changes()
        if demand.prefix is not None:
            demand.held = self._prefixes.held(demand.prefix)
        if (booking := self.placement.arrive(demand, now)) is not None:
            return self._hold(booking)
        place = self._dispatch(now, demand)
        if place is not None:
            return place
        if demand.exclude or self.placement.waiting <= self._most:
            return await self._wait(demand, now)
        self.placement.withdraw(demand)
        detail = f"{self._most} requests wait for a worker already; try again later"
        raise NotPlacedError("queue_full", detail, self._retry_after(now))

    def first_token(self, booking: Booking) -> None:
        now = monotonic()
        self.placement.first_token(booking, now)
        prefix = booking.demand.prefix
        if prefix is not None:
            for book in _books_of(booking):
                self._prefixes.answered(prefix, book.incarnation)
        if self._waiting:
            self._dispatch(now)

    def counted(self, place: Place, cached: int | None) -> None:
        """The worker that has computed the prompt has told its counts, perhaps the tokens that it had cached."""
        prefix = place.booking.demand.prefix
        if prefix is not None:
            self._prefixes.counted(prefix, place.booking.prefill.incarnation, place.believed, cached)
            place.believed = 0  # a stream may tell them again

    def give_back(self, place: Place) -> None:
        """Its request needs no worker any more, for whatever reason."""
        place.decode.release()
        if place.prefill is not None:
            place.prefill.release()
        now, booking = monotonic(), place.booking
        if booking.demand.prefix is not None and booking.first_token is not None:
            self._prefixes.generated(booking.demand.prefix, booking.decode.incarnation, booking.generated)
        self.placement.end(booking, now)
        if self._waiting:
            self._dispatch(now)

    def why_whole(self, booking: Booking) -> str:
        """Why a request that could be split was not, of ``wire/reasons.py``."""
        if self.placement.mode is Mode.WHOLE:
            return "placement_whole" if self._mode is Mode.WHOLE else "splitting_loses"
        exclude = booking.demand.exclude
        reason = "no_prefill_worker"
        for prefill in self._untried(Role.PREFILL, exclude):
            reason = "no_decode_worker"
            for decode in self._untried(Role.DECODE, exclude):
                if self._can_send(prefill, decode):
                    return booking.reason or "no_room"
                takes = self._workers[decode].endpoint.report.receiver is not None
                reason = "pairs_refused" if takes else "decode_has_no_receiver"
        return reason

    def _untried(self, role: Role, exclude: frozenset[str]) -> Iterator[WorkerBook]:
        return (one for one in self._ready[role] if one.incarnation not in exclude)

    async def _wait(self, demand: Demand, since: float) -> Place:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Place | None] = loop.create_future()
        self._waiting[demand] = waiting
        bound = loop.call_later(self._seconds, self._give_up, demand)
        try:
            place = await waiting
        except BaseException:
            if self._waiting.pop(demand, None) is not None:
                self.placement.withdraw(demand)
            elif not waiting.cancelled() and waiting.exception() is None and (unused := waiting.result()) is not None:
                self.give_back(unused)  # it was placed in the same moment
            raise
        finally:
            bound.cancel()
        if place is None:
            raise _none_left()
        place.waited = place.booking.placed - since
        return place

    def _give_up(self, demand: Demand) -> None:
        waiting = self._waiting.pop(demand, None)
        if waiting is not None:
            self.placement.withdraw(demand)
            if not waiting.done():
                detail = f"no worker could take the request within {self._seconds:g} s; try again later"
                waiting.set_exception(NotPlacedError("overloaded", detail, self._retry_after(monotonic())))

    def _retry_after(self, now: float) -> int:
        """Seconds until those that wait now will have been placed, at the present speed."""
        recent = self._recent
        if len(recent) < 2:
            return max(1, round(self._seconds))
        each = (now - recent[0]) / len(recent)
        return max(1, ceil(each * self.placement.waiting))

    def _dispatch(self, now: float, arrived: Demand | None = None) -> Place | None:
        """Place what can be placed. Returns that of ``arrived``. Raises NotPlacedError: no worker is left for it."""
        if self._changed:
            self._take_in_changes()
        mine: Place | None = None
        lost = False
        for demand, booking in self.placement.dispatch(now):
            place = None if booking is None else self._hold(booking)
            if demand is arrived:
                mine, lost = place, place is None
            else:
                self._tell(demand, place)
        self._set_timer(now)
        if lost:
            raise _none_left()
        return mine

    def _tell(self, demand: Demand, place: Place | None) -> None:
        waiting = self._waiting.pop(demand)
        if not waiting.done():
            waiting.set_result(place)
        elif place is not None:  # its client has left in this moment
            self.give_back(place)

    def _hold(self, booking: Booking) -> Place:
        self._recent.append(booking.placed)
        believed = 0 if booking.demand.prefix is None else self._sent(booking, booking.demand.prefix)
        decode = Held(self._workers[booking.decode])
        prefill = Held(self._workers[booking.prefill]) if booking.action is _SPLIT else None
        return Place(booking, decode, prefill, believed)

    def _sent(self, booking: Booking, prefix: Prefix) -> int:
        """What the worker that computes it should have held before."""
        names = [book.incarnation for book in _books_of(booking)]
        believed = [self._prefixes.sent(prefix, name) for name in names]
        # Some of those that wait may begin as this one does, and are not known to be held there.
        for other in islice(self._waiting, LOOKAHEAD):
            theirs = other.prefix
            if theirs is not None and theirs.blocks[0] == prefix.blocks[0] and not other.held.keys() >= set(names):
                other.held = self._prefixes.held(theirs)
        return believed[0]

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_at = self.placement.wake_at
        if wake_at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.001, wake_at - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch(monotonic())


def _books_of(booking: Booking) -> tuple[WorkerBook, ...]:
    """First that of the worker that computes the prompt."""
    return (booking.prefill, booking.decode) if booking.action is _SPLIT else (booking.prefill,)


def _none_left() -> NotPlacedError:
    return NotPlacedError("no_decode_worker", "")
