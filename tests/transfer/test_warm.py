"""Receivers connected to before the first transfer."""

import msgspec
import pytest

from kvbelt.errors import ChannelError
from kvbelt.transfer.send import peers
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.http.support import free_port
from tests.security.support import belts, deployment
from tests.transfer.belts import LAYOUT, Side, Warmed, begin, eventually, hand_over, pass_time, patient

QUICK = BeltSettings(lease_seconds=0.4, heartbeat_seconds=0.05, handshake_seconds=0.6)


@pytest.fixture
def memory():
    """Makes memory channels of one network."""
    network = MemoryNetwork()
    return lambda name: MemoryChannel(name, network)


def test_a_warm_receiver_needs_no_handshake(memory):
    """The first transfer uses the connection that was made before it."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = d.belt.receiver_address()
        assert Warmed(p, address).answer().ok
        assert p.belt.snapshot().peers == 1
        hellos = []
        there = p.belt._driver.sender.peers
        before, there._hello = there._hello, lambda engine: hellos.append(engine) or before(engine)
        sending, sent = begin(p, address, "a", 100)
        hand_over(sending, LAYOUT, list(range(7)))
        assert sent.outcome().ok
        assert not hellos


def test_warming_twice_is_answered_at_once_and_counts_as_use(memory):
    """A warmed connection that is warmed again is not idle."""
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        address = d.belt.receiver_address()
        assert Warmed(p, address).answer().ok
        (peer,) = p.belt._driver.sender.peers._peers.values()
        used_at = peer.used_at
        pass_time(p, 100.0)
        assert Warmed(p, address).answer().ok
        assert peer.used_at > used_at
        assert p.belt.snapshot().peers == 1


def test_a_refusal_has_both_values(memory):
    """A refused handshake names the field that differs."""
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d"), layout=other) as d:
        outcome = Warmed(p, d.belt.receiver_address()).answer()
        assert (outcome.ok, outcome.reason) == (False, "refused_dtype")
        assert "float32 here" in outcome.detail
        assert "bfloat16 there" in outcome.detail


def test_an_untrusted_key_is_an_outcome(memory):
    """A receiver with an untrusted key is not connected to."""
    ours, theirs = deployment("p"), deployment("d")
    with (
        Side("p", "prefill", memory("p"), settings=belts(ours["p"])) as p,
        Side("d", "decode", memory("d"), settings=belts(theirs["d"])) as d,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().reason == "untrusted_key"


def test_a_receiver_that_does_not_answer_is_an_outcome(memory):
    """A receiver that does not answer is given up after the handshake time."""
    with Side("p", "prefill", memory("p"), settings=QUICK) as p:
        assert Warmed(p, ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1)).answer().reason == "peer_unreachable"


def test_a_worker_that_only_receives_connects_to_no_receiver(memory):
    """A worker that only receives refuses to connect."""
    with Side("d", "decode", memory("d")) as d:
        assert Warmed(d, d.belt.receiver_address()).answer().reason == "sends_nothing"


def test_closing_ends_a_connection_attempt(memory):
    """It ends once, and later attempts are refused."""
    p = Side("p", "prefill", memory("p"))
    address = ReceiverAddress(EngineId("d"), "127.0.0.1", 1, 1)
    waiting = Warmed(p, address)
    p.belt.close()
    assert waiting.answer().reason == "closed"
    assert len(waiting.answers) == 1
    assert Warmed(p, address).answer().reason == "closed"


def test_a_receiver_that_restarted_ends_what_was_under_way_to_its_earlier_life(memory):
    """A new incarnation at the same address ends the transfers to the old one at once."""
    with Side("p", "prefill", memory("p"), settings=patient()) as p:
        settings = patient(init_port=free_port(), alloc_port=free_port())
        with Side("d1", "decode", memory("d1"), settings=settings) as d:
            _, sent = begin(p, d.belt.receiver_address(), "a", 100)
            eventually(lambda: p.belt.snapshot().sends == {"writing": 1}, "it is under way")
            d.belt._driver.receiver.close = lambda _: None  # killed: it sends no end message
            d.belt._driver.receiver.incoming.suspects = set
        with Side("d2", "decode", memory("d2"), settings=settings) as d:
            assert Warmed(p, d.belt.receiver_address()).answer().ok
            assert sent.outcome().reason == "stale_engine"


def test_the_number_of_receivers_is_limited(memory, monkeypatch):
    """Beyond MAX_PEERS receivers further ones are refused, and the known ones still work."""
    monkeypatch.setattr(peers, "MAX_PEERS", 2)
    with Side("p", "prefill", memory("p")) as p, Side("d", "decode", memory("d")) as d:
        known = d.belt.receiver_address()
        assert Warmed(p, known).answer().ok
        others = [ReceiverAddress(EngineId(f"x{port}"), "127.0.0.1", port, port) for port in (1, 2)]
        first, second = (Warmed(p, address) for address in others)
        assert second.answer().reason == "too_many_peers"
        pass_time(p, 20.0)  # for a handshake
        assert first.answer().reason == "peer_unreachable"
        assert Warmed(p, known).answer().ok


class Counting(MemoryChannel):
    """A channel that counts calls."""

    def __init__(self, name, network):
        super().__init__(name, network)
        self.connected = []
        self.looks = 0

    def connect(self, agent):
        super().connect(agent)
        self.connected.append(agent)

    def progress(self):
        self.looks += 1


def test_the_channels_connection_is_opened_with_the_handshake():
    """After the handshake both sides let the channel work for a while without a transfer, then stop."""
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
    """A channel that cannot connect loses the peer with the reason ``channel``."""

    class Unreachable(MemoryChannel):
        def connect(self, agent):
            raise ChannelError(f"no way to {agent}")

    there = memory("d")
    with Side("p", "prefill", Unreachable("p", there._network)) as p, Side("d", "decode", there) as d:
        outcome = Warmed(p, d.belt.receiver_address()).answer()
        assert (outcome.ok, outcome.reason) == (False, "channel")
        assert "no way to d" in outcome.detail
