"""Waiting requests, in the order in which they are placed. Pure."""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count

from kvbelt.routing.booking import Demand


class Queue:
    """First the requests that can meet their deadline, by deadline; then the others, by arrival.

    Args:
        least_seconds: how long a request's prefill would take from now.
        patience: a late request is served next after waiting so many of its TTFT levels.
    """

    def __init__(self, least_seconds: Callable[[Demand], float], patience: float) -> None:
        self._least_seconds = least_seconds
        self._patience = patience
        self._on_time: list[tuple[float, int, Demand]] = []  # a heap
        self._late: deque[Demand] = deque()
        self._gone: set[Demand] = set()
        self._turn = count()

    def __len__(self) -> int:
        return len(self._on_time) + len(self._late) - len(self._gone)

    def add(self, demand: Demand) -> None:
        heappush(self._on_time, (demand.due, next(self._turn), demand))

    def drop(self, demand: Demand) -> None:
        self._gone.add(demand)

    def in_order(self, now: float) -> Iterator[Demand]:
        """Take requests out: those whose patience has ended, then those in time, then those that are late."""
        while self._late and now - self._late[0].arrived >= self._patience * self._late[0].levels.ttft:
            demand = self._late.popleft()
            if not self._is_gone(demand):
                yield demand
        alone = len(self._on_time) == 1 and not self._late
        while self._on_time:
            demand = heappop(self._on_time)[2]
            if self._is_gone(demand):
                continue
            if not alone and now + self._least_seconds(demand) > demand.due:
                self._late.append(demand)
                continue
            yield demand
        for _ in range(len(self._late)):
            demand = self._late.popleft()
            if not self._is_gone(demand):
                yield demand

    def keep(self, demand: Demand, now: float) -> None:
        """Put back a request that was taken out. Put back several in reverse order."""
        if now + self._least_seconds(demand) > demand.due:
            self._late.appendleft(demand)
        else:
            heappush(self._on_time, (demand.due, next(self._turn), demand))

    def _is_gone(self, demand: Demand) -> bool:
        if self._gone and demand in self._gone:
            self._gone.remove(demand)
            return True
        return False
