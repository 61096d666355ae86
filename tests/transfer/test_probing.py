"""Measuring a link: what is moved, what it disturbs, and how it ends."""

import msgspec
import pytest
import torch

from kvbelt.transfer import link_probe as probing
from kvbelt.transfer.link_probe import (
    LARGE_BYTES,
    LARGE_ROUNDS,
    PROBE_SECONDS,
    SMALL_BYTES,
    SMALL_ROUNDS,
    Operation,
    Probing,
)
from kvbelt.transfer.send.driver import STEP_SECONDS
from kvbelt.wire.probe import ENOUGH_OPERATIONS
from tests.channels.memory import Fault, MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Asked, Side, Warmed, begin, eventually, hand_over


class Link:
    """A clock that advances as operations over a link of this rate would take. One of them may stall."""

    def __init__(self, rate, latency=0.0, stalled=None):
        self.now = 0.0
        self.rate, self.latency, self.stalled = rate, latency, stalled
        self.moved = []

    def __call__(self):
        return self.now

    def run(self, measuring, room=LARGE_BYTES):
        """Run a measurement to its end."""
        measuring.begin(room)
        while measuring.next is not None:
            measuring.posting()
            if self.stalled == len(self.moved):
                self.now += 0.5
            self.moved.append(measuring.next)
            self.now += self.latency + measuring.next.num_bytes / self.rate
            measuring.ended()


@pytest.fixture
def network(monkeypatch):
    """The network on which the channels of a test meet. No pause of this machine ends a measurement."""
    monkeypatch.setattr(probing, "PROBE_SECONDS", 1000.0)
    return MemoryNetwork()


@pytest.fixture
def pair(network):
    """A prefill and a decode worker, connected."""
    p, d = MemoryChannel("p", network), MemoryChannel("d", network)
    with Side("p", "prefill", p) as p, Side("d", "decode", d) as d:
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        yield p, d


def at_rest(p, d):
    """Nothing is held on either side."""
    here, there = p.belt.snapshot(), d.belt.snapshot()
    held = there.bytes_reserved + there.bytes_committed + there.bytes_quarantined
    return not (here.sends or here.staging_bytes_used or held or there.arrivals)


# What is moved.


def test_a_quick_link_is_measured_with_large_operations():
    """Both directions are measured, and the figures are those of the link."""
    link = Link(1e9, 10e-6)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring)
    for figures in (measuring.figures["write"], measuring.figures["read"]):
        assert figures.num_bytes == LARGE_BYTES
        assert figures.gb_per_second == pytest.approx(1.0, rel=0.01)
        assert figures.small_seconds == pytest.approx(10e-6 + SMALL_BYTES / 1e9)
    assert measuring.num_bytes == sum(operation.num_bytes for operation in link.moved)


def test_a_slow_link_carries_little():
    """A link of 2 Mbit/s is measured with some hundred KB, well before the deadline."""
    link = Link(250e3)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring)
    assert measuring.figures["write"].gb_per_second == pytest.approx(250e3 / 1e9)
    assert measuring.num_bytes < 700e3
    assert link.now < PROBE_SECONDS * 3 / 4


def test_a_process_that_does_not_run_for_a_moment_makes_no_link_slow():
    """A stall in any one operation leaves the figures of a fast link."""
    undisturbed = Link(1e9)
    undisturbed.run(Probing(reads=False, clock=undisturbed))
    for stalled in range(len(undisturbed.moved)):
        link = Link(1e9, stalled=stalled)
        measuring = Probing(reads=False, clock=link)
        link.run(measuring)
        write = measuring.figures["write"]
        assert write.gb_per_second == pytest.approx(1.0), stalled
        assert write.small_seconds == pytest.approx(SMALL_BYTES / 1e9), stalled
        assert write.operations >= ENOUGH_OPERATIONS, stalled


def test_nothing_is_larger_than_the_room():
    """No operation is larger than the granted slot."""
    link = Link(1e9)
    measuring = Probing(reads=True, clock=link)
    link.run(measuring, room=1000)
    assert {operation.num_bytes for operation in link.moved} == {1000}
    assert len(link.moved) == 2 * (1 + SMALL_ROUNDS + LARGE_ROUNDS)


def test_a_channel_that_cannot_read_is_measured_one_way():
    """A channel without reads yields figures for writes only."""
    link = Link(1e9)
    measuring = Probing(reads=False, clock=link)
    link.run(measuring)
    assert set(measuring.figures) == {"write"}
    assert {operation.kind for operation in link.moved} == {"write"}


def test_what_is_stopped_keeps_what_it_has():
    """A stopped measurement keeps its complete direction and ignores the operation in flight."""
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
    """A measurement reserves a slot, uses it and gives it up; both sides count it as ``probed``, not as a failure."""
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
    """A committed slot keeps every byte while the link is measured."""
    p, d = pair
    p.fill(1)
    sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
    hand_over(sending, LAYOUT, list(range(7)))
    assert sent.outcome().ok
    before = d.staging.clone()
    (slot,) = [record.slot for record in d.belt._driver.receiver.incoming._live.values()]
    assert Asked(p).answer().reason == ""
    there = slice(slot.offset, slot.offset + LAYOUT.slot_bytes(7))
    assert torch.equal(d.staging[there], before[there])


def test_groups_of_layers_take_no_more_room(network):
    """A measurement's share of the buffer is the same where a prompt has blocks of several groups."""
    several = msgspec.structs.replace(LAYOUT, windows=(0, 20))
    p, d = MemoryChannel("p", network), MemoryChannel("d", network)
    size = {"layout": several, "staging_blocks": 256}
    with Side("p", "prefill", p, **size) as p, Side("d", "decode", d, **size) as d:
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        network.faults["d"] = Fault.STALL
        asked = Asked(p)
        eventually(lambda: d.belt.snapshot().bytes_reserved > 0, "it is granted")
        assert d.belt.snapshot().bytes_reserved <= d.staging.numel() // probing.BUFFER_SHARE
        del network.faults["d"]
        assert asked.answer().reason == ""


def test_an_open_transfer_is_not_disturbed(pair):
    """A measurement is refused while a transfer is open."""
    p, d = pair
    sending, sent = begin(p, d.belt.receiver_address(), "a", 100)
    assert Asked(p).answer().reason == "busy"
    hand_over(sending, LAYOUT, list(range(7)))
    assert sent.outcome().ok
    assert Asked(p).answer().reason == ""


def test_a_transfer_ends_a_measurement(pair, network):
    """A transfer ends a measurement at once, even with a write in flight, and is done itself."""
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
    """A measurement that would have to wait for a slot leaves the queue."""
    with (
        Side("p", "prefill", MemoryChannel("p", network)) as p,
        Side("q", "prefill", MemoryChannel("q", network)) as q,
        Side("d", "decode", MemoryChannel("d", network), staging_blocks=LAYOUT.num_layers) as d,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        sending, sent = begin(q, d.belt.receiver_address(), "a", 16)
        eventually(lambda: q.belt.snapshot().sends == {"writing": 1}, "the buffer is full")
        assert Asked(p).answer().reason == "receiver_full"
        eventually(lambda: "queued" not in d.belt.snapshot().arrivals, "it waits no more")
        hand_over(sending, LAYOUT, [0])
        assert sent.outcome().ok


def test_only_connected_receivers_are_measured(network):
    """Asking for a measurement connects to no new receiver."""
    with Side("p", "prefill", MemoryChannel("p", network)) as p:
        assert Asked(p, "elsewhere").answer().reason == "not_connected"
        assert p.belt.snapshot().peers == 0


def test_one_link_is_measured_at_a_time(pair, network):
    """A second measurement is refused, and the first goes on."""
    p, _ = pair
    network.faults["d"] = Fault.STALL
    first = Asked(p)
    assert Asked(p).answer().reason == "busy"
    del network.faults["d"]
    assert first.answer().reason == ""


def test_a_link_that_carries_nothing_is_given_up(pair, network, monkeypatch):
    """A measurement that gets nowhere ends at its deadline."""
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.3)
    p, d = pair
    network.faults["d"] = Fault.STALL
    probed = Asked(p).answer()
    assert (probed.reason, probed.write, probed.read) == ("deadline", None, None)
    del network.faults["d"]
    eventually(lambda: at_rest(p, d), "everything is given up")


def test_a_write_that_fails_loses_the_peer_as_a_transfers_does(pair, network):
    """A failed write of a measurement loses the peer, and the reason is reported."""
    p, d = pair
    network.faults["d"] = Fault.FAIL
    assert Asked(p).answer().reason == "write_failed"
    assert p.belt.snapshot().peers == 0
    eventually(lambda: at_rest(p, d), "everything is given up")


def test_a_worker_that_only_receives_measures_nothing(pair):
    """A worker that only receives refuses to measure."""
    _, d = pair
    assert Asked(d, "p").answer().reason == "sends_nothing"


def test_closing_ends_a_measurement(network):
    """Closing ends a measurement once, and later requests are refused."""
    with Side("d", "decode", MemoryChannel("d", network)) as d:
        p = Side("p", "prefill", MemoryChannel("p", network))
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        network.faults["d"] = Fault.STALL
        asked = Asked(p)
        p.belt.close()
        assert asked.answer().reason == "closed"
        assert len(asked.answers) == 1
        assert Asked(p).answer().reason == "closed"


def test_an_operation_is_no_longer_than_a_step():
    """The belt's thread waits for one operation no longer than a step of moving bytes takes."""
    assert probing.SPIN_SECONDS <= STEP_SECONDS
