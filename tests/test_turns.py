"""Work in pieces on an event loop that others need."""

import asyncio

import pytest

from kvbelt.turns import REST, Turns, at_once


class Thread:
    """Its time passes with pieces of work, and not while it rests."""

    def __init__(self):
        self.worked = 0.0
        self.done = []

    async def sleep(self, seconds):
        self.done.append(("rest", seconds))
        await asyncio.sleep(0)

    def work(self, name, *pieces):
        for number, seconds in enumerate(pieces):
            if number:
                yield
            self.worked += seconds
            self.done.append((name, seconds))
        return name


def test_after_each_piece_others_have_the_thread_for_longer():
    """Before the next piece, whose ever it is; large work is done one after another."""
    thread = Thread()

    async def both():
        turns = Turns(lambda: thread.worked, thread.sleep)
        return await asyncio.gather(turns.take(thread.work("a", 2.0, 1.0)), turns.take(thread.work("b", 4.0)))

    assert asyncio.run(both()) == ["a", "b"]
    assert thread.done == [
        ("rest", 0.0), ("a", 2.0), ("rest", 2.0 * REST), ("a", 1.0), ("rest", 1.0 * REST), ("b", 4.0),
    ]  # fmt: skip


def test_work_that_fails_ends_and_others_go_on():
    thread = Thread()

    def failing():
        yield
        raise ValueError("a piece")

    async def both():
        turns = Turns(lambda: thread.worked, thread.sleep)
        with pytest.raises(ValueError, match="a piece"):
            await turns.take(failing())
        return await turns.take(thread.work("b", 1.0))

    assert asyncio.run(both()) == "b"


def test_all_pieces_at_once():
    assert at_once(Thread().work("a", 1.0, 1.0, 1.0)) == "a"
