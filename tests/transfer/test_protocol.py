"""Real drivers in a hostile world: whatever happens, no wrong byte is ever read, and everything ends.

The world is ``tests/transfer/simulation``: its network loses, repeats, reorders and delays messages, its processes are
stopped, wake up late and are killed, its writes fail or lie, its clients come and go. After every event all invariants
are checked (``simulation/invariants.py``); in the end the network heals, and nothing may be left over. Here hypothesis
decides what happens, and finds a short story where something breaks; ``python -m tests.transfer.soak`` walks far.
"""

import logging

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.transfer.simulation.lives import Sizes
from tests.transfer.simulation.world import Fate, Route, World
from tests.transfer.soak import soak

numbers = st.integers(0, 7)


@pytest.fixture(autouse=True)
def quiet():
    """Drops the log of thousands of provoked failures."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Belts(RuleBasedStateMachine):
    """Two prefill workers and one or two decode workers, with one rule for each event."""

    world: World | None = None

    @initialize(
        sizes=st.builds(
            Sizes,
            layers=st.integers(1, 2),
            buffer=st.sampled_from([2, 4, 6]),
            overflow=st.sampled_from([0, 2]),
            staging=st.sampled_from([1, 2, 8]),
            piece=st.integers(1, 2),
            verify=st.sampled_from(["off", "sample", "always"]),
            asynchronous=st.booleans(),
            reachable=st.booleans(),
        ),
        num_decode=st.integers(1, 2),
    )
    def begin(self, sizes, num_decode):
        """A world of some shape."""
        self.world = World(sizes, 2, num_decode)

    @rule(number=numbers, to=numbers, blocks=st.integers(1, 8), seconds=st.sampled_from([1.0, 15.0]), reused=numbers)
    def send(self, number, to, blocks, seconds, reused):
        """A prompt begins."""
        self.world.send(number, to, blocks, seconds, reused)

    @rule(number=numbers, to=numbers)
    def warm(self, number, to):
        """Let a prefill worker connect."""
        self.world.warm(number, to)

    @rule(number=numbers, to=numbers)
    def probe(self, number, to):
        """A prefill worker measures a link."""
        self.world.probe(number, to)

    @rule(number=numbers, count=st.integers(1, 8))
    def write_blocks(self, number, count):
        """An engine has computed some of it."""
        self.world.write_blocks(number, count)

    @rule(number=numbers)
    def forget_blocks(self, number):
        """Let an engine leave out some blocks."""
        self.world.forget_blocks(number)

    @rule(number=numbers, seconds=st.sampled_from([1.0, 15.0]), again=st.booleans())
    def claim(self, number, seconds, again):
        """A decode worker's request asks for it."""
        self.world.claim(number, seconds, again=again)

    @rule(number=numbers, which=st.sampled_from(["cancel", "cancel_read", "let_go"]))
    def client_goes(self, number, which):
        """End a request that waits."""
        getattr(self.world, which)(number)

    @rule(number=numbers)
    def read(self, number):
        """Let a reader take a part."""
        self.world.read(number)

    @rule(number=numbers, how=st.sampled_from([Route.DELIVER, Route.DELIVER, Route.REPEAT, Route.LOSE]))
    def route(self, number, how):
        """Deliver a packet once, twice or never."""
        self.world.route(number, how)

    @rule(count=st.integers(1, 8))
    def well(self, count):
        """For some events nothing is lost or late."""
        for _ in range(count):
            self.world.write_blocks(0, 4)
            for _ in range(4):
                self.world.route(0, Route.DELIVER)
            self.world.finish_copy(0)
            self.world.land(0, Fate.LAND)
            self.world.read(0)

    @rule(number=numbers, fate=st.sampled_from(list(Fate)), stuck=st.booleans())
    def land(self, number, fate, stuck):
        """End a write well or badly. A write lies only where digests can find it."""
        if fate in (Fate.DROP, Fate.TEAR) and self.world.sizes.verify != "always":
            fate = Fate.FAIL
        self.world.land(number, fate, stuck=stuck)

    @rule(number=numbers)
    def finish_copy(self, number):
        """A copy ends."""
        self.world.finish_copy(number)

    @rule(number=numbers, mend=st.booleans())
    def cut(self, number, mend):
        """Cut off a host, or reconnect it."""
        self.world.cut(number, mend=mend)

    @rule(number=numbers, what=st.sampled_from(["stop", "wake", "wake", "kill"]))
    def process(self, number, what):
        """Stop, wake or kill a process."""
        self.world.process(number, what)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 2.5, 20.0]))
    def wait(self, seconds):
        """Time passes."""
        self.world.wait(seconds)

    def teardown(self):
        """Let everything end, then send another prompt."""
        if self.world is not None:
            try:
                self.world.heal()
                self.world.works()
            finally:
                self.world.close()


TestBelts = Belts.TestCase
TestBelts.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_short_walk():
    """The seed makes it the same every time; ``python -m tests.transfer.soak`` makes a million events."""
    happened, ended, taken, _ = soak(seed=20, events=20_000)
    assert happened.total() >= 20_000
    # It is a walk through what matters: prompts arrive, and most arrows of the tables are taken.
    assert ended["read"] > 100
    assert len(taken) > 50
