"""Measuring a link: what is moved, what it disturbs, and how it ends."""

import pytest
import torch

from kvbelt.channels.memory import Fault, MemoryChannel, MemoryNetwork
from kvbelt.transfer import probing
from kvbelt.transfer.dispatch import STEP_SECONDS
from kvbelt.transfer.probing import LARGE_BYTES, LARGE_ROUNDS, SMALL_BYTES, SMALL_ROUNDS, Operation, Probing
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.ids import EngineId
from tests.transfer.belts import LAYOUT, Side, Told, begin, eventually, hand_over
from tests.transfer.test_warm import Warmed

QUICK = BeltSettings(lease_seconds=0.4, heartbeat_seconds=0.05, handshake_seconds=0.6)


class Asked(Told):
    """One measurement of a belt's."""

    def __init__(self, side, engine="d"):
        super().__init__(lambda on_end: side.belt.probe(EngineId(engine), on_end))


class Link:
    """Time that passes as a link of so many bytes a second would have it."""

    def __init__(self, rate, latency=0.0):
        self.now = 0.0
        self.rate, self.latency = rate, latency
        self.moved = []

    def __call__(self):
        """Seconds."""
        return self.now

    def run(self, measuring, room=LARGE_BYTES):
        """Do whatever is asked for."""
        measuring.begin(room)
        while measuring.next is not None:
            self.moved.append(measuring.next)
            measuring.posting()
            self.now += self.latency + measuring.next.num_bytes / self.rate
            measuring.ended()


@pytest.fixture
def network():
    """Where the channels of a test meet."""
    return MemoryNetwork()


@pytest.fixture
def pair(network):
    """A prefill and a decode worker that are connected."""
    p, d = MemoryChannel("p", network), MemoryChannel("d", network)
    with Side("p", "prefill", p, settings=QUICK) as p, Side("d", "decode", d, settings=QUICK) as d:
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        yield p, d


def at_rest(p, d):
    """Nothing is held on either side."""
    here, there = p.belt.snapshot(), d.belt.snapshot()
    held = there.bytes_reserved + there.bytes_committed + there.bytes_quarantined
    return not (here.sends or here.staging_bytes_used or held or there.arrivals)


# What is moved.


def test_a_quick_link_is_measured_with_large_operations():
    """Both ways; the figures are those of the link."""
    link = Link(1e9, 10e-6)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring)
    for figures in (measuring.figures["write"], measuring.figures["read"]):
        assert figures.num_bytes == LARGE_BYTES
        assert figures.gb_per_second == pytest.approx(1.0, rel=0.01)
        assert figures.small_seconds == pytest.approx(10e-6 + SMALL_BYTES / 1e9)
    assert measuring.num_bytes == sum(operation.num_bytes for operation in link.moved)


def test_a_slow_link_carries_little():
    """2 Mbit/s: what is seen of it is enough, and takes less than two seconds."""
    link = Link(250e3)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring)
    assert measuring.figures["write"].gb_per_second == pytest.approx(250e3 / 1e9)
    assert measuring.num_bytes < 400e3
    assert link.now < 2.0


def test_nothing_is_larger_than_the_room():
    """Whatever that is."""
    link = Link(1e9)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring, room=1000)
    assert {operation.num_bytes for operation in link.moved} == {1000}
    assert len(link.moved) == 2 * (1 + SMALL_ROUNDS + LARGE_ROUNDS)


def test_a_channel_that_cannot_read_is_measured_one_way():
    """The other way is None."""
    link = Link(1e9)
    measuring = Probing(reads=False, clock=link)
    link.run(measuring)
    assert set(measuring.figures) == {"write"}
    assert {operation.kind for operation in link.moved} == {"write"}


def test_what_is_stopped_keeps_what_it_has():
    """The direction that was complete; what is in flight counts no more."""
    link = Link(1e9)
    measuring = Probing(reads=True, clock=link)
    measuring.begin(SMALL_BYTES)
    while measuring.next == Operation("write", SMALL_BYTES):
        measuring.posting()
        measuring.ended()
    moved = measuring.num_bytes
    measuring.posting()
    measuring.stop("busy", "a transfer began")
    measuring.ended()
    assert (measuring.next, measuring.num_bytes) == (None, moved)
    assert set(measuring.figures) == {"write"}
    assert measuring.stopped == ("busy", "a transfer began")


# Over a belt.


def test_a_link_is_measured_and_nothing_is_left_of_it(pair):
    """Room is asked for, used and given up; both sides count it as what it is, and nobody is told of a failure."""
    p, d = pair
    probed = Asked(p).answer()
    assert (probed.reason, probed.channel) == ("", "memory")
    assert probed.write.num_bytes == probed.read.num_bytes > 0
    eventually(lambda: at_rest(p, d), "everything is given up")
    assert p.belt.snapshot().sent_total == {"probed": 1}
    assert d.belt.snapshot().received_total == {"probed": 1}
    assert p.belt.snapshot().writes_total == 0
    assert not p.belt.links()


def test_what_others_have_in_the_buffer_is_not_touched(pair):
    """A committed slot that nobody has read yet: every byte of it is what was sent."""
    p, d = pair
    p.fill(1)
    sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
    hand_over(sending, LAYOUT, list(range(7)))
    assert sent.outcome().ok
    before = d.staging.clone()
    (slot,) = [record.slot for record in d.belt._driver.reception.desk._live.values()]
    assert Asked(p).answer().reason == ""
    there = slice(slot.offset, slot.offset + LAYOUT.slot_bytes(7))
    assert torch.equal(d.staging[there], before[there])


def test_who_sends_is_not_disturbed(pair):
    """As long as a transfer is open nothing is measured."""
    p, d = pair
    sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
    assert Asked(p).answer().reason == "busy"
    hand_over(sending, LAYOUT, list(range(7)))
    assert sent.outcome().ok
    assert Asked(p).answer().reason == ""


def test_a_transfer_ends_a_measurement(pair, network):
    """At once, though its write is in flight; the transfer is done, and the slot is free once that write has ended."""
    p, d = pair
    network.faults["d"] = Fault.STALL
    asked = Asked(p)
    eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
    sending, sent = begin(p, d.belt.receiver_address(), "a", 16)
    assert asked.answer().reason == "busy"
    del network.faults["d"]
    hand_over(sending, LAYOUT, [3])
    assert sent.outcome().ok
    eventually(lambda: p.belt.snapshot().sends == {}, "both are over")
    assert len(asked.answers) == 1


def test_a_full_buffer_is_not_waited_for(network):
    """The place in the queue is given up: it is for prompts."""
    with (
        Side("p", "prefill", MemoryChannel("p", network), settings=QUICK) as p,
        Side("q", "prefill", MemoryChannel("q", network), settings=QUICK) as q,
        Side("d", "decode", MemoryChannel("d", network), staging_blocks=LAYOUT.num_layers, settings=QUICK) as d,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        sending, sent = begin(q, d.belt.receiver_address(), "a", 16)
        eventually(lambda: q.belt.snapshot().sends == {"writing": 1}, "the buffer is full")
        assert Asked(p).answer().reason == "receiver_full"
        eventually(lambda: "queued" not in d.belt.snapshot().arrivals, "it waits no more")
        hand_over(sending, LAYOUT, [0])
        assert sent.outcome().ok


def test_only_who_is_connected_is_measured(network):
    """Nobody can have a worker connect somewhere by asking."""
    with Side("p", "prefill", MemoryChannel("p", network)) as p:
        assert Asked(p, "elsewhere").answer().reason == "not_connected"
        assert p.belt.snapshot().peers == 0


def test_one_link_is_measured_at_a_time(pair, network):
    """The second is refused, and the first goes on."""
    p, _ = pair
    network.faults["d"] = Fault.STALL
    first = Asked(p)
    assert Asked(p).answer().reason == "busy"
    del network.faults["d"]
    assert first.answer().reason == ""


def test_a_link_that_carries_nothing_is_given_up(pair, network, monkeypatch):
    """At the measurement's deadline, with what there is."""
    monkeypatch.setattr("kvbelt.transfer.dispatch.PROBE_SECONDS", 0.3)
    p, d = pair
    network.faults["d"] = Fault.STALL
    probed = Asked(p).answer()
    assert (probed.reason, probed.write, probed.read) == ("deadline", None, None)
    del network.faults["d"]
    eventually(lambda: at_rest(p, d), "everything is given up")


def test_a_write_that_fails_loses_the_peer_as_a_transfers_does(pair, network):
    """And is told."""
    p, d = pair
    network.faults["d"] = Fault.FAIL
    assert Asked(p).answer().reason == "write_failed"
    assert p.belt.snapshot().peers == 0
    eventually(lambda: at_rest(p, d), "everything is given up")


def test_who_only_receives_measures_nothing(pair):
    """A decode worker that is asked."""
    _, d = pair
    assert Asked(d, "p").answer().reason == "sends_nothing"


def test_closing_ends_a_measurement(network):
    """It is told once, and so is whoever asks afterwards."""
    with Side("d", "decode", MemoryChannel("d", network), settings=QUICK) as d:
        p = Side("p", "prefill", MemoryChannel("p", network), settings=QUICK)
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        network.faults["d"] = Fault.STALL
        asked = Asked(p)
        p.belt.close()
        assert asked.answer().reason == "closed"
        assert len(asked.answers) == 1
        assert Asked(p).answer().reason == "closed"


def test_an_operation_is_no_longer_than_a_step():
    """The belt's thread waits for one operation for no longer than it moves bytes."""
    assert probing.SPIN_SECONDS <= STEP_SECONDS
