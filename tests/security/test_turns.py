"""The bounds of one turn: whoever says much does not keep the others waiting."""

import pytest
import zmq

from kvbelt.security import gate
from kvbelt.security.gate import Gate
from kvbelt.security.keys import new_key_pair
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.sockets import MESSAGES_A_TURN, Sockets
from tests.security.support import deployment, peer
from tests.transfer.belts import eventually


@pytest.fixture
def ports():
    """Sockets with two listening ones."""
    sockets = Sockets(None, Refusals())
    yield sockets, *(sockets.bind(name, "127.0.0.1", 0, "a port", "a setting") for name in ("one", "two"))
    sockets.close_all()


def test_a_turn_takes_so_many_messages_and_no_more(ports):
    """Many on one port and one on the other: both are heard in the first turn."""
    sockets, (one, loud), (two, quiet) = ports
    with peer(loud) as much, peer(quiet) as little:
        for _ in range(3 * MESSAGES_A_TURN):
            much.send(b"x")
        little.send(b"y")
        eventually(lambda: {one, two} <= sockets.wait(0), "both have arrived")
        heard = []
        while len(heard) < 3 * MESSAGES_A_TURN:
            turn = list(sockets.received(one))
            assert len(turn) <= MESSAGES_A_TURN
            heard += turn
            if len(heard) == len(turn):
                assert [received.frames[1:] for received in sockets.received(two)] == [[b"y"]]


def send_for_ever(socket):
    """... or until it may not."""
    while True:
        socket.send(bytes(8000))


def test_what_cannot_be_read_soon_waits_with_who_says_it(ports):
    """A queue is bounded: a peer that says much is made to wait, and costs no memory here."""
    _, (one, port), _ = ports
    assert one.rcvhwm == gate.QUEUE_MESSAGES
    assert one.maxmsgsize == gate.MAX_MESSAGE_BYTES
    assert one.handshake_ivl == gate.HANDSHAKE_MS
    with peer(port, wait_ms=500) as much:
        much.sndhwm = 1
        with pytest.raises(zmq.Again):
            send_for_ever(much)


def test_a_turn_judges_so_many_peers_and_no_more(monkeypatch):
    """The gate says that there is more, and goes on when it is asked again."""
    monkeypatch.setattr(gate, "PER_TURN", 1)
    keys, refusals = deployment("d")["d"], Refusals()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        own = Gate(context, keys, refusals)
        own.guard(socket, "alloc")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        stranger = new_key_pair()
        with peer(port, own=stranger, server=keys.own.public), peer(port, own=stranger, server=keys.own.public):
            seen = []
            while sum(seen) < 2:
                before = sum(refusals.totals().get("alloc", {}).values())
                own.work()
                seen.append(sum(refusals.totals().get("alloc", {}).values()) - before)
        assert max(seen) == 1
        own.close()
