"""Receivers connected to before the first transfer."""

import msgspec
import pytest

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.errors import ChannelError
from kvbelt.transfer import peers
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from tests.http.support import free_port
from tests.security.support import belts, deployment
from tests.transfer.belts import LAYOUT, Side, Told, begin, eventually, hand_over, patient

QUICK = BeltSettings(lease_seconds=0.4, heartbeat_seconds=0.05, handshake_seconds=0.6)


@pytest.fixture
def memory():
    """Makes memory channels of one network."""
    network = MemoryNetwork()
    return lambda name: MemoryChannel(name, network)


class Warmed(Told):
    """What was told of one receiver."""

    def __init__(self, side, address):
        super().__init__(lambda on_end: side.belt.warm(address, on_end))


def test_a_warm_receiver_needs_no_handshake(memory):
    """The first transfer finds the connection made, and the same one is used."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = d.belt.receiver_address()
        assert Warmed(p, address).answer().ok
        assert p.belt.snapshot().peers == 1
        hellos = []
        there = p.belt._driver.dispatch.peers
        before, there._hello = there._hello, lambda engine: hellos.append(engine) or before(engine)
        sending, sent = begin(p, address, "a", 100)
        hand_over(sending, LAYOUT, list(range(7)))
        assert sent.outcome().ok
        assert not hellos


def test_warming_twice_is_told_at_once_and_counts_as_use(memory):
    """Whoever is connected stays so."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = d.belt.receiver_address()
        assert Warmed(p, address).answer().ok
        (peer,) = p.belt._driver.dispatch.peers._peers.values()
        used_at = peer.used_at
        assert Warmed(p, address).answer().ok
        assert peer.used_at > used_at
        assert p.belt.snapshot().peers == 1


def test_a_refusal_has_both_values(memory):
    """As a transfer's has."""
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d"), layout=other) as d:
        outcome = Warmed(p, d.belt.receiver_address()).answer()
        assert (outcome.ok, outcome.reason) == (False, "refused_dtype")
        assert "float32 here" in outcome.detail
        assert "bfloat16 there" in outcome.detail


def test_an_untrusted_key_is_an_outcome(memory):
    """Nothing is said to whoever holds it."""
    ours, theirs = deployment("p"), deployment("d")
    with (
        Side("p", "prefill", memory("p"), settings=belts(ours["p"])) as p,
        Side("d", "decode", memory("d"), settings=belts(theirs["d"])) as d,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().reason == "untrusted_key"


def test_nobody_there_is_an_outcome(memory):
    """After the handshake's own time."""
    with Side("p", "prefill", memory("p"), settings=QUICK) as p:
        assert Warmed(p, ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1)).answer().reason == "peer_unreachable"


def test_who_only_receives_connects_to_nobody(memory):
    """A decode worker that is told of another one."""
    with Side("d", "decode", memory("d")) as d:
        assert Warmed(d, d.belt.receiver_address()).answer().reason == "sends_nothing"


def test_closing_tells_whoever_waits(memory):
    """Once, and so it does afterwards."""
    p = Side("p", "prefill", memory("p"))
    address = ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1)
    waiting = Warmed(p, address)
    p.belt.close()
    assert waiting.answer().reason == "closed"
    assert len(waiting.answers) == 1
    assert Warmed(p, address).answer().reason == "closed"


def test_a_receiver_that_restarted_ends_what_was_under_way_to_its_earlier_life(memory):
    """Told of the new one, the prefill worker need not find out by silence."""
    with Side("p", "prefill", memory("p"), settings=patient()) as p:
        settings = patient(init_port=free_port(), alloc_port=free_port())
        with Side("d1", "decode", memory("d1"), settings=settings) as d:
            _, sent = begin(p, d.belt.receiver_address(), "a", 100)
            eventually(lambda: p.belt.snapshot().sends == {"writing": 1}, "it is under way")
            d.belt._driver.reception.close = lambda _: None  # killed: it says no farewell
            d.belt._driver.reception.desk.suspects = set
        with Side("d2", "decode", memory("d2"), settings=settings) as d:
            assert Warmed(p, d.belt.receiver_address()).answer().ok
            assert sent.outcome().reason == "stale_engine"


def test_there_is_an_end_to_receivers(memory, monkeypatch):
    """Each takes sockets; whoever is told of too many refuses the rest, and goes on."""
    monkeypatch.setattr(peers, "MAX_PEERS", 2)
    with Side("p", "prefill", memory("p"), settings=QUICK) as p, Side("d", "decode", memory("d")) as d:
        known = d.belt.receiver_address()
        assert Warmed(p, known).answer().ok
        strangers = [ReceiverAddress(EngineId(f"x{port}"), "127.0.0.1", port, port) for port in (1, 2)]
        first, second = (Warmed(p, address) for address in strangers)
        assert second.answer().reason == "too_many_peers"
        assert first.answer().reason == "peer_unreachable"
        assert Warmed(p, known).answer().ok


class Counting(MemoryChannel):
    """Counts what the belt does with it."""

    def __init__(self, name, network):
        super().__init__(name, network)
        self.connected = []
        self.looks = 0

    def connect(self, agent):
        """Remember whom."""
        super().connect(agent)
        self.connected.append(agent)

    def progress(self):
        """Count."""
        self.looks += 1


def test_the_channels_connection_is_opened_with_the_handshake():
    """Both sides let the channel work for a while, with no transfer, and then no more."""
    network = MemoryNetwork()
    channels = Counting("p", network), Counting("d", network)
    settings = patient(opening_seconds=0.1)
    with (
        Side("p", "prefill", channels[0], settings=settings) as p,
        Side("d", "decode", channels[1], settings=settings) as d,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        assert channels[0].connected == ["d"]
        for channel, side in zip(channels, (p, d), strict=True):
            eventually(lambda channel=channel: channel.looks > 0, "the channel may work")
            driver = side.belt._driver
            eventually(lambda driver=driver: driver._progress_every == float("inf"), "that ends")


def test_a_channel_that_cannot_connect_is_a_lost_peer(memory):
    """As one that cannot learn it."""

    class Unreachable(MemoryChannel):
        def connect(self, agent):
            raise ChannelError(f"no way to {agent}")

    there = memory("d")
    with Side("p", "prefill", Unreachable("p", there._network)) as p, Side("d", "decode", there) as d:
        outcome = Warmed(p, d.belt.receiver_address()).answer()
        assert (outcome.ok, outcome.reason) == (False, "channel")
        assert "no way to d" in outcome.detail
