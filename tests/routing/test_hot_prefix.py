"""Half of all traffic on one prefix, under a virtual clock: hits and load are weighed in the same tokens."""

import random
from collections import Counter
from heapq import heappop, heappush
from itertools import count

import pytest

from kvbelt.pacing.costs import DEFAULT_COSTS
from kvbelt.routing.booking import Demand, WorkerBook
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode, Placement
from kvbelt.routing.prefixes import Prefix, Prefixes
from kvbelt.wire.health import Role

HOT, OWN, OUTPUT = 24_000, 6_000, 100
TOKENS = (HOT + OWN) // 4


def seconds(tokens):
    """Of computing so many prompt tokens."""
    return DEFAULT_COSTS.prefill_seconds(tokens, 0, 8192, 0, 0)


class World:
    """Workers that compute one prompt after another, and hold every prompt that they have computed."""

    def __init__(self, mode, workers):
        self.placement, self.prefixes = Placement(mode), Prefixes()
        for number in range(workers):
            book = WorkerBook(f"w{number}", Role.PREFILL if 2 * number < workers else Role.DECODE)
            self.placement.join(book)
            self.prefixes.join(book.incarnation)
        self.events, self.turn = [], count()
        self.free_at, self.hot_at = Counter(), set()
        self.tokens, self.computed = Counter(), Counter()
        self.prefix_of = {}
        self.woken = None

    def at(self, when, what):
        heappush(self.events, (when, next(self.turn), what))

    def run(self):
        while self.events:
            now, _, what = heappop(self.events)
            if what is not None:
                what(now)
            for demand, booking in self.placement.dispatch(now):
                self.begin(demand, booking, now)
            wake = self.placement.wake_at
            if wake is not None and wake != self.woken:
                self.woken = wake
                self.at(max(wake, now + 1e-6), None)

    def arrive(self, prompt):
        def arrives(now):
            prefix = Prefix(prompt, TOKENS)
            demand = Demand(TOKENS, OUTPUT, now, ServiceLevels(), held=self.prefixes.held(prefix))
            self.prefix_of[demand] = prefix
            self.placement.submit(demand)

        return arrives

    def begin(self, demand, booking, now):
        name, prefix = booking.prefill.incarnation, self.prefix_of.pop(demand)
        hot = bytes(prefix.prompt[:4]) == b'"hot'
        computes = TOKENS - (HOT // 4 if hot and name in self.hot_at else 0)
        if hot:
            self.hot_at.add(name)
        believed = self.prefixes.sent(prefix, name)
        if booking.decode is not booking.prefill:
            self.prefixes.sent(prefix, booking.decode.incarnation)
        self.tokens[name] += TOKENS
        self.computed[name] += computes
        done = self.free_at[name] = max(now, self.free_at[name]) + seconds(computes)

        def first_token(then):
            self.prefixes.answered(prefix, name)
            self.prefixes.counted(prefix, name, believed, TOKENS - computes)
            self.placement.first_token(booking, then)
            self.at(then + OUTPUT * 0.008, lambda end: self.placement.end(booking, end))

        self.at(done, first_token)


@pytest.mark.parametrize("mode", [Mode.ELASTIC, Mode.WHOLE])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_hot_prefix_does_not_pile_up(mode, share):
    """Whether a worker's load is what it has to compute of its prompts, or under high load also their length.

    Under low load a worker that holds the prefix is free when the next such request comes, and gets it.
    With elastic placement prefill and decode workers have different work; then workers of one role are compared.
    """
    world = World(mode, workers=4)
    chance = random.Random(7)
    every = (seconds(TOKENS) + seconds(TOKENS - HOT // 4)) / 2 / 4 / share
    now = 0.0
    for number in range(160):
        shared = "hot " * (HOT // 4) if number % 2 else f"{number:06}" * (HOT // 6)
        now += chance.expovariate(1 / every)
        world.at(now, world.arrive(f'"{shared}{number:06}{"." * OWN}"'.encode()))
    world.run()
    for load in (world.tokens, world.computed) if share > 0.5 else (world.computed,):
        for group in (("w0", "w1"), ("w2", "w3")) if mode is Mode.ELASTIC else (("w0", "w1", "w2", "w3"),):
            assert max(load[name] for name in group) <= 1.5 * sum(load[name] for name in group) / len(group)


HOT_PROMPT = "hello " * HOT


def a_holder_at_work():
    """Two workers. One holds a prefix, and generates an answer to a prompt that begins with it."""
    placement = Placement()
    books = [WorkerBook(f"w{number}", Role.DECODE) for number in range(2)]
    for book in books:
        placement.join(book)
    first = asked(0.0, "first")
    placement.submit(first)
    ((_, booking),) = placement.dispatch(0.0)
    placement.first_token(booking, 0.2)
    holder, other = booking.prefill, next(book for book in books if book is not booking.prefill)
    return placement, booking, holder, other


def asked(now, own, begins=HOT_PROMPT, held=()):
    prompt = f'"{begins}{own * 100}"'.encode()
    return Demand(TOKENS, OUTPUT, now, ServiceLevels(), held=dict(held), prefix=Prefix(prompt, TOKENS))


def placed(placement, wanted, now):
    placement.submit(wanted)
    ((_, booking),) = placement.dispatch(now)
    return booking.prefill


def test_a_prefix_that_is_in_use_is_computed_once_more_by_an_idle_worker():
    placement, _, holder, other = a_holder_at_work()
    wanted = asked(0.5, "second", held={holder.incarnation: HOT // 4})
    assert placed(placement, wanted, 0.5) is other


def test_a_prefix_of_a_request_that_has_ended_is_not():
    """As the next turn of a conversation."""
    placement, booking, holder, _ = a_holder_at_work()
    placement.end(booking, 0.4)
    wanted = asked(0.5, "second", held={holder.incarnation: HOT // 4})
    assert placed(placement, wanted, 0.5) is holder


def test_another_prefix_on_a_busy_worker_is_not():
    placement, _, holder, _ = a_holder_at_work()
    wanted = asked(0.5, "second", "something else " * HOT, {holder.incarnation: HOT // 4})
    assert placed(placement, wanted, 0.5) is holder


def test_no_copy_is_made_that_would_be_late():
    placement, _, holder, _ = a_holder_at_work()
    wanted = asked(0.1, "second", held={holder.incarnation: HOT // 4})
    assert placed(placement, wanted, 0.5) is holder
