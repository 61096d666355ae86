"""The scripts of the simulation, with real belts: real sockets and threads, a network that is ill, writes that fail.

The tests look from outside: every byte that was read is compared, every reader is notified once, counters agree, and
in the end nothing is held.
"""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvbelt.transfer.ports import Lost, SlotGoneError
from kvbelt.transfer.receive.session import ReceiverSession
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.ids import TransferId
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Arrival, Side, begin, eventually, hand_over
from tests.transfer.relay import CUT, ROUGH, WELL, Relay

QUICK = {"lease_seconds": 0.4, "heartbeat_seconds": 0.05, "handshake_seconds": 0.6, "claim_seconds": 1.0}
#: Room for six blocks of every layer; prompts have up to nine, and stream through it.
ROOM, LARGEST = 6, 9
#: How long anything may take before a test gives up.
PATIENCE = 60.0
#: Of every deadline.
SECONDS = 2.0
#: Blocks of an engine: more than all prompts of a script together.
POOL = 1024


class Prompt:
    """One transfer and its fate on both sides."""

    def __init__(self, world, number, rng):
        self.name = f"t{number}"
        self.blocks = rng.randint(1, LARGEST)
        # Its own blocks on both sides, in any order.
        self.here = rng.sample(range(number * LARGEST, (number + 1) * LARGEST), self.blocks)
        self.there = rng.sample(range(number * LARGEST, (number + 1) * LARGEST), self.blocks)
        content = torch.randint(0, 256, (LAYOUT.num_layers, self.blocks, LAYOUT.block_bytes), dtype=torch.uint8)
        self.content = content
        world.p.pool[:, self.here] = content
        self.sending, self.sent = begin(
            world.p, world.relay.address(world.address), self.name, self.blocks * 16, SECONDS
        )
        self.written = False
        self.arrival = None
        self.cancel_reading = None
        self.read = None

    def claim(self, world, *, lets_go):
        """Let a request wait for the KV on a thread of its own."""
        self.arrival = Arrival()
        self.cancel_reading = world.d.belt.receive(TransferId(self.name), SECONDS, self.arrival)
        self.read = world.readers.submit(self._read, world.d, lets_go)

    def _read(self, side, lets_go):
        kv = self.arrival.get()
        if isinstance(kv, Lost):
            return f"lost: {kv.reason}"
        try:
            if lets_go:
                return "let go"
            kv.scatter(self.there)
        except SlotGoneError:
            return "broken"
        else:
            return "right" if torch.equal(side.pool[:, self.there], self.content) else "WRONG"
        finally:
            kv.release()


class World:
    """One prefill worker, one decode worker, and the relay between them."""

    def __init__(self, seed, verify):
        self.rng = random.Random(seed)
        self.network = MemoryNetwork()
        self.verify = verify
        self.lives = 0
        self.p = self._prefill()
        self.d = self._decode()
        self.address = self.d.belt.receiver_address()
        self.relay = Relay(self.address, seed)
        self.readers = ThreadPoolExecutor(64)
        self.prompts = []
        self.over = 0  # prompts before these
        self.stopped = {}

    def _prefill(self):
        self.lives += 1
        channel = MemoryChannel(f"p{self.lives}", self.network)
        return Side(
            f"p{self.lives}", "prefill", channel, pool_blocks=POOL, settings=BeltSettings(**QUICK, batch_bytes=1)
        )

    def _decode(self, **ports):
        self.lives += 1
        settings = BeltSettings(**QUICK, verify=self.verify, **ports)
        channel = MemoryChannel(f"d{self.lives}", self.network)
        room = ROOM * LAYOUT.num_layers
        return Side(f"d{self.lives}", "decode", channel, staging_blocks=room, pool_blocks=POOL, settings=settings)

    # What may happen.

    def send(self):
        """Begin a prompt."""
        self.prompts.append(Prompt(self, self.over + len(self.prompts), self.rng))

    def write(self):
        """Write all of a prompt in chunks."""
        prompt = self._some(lambda prompt: not prompt.written)
        if prompt is not None:
            prompt.written = True
            hand_over(prompt.sending, LAYOUT, prompt.here, self.rng.randint(1, LARGEST))

    def claim(self):
        """Let a request wait for a prompt."""
        prompt = self._some(lambda prompt: prompt.arrival is None)
        if prompt is not None:
            prompt.claim(self, lets_go=self.rng.random() < 0.1)

    def cancel(self):
        """Cancel a prompt on one of the two sides."""
        prompt = self._some(lambda prompt: True)
        if prompt is not None:
            if prompt.cancel_reading is not None and self.rng.random() < 0.5:
                prompt.cancel_reading()
            else:
                prompt.sending.cancel("aborted")

    def _some(self, which):
        candidates = [prompt for prompt in self.prompts if which(prompt)]
        return self.rng.choice(candidates) if candidates else None

    def rain(self):
        """Disturb the network, or repair it."""
        self.relay.weather = self.rng.choice([WELL, ROUGH, ROUGH, CUT])

    def fault(self):
        """Let writes stall, fail, or lie where digests find it."""
        faults = [Fault.STALL, Fault.FAIL, None] + [Fault.DROP] * (self.verify == "always")
        fault = self.rng.choice(faults)
        agent = self.d.belt.identity.engine_id
        self.network.faults.pop(agent, None)
        if fault is not None:
            self.network.faults[agent] = fault

    def stop_or_wake(self):
        """Stop a belt's thread, or wake it."""
        side = self.rng.choice([self.p, self.d])
        if side in self.stopped:
            self.stopped.pop(side).set()
        else:
            gate = self.stopped[side] = threading.Event()
            side.belt._driver.ask(lambda: gate.wait(PATIENCE))

    def restart(self):
        """A decode worker ends, and another one takes its place and its ports."""
        if self.d in self.stopped:
            self.stopped.pop(self.d).set()
        self.d.belt.close()
        self.d = self._decode(init_port=self.address.init_port, alloc_port=self.address.alloc_port)
        self.address = self.d.belt.receiver_address()

    def wait(self):
        """Time passes."""
        threading.Event().wait(self.rng.choice([0.0, 0.01, 0.03, 0.1, 0.3]))

    def run(self, steps):
        """Run a random script."""
        weights = {
            self.send: 5, self.write: 5, self.claim: 5, self.wait: 6, self.rain: 2, self.cancel: 1, self.fault: 1,
            self.stop_or_wake: 1, self.restart: 0.3,
        }  # fmt: skip
        for step in self.rng.choices(list(weights), list(weights.values()), k=steps):
            step()

    # What must hold.

    def heal(self):
        """Repair everything and let it end."""
        self.relay.weather = WELL
        self.network.faults.clear()
        for gate in self.stopped.values():
            gate.set()
        self.stopped.clear()
        for prompt in self.prompts:
            if not prompt.written:
                hand_over(prompt.sending, LAYOUT, prompt.here)
        for prompt in self.prompts:
            prompt.sent.outcome()
            prompt.sent.freed()
        ends = Counter(prompt.read.result(PATIENCE) for prompt in self.prompts if prompt.read is not None)
        assert "WRONG" not in ends, ends
        eventually(lambda: self.p.belt.snapshot().sends == {}, "the prefill worker has said its goodbyes")
        eventually(lambda: self.d.belt.snapshot().arrivals == {}, "the decode worker holds nothing")
        sender, receiver = self.p.belt.snapshot(), self.d.belt.snapshot()
        assert sender.staging_bytes_used == 0
        held = (receiver.bytes_reserved, receiver.bytes_committed, receiver.bytes_quarantined)
        assert held == (0, 0, 0)
        for prompt in self.prompts:
            assert len(prompt.sent.outcomes) == prompt.sent.frees == 1
            assert prompt.arrival is None or len(prompt.arrival.arrivals) == 1
        self.over += len(self.prompts)
        self.prompts = []
        assert sum(sender.sent_total.values()) == self.over
        refused = {reason for counts in receiver.refused_total.values() for reason in counts}
        assert refused <= {"no_handshake", "stale_slot", "unknown_transfer", "ended", "stale_engine", "refused_engine_id", "digest", "already"}  # fmt: skip # noqa: E501
        return ends

    def close(self):
        """Close everything."""
        for gate in self.stopped.values():
            gate.set()
        self.p.belt.close()
        self.d.belt.close()
        self.relay.__exit__()
        self.readers.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def world(request):
    """Two belts and the relay between them."""
    seed, verify = request.param
    world = World(seed, verify)
    yield world
    world.close()


SCRIPTS = [(1, "off"), (2, "sample"), (3, "always")]


@pytest.mark.parametrize("world", SCRIPTS, indirect=True, ids=str)
def test_a_script_over_real_sockets(world):
    """No wrong byte was read, every transfer ended, and new prompts arrive."""
    for _ in range(2):
        world.relay.weather = CUT  # so that it does harm, however the threads run later
        harmed = world.relay.harmed
        world.send()
        eventually(lambda harmed=harmed: world.relay.harmed > harmed, "a frame is lost")
        world.run(30)
        world.heal()
    for _ in range(20):  # with such short leases one may be lost for nothing but a moment's pause
        world.send()
        (prompt,) = world.prompts
        prompt.claim(world, lets_go=False)
        if world.heal()["right"]:
            return
    raise AssertionError("no prompt arrives any more")


@pytest.mark.parametrize("world", [(5, "off")], indirect=True)
def test_a_cut_in_the_middle_of_a_prompt_leaves_nothing_behind(world):
    """Both sides give it up, and the end message is repeated until the network works."""
    world.send()
    (prompt,) = world.prompts
    prompt.claim(world, lets_go=False)
    eventually(lambda: world.d.belt.snapshot().bytes_reserved > 0, "it is granted")
    world.relay.weather = CUT
    assert prompt.sent.outcome().reason == "peer_lost"
    eventually(lambda: world.d.belt.snapshot().bytes_quarantined > 0, "its lease has lapsed")
    assert world.heal() == {"lost: lease": 1}


@pytest.mark.parametrize("world", [(6, "off")], indirect=True)
def test_bytes_that_are_read_too_early_are_seen(world, monkeypatch):
    """Without commit before visible, a reader gets bytes that were never written. So the scripts can fail."""
    take_slot = ReceiverSession.take_slot

    def delivers(self, event):
        return [*take_slot(self, event), *(self.deliver(event) if self.has_consumer else [])]

    monkeypatch.setattr(ReceiverSession, "take_slot", delivers)
    for _ in range(20):  # a reader that is slower than the reservation finds no fault
        world.send()
        prompt = world.prompts[-1]
        prompt.claim(world, lets_go=False)
        if prompt.read.result(PATIENCE) == "WRONG":
            return
    raise AssertionError("no reader has read too early")
