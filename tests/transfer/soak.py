"""A million random events in small hostile worlds, every invariant checked after each.

    python -m tests.transfer.soak --events 1000000 --seed 1

A world lives for some hundreds of events; then the network heals, everything must come to its end, and a prompt must
get from every prefill worker to every decode worker. Equal seeds are equal walks: ``--world`` walks one of them again.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.receive.states import RECEIVER_TABLE
from kvbelt.transfer.send.states import SENDER_TABLE
from tests.transfer.simulation.walk import CALM, ROUGH, STORM, Walk, random_sizes

#: Of one world, before it heals.
EVENTS = 400

Arrow = tuple[str, str, str, str]  #: side, state, event, state


def arrows() -> set[Arrow]:
    """All arrows of the tables that lead to a state."""
    return {
        (side, state, event.__name__, after)
        for side, table in (("sender", SENDER_TABLE), ("receiver", RECEIVER_TABLE))
        for state, events in table.items()
        for event, cell in events.items()
        for after in cell.to
        if after is not state
    }


@contextmanager
def counted() -> Iterator[Counter[Arrow]]:
    """The number of times that each arrow is taken."""
    taken: Counter[Arrow] = Counter()
    handle = Machine.handle

    def counting(self: Machine, event: object, now: float) -> list[object]:
        before = self.state
        commands = handle(self, event, now)
        if before is not self.state:
            side = "sender" if self.table is SENDER_TABLE else "receiver"
            taken[side, before, type(event).__name__, self.state] += 1
        return commands

    with mock.patch.object(Machine, "handle", counting):
        yield taken


def walk(seed: int, number: int, events: int) -> Walk:
    """One world from its beginning to its end.

    Raises:
        AssertionError: an invariant does not hold.
    """
    rng = random.Random(f"{seed}-{number}")
    weather = rng.choice([CALM, ROUGH, ROUGH, STORM])
    walk = Walk(rng, random_sizes(rng), weather, rng.choice([1, 2, 3]), rng.choice([1, 1, 2]))
    try:
        walk.go(events)
        walk.end()
    finally:
        walk.world.close()
    return walk


def soak(seed: int, events: int) -> tuple[Counter[str], Counter[str], Counter[Arrow], int]:
    """Worlds until there were so many events: events by kind, ends of transfers, arrows taken, worlds.

    Raises:
        AssertionError: an invariant does not hold; it says how to see it again.
    """
    happened: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    number = 0
    with counted() as taken:
        while happened.total() < events:
            try:
                world = walk(seed, number, EVENTS).world
            except Exception as error:
                again = f"python -m tests.transfer.soak --seed {seed} --world {number}"
                raise AssertionError(f"world {number} of seed {seed}: {error}; again: {again}") from error
            happened += world.events
            ended += world.ended
            number += 1
    return happened, ended, taken, number


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Random walks in small hostile worlds, every invariant checked.")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--world", type=int, default=None, help="walk only this one of them")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of strings is part of a walk.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606 -- ourselves
    if arguments.world is not None:
        walk(arguments.seed, arguments.world, EVENTS)
        return 0
    began = time.monotonic()
    happened, ended, taken, worlds = soak(arguments.seed, arguments.events)
    missed = sorted(arrows() - set(taken))
    lines = [
        f"seed {arguments.seed}: {happened.total()} events in {worlds} worlds, {time.monotonic() - began:.0f} s",
        "events: " + ", ".join(f"{count} {what}" for what, count in happened.most_common()),
        "ends: " + ", ".join(f"{count} {how}" for how, count in ended.most_common()),
        f"arrows of the tables taken: {len(arrows()) - len(missed)} of {len(arrows())}",
        *(f"  not taken: {side} {state} -{event}-> {after}" for side, state, event, after in missed),
        "violations of an invariant: 0",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
