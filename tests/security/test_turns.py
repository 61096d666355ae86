"""The bounds of one turn: a peer that sends many messages does not keep the others waiting."""

import pytest
import zmq

from kvbelt.security import authenticator
from kvbelt.security.authenticator import ZapAuthenticator
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.sockets import MESSAGES_A_TURN, Sockets
from tests.security.support import deployment, peer
from tests.transfer.belts import eventually


@pytest.fixture
def ports():
    """Sockets with two listening ports."""
    sockets = Sockets(None, Refusals())
    yield sockets, *(sockets.bind(name, "127.0.0.1", 0, "a port", "a setting") for name in ("one", "two"))
    sockets.close_all()


def test_a_turn_takes_so_many_messages_and_no_more(ports):
    """With many messages on one port and one on the other, the first turn reads both ports."""
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
    """Send until the socket refuses."""
    while True:
        socket.send(bytes(8000))


def test_messages_that_cannot_be_read_soon_wait_at_their_sender(ports):
    """The queue is bounded, so a peer that sends much waits and costs no memory here."""
    _, (one, port), _ = ports
    assert one.rcvhwm == authenticator.QUEUE_MESSAGES
    assert one.maxmsgsize == authenticator.MAX_MESSAGE_BYTES
    assert one.handshake_ivl == authenticator.HANDSHAKE_MS
    with peer(port, wait_ms=500) as much:
        much.sndhwm = 1
        with pytest.raises(zmq.Again):
            send_for_ever(much)


def test_a_turn_judges_so_many_peers_and_no_more(monkeypatch):
    """The turn reports that more are waiting, and the next call goes on."""
    monkeypatch.setattr(authenticator, "PER_TURN", 2)
    keys, refusals = deployment("d")["d"], Refusals()
    with zmq.Context() as context, context.socket(zmq.DEALER) as libzmq:
        libzmq.linger = 0
        own = ZapAuthenticator(context, keys, refusals)
        libzmq.connect("inproc://zeromq.zap.01")  # as libzmq does for a new connection
        for number in range(5):
            request = [b"", b"1.0", str(number).encode(), b"alloc", b"10.0.0.7", b"", b"CURVE", bytes(32)]
            libzmq.send_multipart(request)
        seen = []
        for more in (True, True, False):
            assert own.work() is more
            seen.append(sum(refusals.totals()["alloc"].values()))
        assert seen == [2, 4, 5]
        assert {libzmq.recv_multipart()[3] for _ in range(5)} == {b"400"}
        own.close()
