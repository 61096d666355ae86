"""A random walk: what happens next, by weight. Seeded, so every walk can be walked again."""

import random
from dataclasses import dataclass

from tests.transfer.simulation.lives import Sizes
from tests.transfer.simulation.world import Fate, Route, World


@dataclass(frozen=True)
class Weather:
    """The relative weights of events in a hostile world."""

    lose: float = 1.0
    repeat: float = 1.0
    processes: float = 0.5
    faults: float = 0.5
    clients: float = 1.0  #: requests that go away
    patience: float = 1.0  #: time that passes


CALM = Weather(0.1, 0.1, 0.02, 0.02, 0.1, 0.5)
ROUGH = Weather()
STORM = Weather(4.0, 3.0, 2.0, 2.0, 2.0, 2.0)


def random_sizes(rng: random.Random) -> Sizes:
    """A small world of some shape."""
    return Sizes(
        layers=rng.choice([1, 1, 2]),
        buffer=rng.choice([2, 4, 6, 8]),
        overflow=rng.choice([0, 0, 4]),
        staging=rng.choice([1, 2, 4, 8]),
        piece=rng.choice([1, 2]),
        verify=rng.choice(["off", "sample", "always"]),
        asynchronous=rng.random() < 0.5,
        reachable=rng.random() < 0.85,
    )


class Walk:
    """One world and one source of random numbers."""

    def __init__(self, rng: random.Random, sizes: Sizes, weather: Weather, num_prefill: int, num_decode: int) -> None:
        self.rng = rng
        self.world = World(sizes, num_prefill, num_decode)
        largest = max(sizes.buffer // sizes.layers, 1)
        self.blocks = [1, 1, max(largest // 2, 1), largest, largest + 1, largest * 2]
        weights = {
            self.send: 4.0,
            self.warm: 0.5,
            self.probe: 1.0,
            self.blocks_come: 8.0,
            self.claim: 6.0,
            self.deliver: 30.0,
            self.land: 14.0,
            self.copy: 10.0 if sizes.asynchronous else 0.0,
            self.read: 12.0,
            self.wait: 4.0 * weather.patience,
            self.lose: 2.0 * weather.lose,
            self.repeat: 2.0 * weather.repeat,
            self.stop_or_wake: 3.0 * weather.processes,
            self.kill: 0.5 * weather.processes,
            self.cut: 0.3 * weather.processes,
            self.mend: 1.0 * weather.processes,
            self.fault: (4.0 if sizes.verify == "always" else 1.0) * weather.faults,  # some are found by digests only
            self.incomplete: 0.2 * weather.faults,
            self.cancel: 1.0 * weather.clients,
            self.cancel_read: 1.0 * weather.clients,
            self.let_go: 0.7 * weather.clients,
        }
        weights[self.flow] = 2.0
        self._events = list(weights)
        self._weights = list(weights.values())
        self._max_sends = 12

    def go(self, events: int) -> None:
        """Make about this many events."""
        while self.world.events.total() < events:
            (event,) = self.rng.choices(self._events, self._weights)
            event()

    def flow(self) -> None:
        """For a few events nothing bad happens, so that a walk reaches the states that matter."""
        for _ in range(6):
            self.world.write_blocks(self._any(), 4)
            for _ in range(4):
                self.world.route(0, Route.DELIVER)
            for _ in range(3):
                self.land()
                self.copy()
                self.read()

    def end(self) -> None:
        """Let everything end: first without the stopped workers, then with them."""
        stopped = [life for life in self.world.lives() if not life.running]
        if stopped and self.rng.random() < 0.5:
            self.world.heal(stopped)
        self.world.heal()
        self.world.works()

    def _any(self) -> int:
        return self.rng.randrange(1 << 16)

    def send(self) -> None:
        if len(self.world.sends) < self._max_sends:
            reused = self.rng.choice([0, 0, 1, 2])
            seconds = self.rng.choice([0.6, 3.0, 15.0])
            self.world.send(self._any(), self._any(), self.rng.choice(self.blocks), seconds, reused)

    def warm(self) -> None:
        self.world.warm(self._any(), self._any())

    def probe(self) -> None:
        self.world.probe(self._any(), self._any())

    def blocks_come(self) -> None:
        self.world.write_blocks(self._any(), self.rng.randint(1, 4))

    def incomplete(self) -> None:
        """A prompt that is never computed completely."""
        self.world.forget_blocks(self._any())

    def claim(self) -> None:
        """Let a reader claim a transfer, sometimes a second one."""
        self.world.claim(self._any(), self.rng.choice([0.5, 5.0, 15.0]), again=self.rng.random() < 0.1)

    def deliver(self) -> None:
        """Deliver the oldest packet, sometimes any other."""
        self.world.route(0 if self.rng.random() < 0.8 else self._any(), Route.DELIVER)

    def lose(self) -> None:
        self.world.route(self._any(), Route.LOSE)

    def repeat(self) -> None:
        self.world.route(self._any(), Route.REPEAT)

    def land(self) -> None:
        self.world.land(self._any(), Fate.LAND, stuck=self.rng.random() < 0.05)

    def fault(self) -> None:
        """Fail a write. A write lies only where digests can find it."""
        lies = [Fate.DROP, Fate.TEAR] if self.world.sizes.verify == "always" else []
        self.world.land(self._any(), self.rng.choice([Fate.FAIL, *lies]))

    def copy(self) -> None:
        self.world.finish_copy(self._any())

    def read(self) -> None:
        self.world.read(self._any())

    def let_go(self) -> None:
        self.world.let_go(self._any())

    def cancel(self) -> None:
        """Cancel a request on a prefill worker."""
        self.world.cancel(self._any())

    def cancel_read(self) -> None:
        """Cancel a request on a decode worker."""
        self.world.cancel_read(self._any())

    def stop_or_wake(self) -> None:
        """Stop or wake a worker. More of them wake."""
        self.world.process(self._any(), self.rng.choice(["stop", "wake", "wake"]))

    def kill(self) -> None:
        self.world.process(self._any(), "kill")

    def cut(self) -> None:
        """Cut off a prefill worker's host."""
        self.world.cut(self._any(), mend=False)

    def mend(self) -> None:
        """Reconnect a host, which may be connected."""
        self.world.cut(self._any(), mend=True)

    def wait(self) -> None:
        """Let some time pass, mostly a moment."""
        self.world.wait(self.rng.choice([0.01, 0.05, 0.25, 0.25, 1.0, 2.5]))
