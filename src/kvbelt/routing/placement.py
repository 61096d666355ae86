"""Which worker computes a request's prompt, which one generates, and when. Pure.

Requests wait here, not at workers. Placement hands a prompt over when a worker is nearly free, in the order of the
requests' deadlines. A request that will miss its deadline goes behind the others, for a bounded time.

``choice.py`` has the choice of a plan; here are the requests that wait and those that run.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from kvbelt.routing.booking import Booking, Demand, Pace, Plan, WorkerBook
from kvbelt.routing.choice import Choice
from kvbelt.routing.queue import Queue
from kvbelt.routing.rules import DEFAULT_RULES, Mode, Rules

__all__ = ["LOOKAHEAD", "Mode", "Placement", "Rules"]

#: Waiting requests that one pass considers.
LOOKAHEAD = 8

#: Seconds until the next pass, for each plan that a pass made: about forty times the CPU time of a plan. A worker gets
#: its next prompt before it is free, so a later pass is still in time.
PAUSE = 100e-6

_ELASTIC = Mode.ELASTIC  # fast to read


def _always(_prefill: WorkerBook, _decode: WorkerBook) -> bool:
    return True


class Placement:
    """All requests that wait, and all work booked on workers.

    ``now`` is in seconds and never goes back. After every change (a request, a worker, a first token, an end) and at
    ``wake_at`` the caller calls ``dispatch``.

    Args:
        mode: which actions may be chosen.
        rules: constants of the decision.
        can_send: whether the first worker can send KV to the second.
    """

    def __init__(
        self,
        mode: Mode = Mode.ELASTIC,
        rules: Rules = DEFAULT_RULES,
        can_send: Callable[[WorkerBook, WorkerBook], bool] = _always,
    ) -> None:
        self.rules = rules
        self._choice = Choice(mode, rules, can_send)
        self._running: set[Booking] = set()
        self._queue = Queue(self._least_seconds, rules.patience)
        self._silent: list[tuple[float, int, Booking]] = []  # a heap by the moment at which the first token is expected
        self._turn = count()
        self._next_pass = 0.0  # no pass before this moment, if the last one left requests waiting
        self._look_now = False  # a request may have no worker left
        self._pace = Pace()
        self.wake_at: float | None = None  #: when ``dispatch`` is due again, if nothing else happens

    @property
    def mode(self) -> Mode:
        return self._choice.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._choice.mode = mode

    # Workers

    def join(self, book: WorkerBook) -> None:
        """The worker is ready. Called again after ``settled`` has changed."""
        book.pace = self._pace
        self._choice.join(book)

    def leave(self, book: WorkerBook) -> None:
        """The worker gets no more requests. Its bookings stay until they end."""
        self._choice.leave(book)
        self._look_now = True

    # Requests

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, demand: Demand) -> None:
        self._queue.add(demand)
        self._look_now |= bool(demand.exclude)
        self._choice.rate.count(demand.arrived)

    def arrive(self, demand: Demand, now: float) -> Booking | None:
        """Submit a request, and place it if none waits and it can be placed now. None: ``dispatch`` will.

        Most requests find nobody waiting, and need not pass through the queue.
        """
        if len(self._queue) or demand.exclude:
            self.submit(demand)
            return None
        self._choice.rate.count(demand.arrived)
        self._end_silence(now)
        plan = self._choice.best(demand, now, {})
        if plan is not None and (plan.wait <= self.rules.ahead or self._may_have(plan, demand, now, {})):
            return self._book(demand, plan, now)
        self._queue.add(demand)
        return None

    def withdraw(self, demand: Demand) -> None:
        """Drop a waiting request, because its client is gone."""
        self._queue.drop(demand)

    def dispatch(self, now: float) -> list[tuple[Demand, Booking | None]]:
        """Place every request that can be placed now. None instead of a booking: no worker is left for it."""
        placed: list[tuple[Demand, Booking | None]] = []
        kept: list[Demand] = []
        planned: dict[WorkerBook, float] = {}  # prompts of requests that wait, in seconds from now
        self.wake_at = None
        self._end_silence(now)
        if now < self._next_pass and not self._look_now:
            self._wake(self._next_pass)
            return placed
        self._look_now, self._choice.plans_made = False, 0
        for demand in self._queue.in_order(now):
            plan = self._choice.best(demand, now, planned)
            if plan is None:
                if self._choice.any_ready(demand):
                    kept.append(demand)
                else:
                    placed.append((demand, None))
            elif plan.wait <= self.rules.ahead or self._may_have(plan, demand, now, planned):
                placed.append((demand, self._book(demand, plan, now)))
            else:
                kept.append(demand)
                planned[plan.prefill] = plan.ends
                if plan.prefill.late(now) <= 0.0:  # otherwise the end of its prompt wakes
                    self._wake(now + plan.wait - self._margin(plan, demand))
            if len(kept) >= LOOKAHEAD:
                break
        for demand in reversed(kept):
            self._queue.keep(demand, now)
        self._next_pass = now + min(self.rules.ahead / 2, PAUSE * self._choice.plans_made) if kept else 0.0
        if kept and self._silent:
            self._wake(self._silent[0][0])
        return placed

    def _end_silence(self, now: float) -> None:
        while self._silent and self._silent[0][0] <= now:
            self._computed(heappop(self._silent)[2], now)

    def _may_have(self, plan: Plan, demand: Demand, now: float, planned: dict[WorkerBook, float]) -> bool:
        """Whether a prompt is handed over although its worker has others."""
        if self._choice.mode is not _ELASTIC or plan.wait <= self._margin(plan, demand):
            return True
        # A worker that is late with its only prompt may be free at any moment.
        book = plan.prefill
        return len(book.prompts) == 1 and book not in planned and book.late(now) >= -self.rules.ahead

    def _margin(self, plan: Plan, demand: Demand) -> float:
        """How many seconds before the worker computes a prompt it gets it."""
        return max(self.rules.ahead, self.rules.soon * demand.levels.ttft - plan.own)

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(at, self.wake_at)

    def _least_seconds(self, demand: Demand) -> float:
        """Of the request's prefill on the worker that is free first. Assumes that it holds the longest prefix."""
        tokens = demand.tokens
        if demand.held:
            tokens = max(1, tokens - max(demand.held.values()))
        book = self._choice.first_free
        return book.least_seconds(tokens) if book is not None else 0.0

    # Bookings

    def _book(self, demand: Demand, plan: Plan, now: float) -> Booking:
        booking = Booking(
            demand, plan.action, plan.reason, plan.prefill, plan.decode, plan.tokens, now, now + plan.ends, plan.own
        )
        prefill, decode = plan.prefill, plan.decode
        prefill.add_prompt(booking, now)
        decode.kv_booked += demand.tokens + demand.output
        if prefill is not decode:
            decode.arriving += 1
        self._running.add(booking)
        prefill.used_at = decode.used_at = now
        if demand.silent and prefill is decode:
            heappush(self._silent, (booking.predicted, next(self._turn), booking))
        self._choice.booked(demand, plan, now)
        return booking

    def first_token(self, booking: Booking, now: float) -> None:
        """The prompt is computed, and the request generates. The caller reports this of a silent answer at its end."""
        if booking.first_token is None:
            booking.prefill.computed(booking, now)
            self._computed(booking, now)

    def _computed(self, booking: Booking, now: float) -> None:
        prefill, decode = booking.prefill, booking.decode
        if booking.first_token is not None or booking not in prefill.prompts:
            return
        booking.first_token = now
        prefill.remove_prompt(booking, now)
        if prefill is not decode:
            decode.arriving -= 1
        decode.add_decode(booking, now)
        self._choice.moved(prefill, decode)

    def end(self, booking: Booking, now: float) -> None:
        """The request needs no worker any more. May be called again."""
        prefill, decode = booking.prefill, booking.decode
        if booking in decode.decodes:
            decode.remove_decode(booking)
            prefill = decode  # the other one is not changed
        elif booking in prefill.prompts:
            prefill.remove_prompt(booking, now)
            if prefill is not decode:
                decode.arriving -= 1
        else:
            return
        decode.kv_booked -= booking.demand.tokens + booking.demand.output
        self._running.discard(booking)
        self._choice.moved(prefill, decode)
