"""Which events on a liveness connection prove a death, and which prove nothing."""

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import subprocess
import sys

import pytest

from kvbelt.errors import StartError
from kvbelt.security.refusals import Refusals
from kvbelt.transfer import fencing, liveness
from kvbelt.transfer.liveness import LivenessConnections, LivenessListener
from kvbelt.wire.ids import EngineId
from tests.transfer.belts import eventually

P, Q, D = EngineId("p"), EngineId("q"), EngineId("d")

#: Where senders are: an address of this machine that no other test uses.
SENDER = "127.0.7.1"


class Clock:
    """Seconds that a test decides."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """One that stands still."""
    return Clock()


@pytest.fixture
def listener(clock):
    """A receiver's listener."""
    made = LivenessListener("127.0.0.1", 0, Refusals(), clock=clock)
    yield made
    made.close()


@pytest.fixture
def opened(listener):
    """Opens connections in a sender's name, and closes them after the test."""
    made = []

    def open_one(sender, message=None):
        connection = socket.create_connection(("127.0.0.1", listener.port), source_address=(SENDER, 0))
        token = listener.token(sender)
        connection.sendall(len(token).to_bytes(2) + token if message is None else message)
        made.append(connection)
        before = known(listener)
        eventually(lambda: working(listener) and known(listener) != before, "it is taken in")
        if message is None:
            eventually(lambda: working(listener) and sender in known(listener)[0], "its token is read")
        return connection

    yield open_one
    for connection in made:
        connection.close()


def working(listener):
    """Let the listener work. Always true."""
    listener.work()
    return True


def known(listener):
    """Senders with an open connection, and what was refused."""
    senders = sorted(str(each.sender) for each in listener._connections.values())
    return senders, listener._refusals.totals()


def ended(listener, sender):
    """Whether the sender's death is proven."""
    return working(listener) and listener.has_ended(sender)


CHILD = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(bytes.fromhex(sys.argv[2]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(listener):
    """A process that holds the connection of P."""
    token = listener.token(P)
    message = len(token).to_bytes(2) + token
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(listener.port), message.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"open\n"
    eventually(lambda: working(listener) and known(listener)[0] == ["p"], "it is taken in")
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_killed_process_is_dead(listener, child):
    """Its kernel closes the connection, even before the process is reaped."""
    child.kill()
    eventually(lambda: ended(listener, P), "the end of the connection")


def test_a_stopped_process_is_alive(listener, child):
    """Its kernel keeps the connection."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert not ended(listener, P)
    child.send_signal(signal.SIGCONT)
    child.kill()
    eventually(lambda: ended(listener, P), "the end of the connection")


def test_a_reset_is_proof(listener, opened):
    """A restarted host answers a probe with a reset."""
    connection = opened(P)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    eventually(lambda: ended(listener, P), "the reset")


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH])
def test_an_error_of_the_network_proves_nothing(listener, opened, error):
    """The process may be alive."""
    opened(P)

    class Broken:
        def recv(self, size):
            raise OSError(error, os.strerror(error))

        def close(self):
            pass

    (connection,) = listener._connections
    listener._selector.unregister(connection)
    broken = Broken()
    listener._connections[broken] = listener._connections.pop(connection)
    listener._selector.unregister = lambda _: None
    listener._read(broken)
    assert not listener._connections
    assert not listener.has_ended(P)
    connection.close()


def test_neither_end_gives_up_in_silence(listener, opened, clock):
    """After a cut both ends still have the connection, because the kernel never gives it up."""
    sending = LivenessConnections(clock=clock)
    told = []
    sending.open(Q, "127.0.0.1", listener.port, listener.token(P), told.append)
    eventually(lambda: sending.work() or told, "it is open")
    eventually(lambda: working(listener) and known(listener)[0] == ["p"], "it is taken in")
    for connection in (*listener._connections, *(each.connection for each in sending._open.values())):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == (1 << 31) - 1
    (here,) = listener._connections
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    (there,) = sending._open.values()
    assert there.connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    sending.close(writing=False)


def test_a_sender_with_another_connection_is_alive(listener, opened):
    """A stolen token cannot end a sender."""
    first, second = opened(P), opened(P)
    eventually(lambda: working(listener) and known(listener)[0] == ["p", "p"], "both are taken in")
    second.close()
    eventually(lambda: working(listener) and known(listener)[0] == ["p"], "it is closed")
    assert not listener.has_ended(P)
    first.close()
    eventually(lambda: ended(listener, P), "the end of the last one")


@pytest.mark.parametrize(
    "message",
    [b"\0\1x", b"\0\43" + bytes(35), b"\xff\xff" + bytes(100), b"GET / HTTP/1.1\r\n\r\n"],
)
def test_a_connection_without_the_token_does_not_count_for_a_sender(listener, opened, message):
    """The connection is closed and counted."""
    opened(P)
    opened(P, message)
    refused = ["p"], {"liveness": {"malformed": 1}}
    eventually(lambda: working(listener) and known(listener) == refused, "it is refused")
    assert not listener.has_ended(P)


def test_a_token_is_of_one_sender(listener, opened):
    """A token with another sender's name is refused."""
    token = listener.token(P)[:-1] + b"q"
    opened(Q, len(token).to_bytes(2) + token)
    refused = [], {"liveness": {"malformed": 1}}
    eventually(lambda: working(listener) and known(listener) == refused, "it is refused")
    assert not ended(listener, Q)


def test_a_token_may_come_in_pieces(listener, opened):
    """TCP does not keep the bounds of a message."""
    token = listener.token(P)
    connection = opened(P, (len(token).to_bytes(2) + token)[:1])
    (incoming,) = listener._connections.values()
    for size, byte in enumerate((len(token).to_bytes(2) + token)[1:], 1):
        eventually(lambda size=size: working(listener) and len(incoming.received) == size, "the byte before")
        assert incoming.sender is None
        connection.sendall(bytes([byte]))
    eventually(lambda: working(listener) and incoming.sender == P, "the last byte")


def test_connections_without_a_token_are_bounded(listener, opened, monkeypatch):
    """The oldest is closed. Connections with a token stay."""
    monkeypatch.setattr(liveness, "MAX_UNPROVEN", 3)
    opened(P)
    unproven = [opened(P, b"\0") for _ in range(4)]
    assert known(listener) == (["None", "None", "None", "p"], {"liveness": {"too_many": 1}})
    assert unproven[0].recv(1) == b""


def test_every_token_that_has_arrived_is_read_before_a_connection_is_closed(listener):
    """Eighty senders that connect at once are all known."""
    senders = [EngineId(f"p{number}") for number in range(80)]
    with contextlib.ExitStack() as stack:
        for sender in senders:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
            token = listener.token(sender)
            connection.sendall(len(token).to_bytes(2) + token)
        eventually(lambda: working(listener) and known(listener)[0] == sorted(senders), "all of them are known")


def test_a_sender_that_comes_back_is_alive(listener, opened):
    """A reset by a device between the hosts proves nothing once the sender has a new connection."""
    opened(P).close()
    eventually(lambda: ended(listener, P), "the end of the connection")
    opened(P)
    assert not listener.has_ended(P)


def test_a_connection_without_a_descriptor_is_refused(listener):
    """It would otherwise keep the listener readable, and the belt's thread awake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            client.connect(("127.0.0.1", listener.port))
            working(listener)
            assert not select.select([listener.fileno], [], [], 0)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.recv(1) == b""


def test_a_kernel_without_ipv6_has_one_table(monkeypatch):
    """A missing table is an empty one."""
    ports = fencing.listening_ports()
    monkeypatch.setattr(fencing, "_TABLES", (*fencing._TABLES, "/proc/self/net/no-such-table"))
    assert fencing.listening_ports() == ports


def test_a_taken_port_is_a_start_error(listener):
    """It names the setting."""
    with pytest.raises(StartError, match="pd_peer_liveness_port"):
        LivenessListener("127.0.0.1", listener.port, Refusals())


# The sending end.


@pytest.fixture
def sending(clock):
    """A sender's connections."""
    made = LivenessConnections(clock=clock)
    yield made
    made.close(writing=False)


def test_a_refused_connection_is_reported(sending):
    """The transfer goes on without the connection."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    told = []
    sending.open(Q, "127.0.0.1", port, b"token", told.append)
    eventually(lambda: sending.work() or told, "the refusal")
    assert told == ["Connection refused"]


def test_a_silent_port_is_given_up(sending, clock):
    """A firewall may drop the packets, so the attempt ends after some seconds."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(3):  # the queue of a listener that never accepts is full: it does not answer
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        told = []
        sending.open(Q, *full.getsockname(), b"token", told.append)
        sending.work()
        assert not told
        clock.now = liveness.CONNECT_SECONDS
        sending.work()
        assert told == ["no answer within 3 s"]
        for each in waiting:
            each.close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("not an address", 1), ("", 0)])
def test_a_nonsensical_address_is_reported(sending, host, port):
    """A peer may send any address."""
    told = []
    sending.open(Q, host, port, b"token", told.append)
    eventually(lambda: sending.work() or told, "the refusal")
    assert told
    assert told[0] is not None


def test_an_ended_connection_is_opened_again(listener, sending, clock):
    """If it ends as soon as it was opened, the receiver does not want it."""
    for seconds, again in ((liveness.CONNECT_SECONDS + 1, True), (0, False)):
        sending.open(D, "127.0.0.1", listener.port, listener.token(P), lambda _: None)
        eventually(lambda: (sending.work(), working(listener)) and known(listener)[0] == ["p"], "the sender is known")
        clock.now += seconds
        (connection,) = listener._connections
        listener._forget(connection)
        eventually(lambda: sending.work() or D not in sending._open, "the end is seen")
        assert (D in sending._opening) is again
        while sending._opening:
            sending.work()


def test_one_connection_a_receiver(listener, sending):
    """Several transfers share it. It is reopened only after the receiver has closed it."""
    told = []
    for _ in range(3):
        sending.open(Q, "::ffff:127.0.0.1", listener.port, listener.token(P), told.append)
    eventually(lambda: sending.work() or len(told) == 3, "it is open")
    sending.open(Q, "127.0.0.1", listener.port, listener.token(P), told.append)
    assert told == [None] * 4
    eventually(lambda: working(listener) and known(listener)[0] == ["p"], "it is taken in")
    listener.close()
    eventually(lambda: sending.work() or not sending._open, "it is forgotten")


@pytest.mark.parametrize("writing", [True, False])
def test_what_may_still_write_keeps_its_connections(listener, sending, writing):
    """A closed belt may have a write in flight, so its end must not look like a death."""
    told = []
    sending.open(Q, "127.0.0.1", listener.port, listener.token(P), told.append)
    eventually(lambda: sending.work() or told, "it is open")
    eventually(lambda: working(listener) and known(listener)[0] == ["p"], "it is taken in")
    (descriptor,) = [each.connection.fileno() for each in sending._open.values()]
    sending.close(writing=writing)
    if writing:
        assert not ended(listener, P)
        os.close(descriptor)
    eventually(lambda: ended(listener, P), "the end of the connection")


# What may still arrive.


ELSEWHERE = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), source_address=("127.0.7.1", 0))
connection.setblocking(False)
try:
    while True:
        connection.send(bytes(65536))
except BlockingIOError:
    print("full", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def sender_elsewhere(server, code=ELSEWHERE):
    """A process whose kernel has bytes left to send to ``server``: the process, and this end of its connection."""
    command = [sys.executable, "-c", code, str(server.getsockname()[1])]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        server.accept()[0] as here,
    ):
        try:
            assert process.stdout.readline() == b"full\n"
            yield process, here
        finally:
            process.kill()


def test_a_death_is_final_once_every_connection_has_ended(listener, opened, clock):
    """The kernel of a dead process still sends what the process had put into its socket."""
    with socket.create_server(("127.0.0.1", 0)) as server, sender_elsewhere(server) as (process, here):
        process.kill()
        process.wait()
        opened(P).close()
        eventually(lambda: ended(listener, P), "the end of the connection")
        clock.now = 1e6
        assert not listener.is_dead(P)
        while here.recv(1 << 20):
            assert not listener.is_dead(P) or not here.recv(1, socket.MSG_PEEK)
        assert listener.is_dead(P), "a channel may keep its own end open"


def test_a_death_waits_for_no_other_connection():
    """Connections of living processes, and those at other ports, do not count."""
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as channel:
        control = fencing.ControlEnds({http.getsockname()[1]})
        with sender_elsewhere(channel) as (_, living), sender_elsewhere(http) as (client, at_http):
            client.kill()
            client.wait()
            assert not fencing.connections_with(SENDER, control)
            assert fencing.connections_with(SENDER) == {str(os.fstat(at_http.fileno()).st_ino)}
            assert living.fileno() > 0
            host, port = at_http.getpeername()
            dialled = fencing.ControlEnds()
            dialled.dial(host, port)
            assert not fencing.connections_with(SENDER, dialled)


def test_a_death_is_not_final_at_once(listener, opened, clock):
    """Writes that do not use a socket get some seconds to end."""
    opened(P).close()
    eventually(lambda: ended(listener, P), "the end of the connection")
    clock.now = fencing.DRAIN_SECONDS - 0.1
    assert not listener.is_dead(P)
    clock.now = fencing.DRAIN_SECONDS
    eventually(lambda: listener.is_dead(P), "nothing is left")


def test_another_sender_at_the_address_is_not_waited_for_for_ever(listener, opened, clock):
    """Its connections look the same if its host's table cannot be read."""
    with socket.create_server(("127.0.0.1", 0)) as server, sender_elsewhere(server) as (process, _):
        process.kill()
        process.wait()
        opened(Q)
        opened(P).close()
        eventually(lambda: ended(listener, P), "the end of the connection")
        clock.now = fencing.SHARED_SECONDS - 0.1
        assert not listener.is_dead(P)
        clock.now = fencing.SHARED_SECONDS
        assert listener.is_dead(P)
        assert not listener.has_ended(Q)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", SENDER), ("::1", "::1"), ("127.0.0.1", f"::ffff:{SENDER}")]
)
def test_connections_are_found_by_address(host, address):
    """This holds for IPv4 and IPv6."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    before = fencing.connections_with(address)
    code = ELSEWHERE if host == "127.0.0.1" else ELSEWHERE.replace("127.0.0.1", host).replace(SENDER, host)
    with server, sender_elsewhere(server, code) as (process, here):
        process.kill()
        process.wait()
        with socket.create_connection(server.getsockname()[:2]) as own, server.accept()[0]:
            assert own.fileno() > 0
            assert fencing.connections_with(address) - before == {str(os.fstat(here.fileno()).st_ino)}
            assert not fencing.connections_with("203.0.113.7")
    assert fencing.connections_with(address) <= before
