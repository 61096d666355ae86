"""Requests never wait in a circle: every state that small pools can reach is visited.

Requests come at any moment, share prefixes, load KV, carry KV away, are preempted, one of them is aborted; the rest of
the world ends loads (well or not) and releases holds in any order, or takes its time. Every way from every state must
lead to the end of all requests.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvbelt.engine.scheduler import Load, Scheduler, StepPlan
from kvbelt.engine.sequence import Sequence
from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from tests.engine.simulation import Arrived, Simulation

#: More than any of these scenarios has; a mutant's may be endless.
MOST_STATES = 30_000

PROMPT = (0, 0, 1, 1, 0)
OTHER = (0, 0, 2, 2, 0)
BLOCK = 2


class World(Simulation):
    """A simulation with requests that are still to come.

    Requests by letters: **p**lain, **o**utgoing, **i**ncoming, **b**oth, **c**hoices of the same incoming KV; capitals
    have another prompt.
    """

    def __init__(
        self, num_blocks: int, requests: str, *, aborts: int = 1, scheduler: type[Scheduler] = Scheduler
    ) -> None:
        super().__init__(num_blocks, max_batch_tokens=4, max_running=3, block=BLOCK, scheduler=scheduler)
        self.to_come = list(requests)
        self.aborts = aborts
        self.shared = Arrived(len(PROMPT))

    def arrive(self) -> None:
        """The next request comes."""
        letter = self.to_come.pop(0)
        kind = letter.lower()
        incoming = self.shared if kind == "c" else Arrived(len(PROMPT)) if kind in "ib" else None
        # The answer grows out of the prompt's blocks.
        self.add(PROMPT if kind == letter else OTHER, 3, outgoing=kind in "ob", incoming=incoming, caches=True)

    def abort(self, number: int) -> None:
        """One request ends."""
        self.aborts -= 1
        self.end(self.alive[number])


def key(simulation: World) -> tuple[object, ...]:
    """Everything that the future depends on. Of the cache's ticks only their order matters."""
    sequences = tuple(
        (s.arrival, s.state.name, tuple(s.block_ids), s.computed, s.published, len(s.token_ids), s.incoming is None)
        for s in sorted(simulation.alive, key=lambda s: s.arrival)
    )
    cache = simulation.allocator.cache
    ticks = tuple(np.unique(cache.used_at, return_inverse=True)[1])
    index = tuple(sorted(cache._block_of.items()))
    claims = tuple(np.unique(simulation.allocator._claim, return_inverse=True)[1])
    loads = tuple(sorted((load.sequence.arrival, load.block_ids) for load in simulation.loads))
    others = len(simulation.to_come), simulation.aborts, tuple(map(tuple, simulation.holds))
    return sequences, ticks, index, claims, loads, others


def ways_on(simulation: World) -> Iterator[Callable[[World], object]]:
    """The events that may come next."""
    yield lambda s: s.step()
    if simulation.to_come:
        yield lambda s: s.arrive()
    for i in range(len(simulation.alive) if simulation.aborts else 0):
        yield lambda s, i=i: s.abort(i)
    for i in range(len(simulation.loads)):
        yield lambda s, i=i: s.end_load(s.loads[i])
        yield lambda s, i=i: s.end_load(s.loads[i], lost=True)
    for i in range(len(simulation.holds)):
        yield lambda s, i=i: s.release(s.holds[i])


def after(world: World, go: Callable[[World], object]) -> World:
    """The world after one more event; the world before is unchanged."""
    lock = world.allocator.cache._lock  # there is one thread, so it need not be copied
    copied = copy.deepcopy(world, {id(lock): lock})
    go(copied)
    return copied


def explore(start: World) -> int:
    """Visit every state that can be reached; returns how many there are.

    Raises:
        AssertionError: a state without a way on in which a request is not served, or a circle.
    """
    seen: dict[tuple[object, ...], bool] = {}  # False: on the way that is being followed
    #: States from the start to where we are, each with its successors that were not visited yet.
    way: list[tuple[tuple[object, ...], list[tuple[World, tuple[object, ...]]]]] = []

    def enter(world: World, name: tuple[object, ...]) -> None:
        assert len(seen) < MOST_STATES, "it does not end"
        seen[name] = False
        successors = [(successor, key(successor)) for successor in (after(world, go) for go in ways_on(world))]
        successors = [(successor, its_name) for successor, its_name in successors if its_name != name]
        # An idle step is no progress, and an abort must not be necessary.
        onward = [successor for successor, _ in successors if successor.aborts == world.aborts]
        assert onward or not world.alive, "no request makes progress, and no other event helps"
        way.append((name, successors))

    enter(start, key(start))
    while way:
        name, successors = way[-1]
        if not successors:
            seen[name] = True
            way.pop()
            continue
        successor, its_name = successors.pop()
        assert seen.get(its_name) is not False, "they go round in a circle"
        if its_name not in seen:
            enter(successor, its_name)
    return len(seen)


@pytest.mark.parametrize(
    ("num_blocks", "requests"),
    [(6, "oipi"), (6, "bipo"), (6, "icIp"), (6, "PpIi"), (8, "iipp"), (8, "ccic"), (8, "iiii"), (9, "PpIi")],
)
def test_from_every_state_all_requests_are_served(num_blocks: int, requests: str) -> None:
    """If every load and hold ends at some time, every path ends with all requests served."""
    assert explore(World(num_blocks, requests)) > 300


class AsksForMore(Scheduler):
    """A mutant: a request with KV to load is admitted without its last block, and waits for it after the load."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.short: list[tuple[Load, str | None]] = []

    def _can_admit(self, sequence: Sequence) -> bool:
        return self._allocator.num_free >= self._needs(sequence) - 1

    def _admit(self, sequence: Sequence) -> Load | None:
        self._needs = lambda sequence: Scheduler._needs(self, sequence) - 1  # type: ignore[method-assign]
        try:
            return super()._admit(sequence)
        finally:
            del self._needs

    def loaded(self, load: Load, lost: str | None) -> None:
        """Not yet."""
        self.short.append((load, lost))

    def schedule(self, costs: StepCosts = DEFAULT_COSTS) -> StepPlan:
        """Admit requests that lack a block first."""
        while self.short and self._allocator.num_free > 0:
            load, lost = self.short.pop(0)
            self._allocator.grow(load.sequence.block_ids, 1)
            super().loaded(load, lost)
        return super().schedule(costs)


def test_a_circle_would_be_found() -> None:
    """The search finds requests that have blocks and wait for more."""
    with pytest.raises(AssertionError, match="no request makes progress"):
        explore(World(4, "ii", aborts=0, scheduler=AsksForMore))
