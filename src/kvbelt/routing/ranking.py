"""Sorted workers. A change of one worker moves only that one."""

from bisect import bisect_left
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
        self._order: list[tuple[float, int, int]] = []
        self._sorted: list[WorkerBook] = []  # in that order
        self._places: dict[WorkerBook, tuple[float, int, int]] = {}  # as in the order
        self._books: dict[str, WorkerBook] = {}
        self._turns: dict[WorkerBook, int] = {}  # unique
        #: Workers whose key may be another one now; those that are not here count for nothing.
        self.changed: set[WorkerBook] = set()
        self._alone = False  # the order has one worker, and no other one has joined
        self._turn = count()

    def put(self, book: WorkerBook) -> None:
        """Add the worker, or mark it as changed."""
        if self._books.get(book.incarnation) is not book:
            self.drop(book)
            self._books[book.incarnation], self._turns[book] = book, next(self._turn)
            self._alone = False
        self.changed.add(book)

    def used(self, book: WorkerBook) -> None:
        """Move the worker behind those with an equal key, if it is here."""
        if book in self._turns:
            self._turns[book] = next(self._turn)
            self.changed.add(book)

    def drop(self, book: WorkerBook) -> None:
        """Remove the worker of that incarnation."""
        before = self._books.pop(book.incarnation, None)
        if before is not None:
            del self._turns[before]
            self.changed.add(before)
            self._alone = False

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def head(self) -> WorkerBook | None:
        """The first one."""
        if self.changed and not self._alone:
            self._sort()
        return self._sorted[0] if self._sorted else None

    def first(self, number: int, also: Iterable[str] = ()) -> list[WorkerBook]:
        """The first workers, then those of ``also`` that are here."""
        if self.changed and not self._alone:
            self._sort()
        books = self._sorted[:number]
        if also and len(self._sorted) > number:
            here = [self._books[name] for name in also if name in self._books]
            books += [book for book in here if book not in books]
        return books

    def _sort(self) -> None:
        order, books, places, turns = self._order, self._sorted, self._places, self._turns
        for book in self.changed:
            before, turn = places.pop(book, None), turns.get(book)
            place = (*self._key(book), turn) if turn is not None else None
            if place != before:
                if before is not None:
                    at = bisect_left(order, before)
                    del order[at], books[at]
                if place is not None:
                    at = bisect_left(order, place)
                    order.insert(at, place)
                    books.insert(at, book)
            if place is not None:
                places[book] = place
        self.changed.clear()
        self._alone = len(order) == 1
