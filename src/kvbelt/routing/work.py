"""How much work each worker got lately, and whether a hot prefix makes it too much. Pure."""

from itertools import chain

from kvbelt.routing.booking import Demand, WorkerBook

#: Seconds after which work counts half.
HALF_LIFE = 10.0


class RecentWork:
    """Sums up the seconds that are booked on each worker, as ``WorkerBook.work``."""

    def __init__(self) -> None:
        self._books: set[WorkerBook] = set()
        self._total = 0.0
        self._halved = 0.0  # when all sums were halved last

    def join(self, book: WorkerBook) -> None:
        if book not in self._books:
            self._books.add(book)
            self._total += book.work

    def leave(self, book: WorkerBook) -> None:
        if book in self._books:
            self._books.remove(book)
            self._total = sum(one.work for one in self._books)

    def add(self, book: WorkerBook, seconds: float, now: float) -> None:
        if book in self._books:
            book.work += seconds
            self._total += seconds
        if now - self._halved >= HALF_LIFE:
            self._forget(now)

    def _forget(self, now: float) -> None:
        left = 0.5 ** ((now - self._halved) // HALF_LIFE)
        self._halved, self._total = now, 0.0
        for book in self._books:
            book.work *= left
            self._total += book.work

    @property
    def mean(self) -> float:
        return self._total / len(self._books) if self._books else 0.0


def piles_up(demand: Demand, book: WorkerBook, held: int, most_work: float) -> bool:
    """Whether the worker gets too much work because it holds so many tokens of prompts such as this one.

    It has another request with the same beginning, and had more work than ``most_work`` by more than a copy costs.
    """
    prefix = demand.prefix
    if not held or prefix is None:
        return False
    copy = book.least_seconds(demand.tokens) - book.least_seconds(max(1, demand.tokens - held))
    if book.work <= most_work + copy:
        return False
    others = (one.demand.prefix for one in chain(book.prompts, book.decodes))
    return any(other is not None and 2 * other.tokens_like(prefix) >= held for other in others)
