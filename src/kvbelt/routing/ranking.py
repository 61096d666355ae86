"""Sorted workers. A change of one worker moves only that one."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from itertools import count
from math import inf

from kvbelt.routing.booking import WorkerBook


def freedom(book: WorkerBook) -> tuple[float, int]:
    """Sort key: the moment at which the worker is free for a prompt."""
    if not book.settled:
        return inf, 0
    return (book.free_at if book.prompts else 0.0, len(book.decodes))


def decode_load(book: WorkerBook) -> tuple[float, int]:
    if not book.settled:
        return inf, 0
    return (book.decode_step(book.arriving, 0), book.arriving)


class Ranking:
    """Workers sorted by a key, and those with equal keys by their turn.

    A request changes its workers several times between two reads of the order. So a change only marks the worker, and
    the next read sorts, unless one worker is all there is.
    """

    def __init__(self, key: Callable[[WorkerBook], tuple[float, int]]) -> None:
        self._key = key
        self._order: list[tuple[float, int, int, WorkerBook]] = []
        self._places: dict[WorkerBook, tuple[float, int, int, WorkerBook]] = {}  # as in the order
        self._books: dict[str, WorkerBook] = {}
        self._turns: dict[WorkerBook, int] = {}  # unique, so that a sort never compares two workers
        self._changed: set[WorkerBook] = set()
        self._alone = False  # the order has one worker, and no other one has joined
        self._turn = count()

    def put(self, book: WorkerBook) -> None:
        """Add the worker, or mark it as changed."""
        if self._books.get(book.incarnation) is not book:
            self.drop(book)
            self._books[book.incarnation], self._turns[book] = book, next(self._turn)
            self._alone = False
        self._changed.add(book)

    def moved(self, book: WorkerBook, *, used: bool = False) -> None:
        """Mark the worker as changed, if it is here. ``used``: move it behind workers with an equal key."""
        if book in self._turns:
            if used:
                self._turns[book] = next(self._turn)
            self._changed.add(book)

    def drop(self, book: WorkerBook) -> None:
        """Remove the worker of that incarnation."""
        before = self._books.pop(book.incarnation, None)
        if before is not None:
            del self._turns[before]
            self._changed.add(before)
            self._alone = False

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def head(self) -> WorkerBook | None:
        """The first one."""
        if self._changed and not self._alone:
            self._sort()
        return self._order[0][3] if self._order else None

    def first(self, number: int, also: Iterable[str] = ()) -> list[WorkerBook]:
        """The first workers, then those of ``also`` that are here."""
        if self._changed and not self._alone:
            self._sort()
        books = [place[3] for place in self._order[:number]]
        if also and len(self._order) > number:
            here = [self._books[name] for name in also if name in self._books]
            books += [book for book in here if book not in books]
        return books

    def _sort(self) -> None:
        order, places, turns = self._order, self._places, self._turns
        for book in self._changed:
            before, turn = places.pop(book, None), turns.get(book)
            place = (*self._key(book), turn, book) if turn is not None else None
            if place != before or place is None:
                if before is not None:
                    del order[bisect_left(order, before)]
                if place is not None:
                    insort(order, place)
            if place is not None:
                places[book] = place
        self._changed.clear()
        self._alone = len(order) == 1
