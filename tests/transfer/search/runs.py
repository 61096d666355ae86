"""Which searches there are: short ones for every test run, deep ones for ``python -m tests.transfer.search``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tests.transfer.search import staging
from tests.transfer.search.explore import Graph, explore
from tests.transfer.search.healing import heal
from tests.transfer.search.protocol import Belts
from tests.transfer.search.staging import Prompt, Staging
from tests.transfer.search.state import ALL_TIMERS, SOME_TIMERS, Bounds

#: Nothing bad happens.
WELL = Bounds(
    claimed=True, beats=False, timers=(), cancels=False, stops=False, kills=False, faults=False, forgets=False
)


def belts(bounds: Bounds, max_states: int = 1_000_000) -> Graph:
    """Every state holds the invariants; and from each, if all that is under way is lost, everything ends.

    Raises:
        Violation: it does not.
    """
    return explore(Belts(bounds), max_states=max_states, at_each=heal, class_of=Belts.without_network)


def delivered(bounds: Bounds, max_states: int = 1_000_000) -> Graph:
    """Every state holds the invariants; and from each it can still come to it that everything was read, without time.

    Raises:
        Violation: it does not.
        AssertionError: there is a state with no way out.
    """
    return _no_dead_ends(explore(Belts(bounds), max_states=max_states, is_goal=Belts.all_delivered))


def staged(bounds: staging.Bounds, max_states: int = 1_000_000) -> Graph:
    """Every state holds the invariants; and from each, a receiver that takes its parts can still get all of them.

    Raises:
        Violation: it does not.
        AssertionError: there is a state with no way out.
    """
    return _no_dead_ends(explore(Staging(bounds), max_states=max_states, is_goal=Staging.others_done))


def _no_dead_ends(graph: Graph) -> Graph:
    ends = graph.dead_ends() if graph.complete else []
    assert not ends, "no way out after\n" + "\n".join(" ".join(map(str, step)) for step in graph.path(ends[0]))
    return graph


ONE = replace(WELL, blocks=(1,), buffer=1)
PARTS = replace(WELL, blocks=(3,), buffer=2)
TWO = replace(WELL, blocks=(1, 1), buffer=1, troubled=1)

SHORT: dict[str, Callable[[], Graph]] = {
    "a writer that is silent, stopped and forgotten": partial(
        belts, replace(ONE, timers=SOME_TIMERS, stops=True, forgets=True)
    ),
    "clients that come late and go away": partial(belts, replace(ONE, timers=SOME_TIMERS, cancels=True, claimed=False)),
    "a writer that is killed": partial(belts, replace(ONE, timers=SOME_TIMERS, kills=True, cancels=True, beats=True)),
    "writes that fail or lie": partial(
        belts, replace(WELL, timers=SOME_TIMERS, faults=True, verify="always", stops=True)
    ),
    "a prompt in three parts": partial(belts, replace(PARTS, timers=SOME_TIMERS)),
    "two prompts, room for one": partial(belts, replace(TWO, timers=SOME_TIMERS)),
    "writes that only an abort ends": partial(belts, replace(ONE, timers=SOME_TIMERS, lands=False)),
    "a prompt in parts and a small one": partial(delivered, replace(WELL, blocks=(3, 1), once=True)),
    "two prompts in parts": partial(delivered, replace(WELL, blocks=(3, 3), once=True)),
    "a peer that takes nothing": partial(
        staged,
        staging.Bounds((Prompt("a", 2), Prompt("a", 2), Prompt("b", 3)), 2, silent=frozenset("b"), at_once=True),
    ),
    "gaps that a silent peer leaves": partial(
        staged,
        staging.Bounds(
            (Prompt("a", 1), Prompt("a", 2), Prompt("b", 1), Prompt("b", 1)),
            4,
            piece=2,
            silent=frozenset("b"),
            at_once=True,
        ),
    ),
    "staging for prompts in parts": partial(
        staged,
        staging.Bounds(
            (Prompt("a", 3, 1), Prompt("b", 3, 1), Prompt("c", 3, 1)), 2, silent=frozenset("c"), at_once=True
        ),
    ),
    "gathers that take time": partial(
        staged, staging.Bounds((Prompt("a", 3, 1), Prompt("b", 3)), 2, at_once=True, asynchronous=True, stops=True)
    ),
}

DEEP: dict[str, Callable[[], Graph]] = {
    **SHORT,
    "one prompt, all timers, stops, kills, cancels": partial(
        belts, replace(ONE, timers=ALL_TIMERS, stops=True, kills=True, cancels=True, claimed=False, beats=True)
    ),
    "one prompt, all timers, forgetting, cancels": partial(
        belts, replace(ONE, timers=ALL_TIMERS, forgets=True, cancels=True, claimed=False, beats=True)
    ),
    "a prompt in three parts, stops, kills, cancels": partial(
        belts, replace(PARTS, timers=SOME_TIMERS, stops=True, kills=True, cancels=True, claimed=False)
    ),
    "a prompt in three parts, writes that lie": partial(
        belts, replace(PARTS, timers=SOME_TIMERS, faults=True, verify="always")
    ),
    "two prompts, room for one, both in trouble": partial(belts, replace(TWO, timers=SOME_TIMERS, troubled=2)),
    "two prompts, room for one, a writer stopped": partial(belts, replace(TWO, timers=SOME_TIMERS, stops=True)),
    "two prompts in parts and a small one": partial(delivered, replace(WELL, blocks=(3, 3, 1), once=True)),
    "two large prompts in parts": partial(delivered, replace(WELL, blocks=(5, 5), buffer=4, once=True)),
    "gaps, blocks one by one": partial(
        staged,
        staging.Bounds(
            (Prompt("a", 2), Prompt("a", 2), Prompt("b", 2), Prompt("b", 1)), 4, piece=2, silent=frozenset("b")
        ),
    ),
}
