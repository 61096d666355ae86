"""CURVE on the control sockets of one ZeroMQ context, and the ZAP handler that admits trusted keys.

Rules:

1. With keys, every listening socket is a CURVE server and every connection a CURVE client. A peer without a trusted
   key, or that expects another server, cannot send a message.
2. Without an answer of the ZAP handler a peer is refused (``ZAP_ENFORCE_DOMAIN``); libzmq's default is to admit it.
3. Limits apply before keys: size of a message, length of a queue, time for a handshake.
4. The handler never waits. The thread that owns the context polls ``sockets`` and calls ``work`` when one is readable.

ZAP is https://rfc.zeromq.org/spec/27/.
"""

import itertools
from typing import Any

import zmq
from zmq.utils import z85

from kvbelt.security.keys import Keys, fingerprint, require_curve
from kvbelt.security.refusals import Refusals

#: Every valid message is far smaller (wire/codec.py); a larger frame ends its connection unread.
MAX_MESSAGE_BYTES = 64 * 1024
QUEUE_MESSAGES = 1000  #: unread messages of one peer; beyond it TCP makes the peer wait
HANDSHAKE_MS = 10_000  #: for a peer's key exchange; the thread that answers may not run for seconds
BACKLOG = 512

PER_TURN = 64  #: requests and events handled in one turn

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_monitor_numbers = itertools.count()

Socket = zmq.Socket[bytes]


class ZapAuthenticator:
    """The ZAP handler of one context. Belongs to one thread. Raises StartError: there are keys, but no CURVE."""

    def __init__(self, context: "zmq.Context[Socket]", keys: Keys | None, refusals: Refusals) -> None:
        self._context = context
        self._keys = keys
        self._refusals = refusals
        self._zap: Socket | None = None
        # Monitor to the listening socket and its name.
        self._watched: dict[Socket, tuple[Socket, str]] = {}
        if keys is not None:
            require_curve()
            self._zap = context.socket(zmq.ROUTER)
            self._zap.linger = 0
            self._zap.bind(_ZAP_ADDRESS)

    @property
    def sockets(self) -> list[Socket]:
        """Call ``work`` when one of these is readable."""
        return [*([self._zap] if self._zap is not None else []), *self._watched]

    def guard(self, socket: Socket, name: str) -> None:
        """Secure a socket before it is bound. ``name`` appears in refusals."""
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.rcvhwm = QUEUE_MESSAGES
        socket.handshake_ivl = HANDSHAKE_MS
        socket.backlog = BACKLOG
        if self._keys is not None:
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.zap_domain = name.encode("ascii")  # tells the handler which socket a peer connects to
            socket.curve_publickey = self._keys.own.public.encode("ascii")
            socket.curve_secretkey = self._keys.own.secret.encode("ascii")
            socket.curve_server = 1
        address = f"inproc://kvbelt.monitor.{next(_monitor_numbers)}"
        socket.monitor(address, _FAILURES)
        monitor = self._context.socket(zmq.PAIR)
        monitor.linger = 0
        # No limit: a full queue would block libzmq's thread, which serves all sockets.
        monitor.rcvhwm = 0
        monitor.connect(address)
        self._watched[monitor] = (socket, name)

    def show_key(self, socket: Socket, server_key: str | None) -> None:
        """Secure a socket before it is connected. Only the holder of ``server_key`` is accepted as the server."""
        if self._keys is None:
            return
        if server_key is None or not self._keys.trusts(server_key):
            raise ValueError("a connection to a key that is not trusted")  # the caller must check first
        socket.curve_serverkey = server_key.encode("ascii")
        socket.curve_publickey = self._keys.own.public.encode("ascii")
        socket.curve_secretkey = self._keys.own.secret.encode("ascii")

    def work(self) -> bool:
        """Answer requests and count failed handshakes. True: there is more to do."""
        more = self._answer_requests()
        for monitor, (_, name) in list(self._watched.items()):
            more |= self._count_failures(monitor, name)
        return more

    def close(self, socket: Socket | None = None) -> None:
        """Stop watching a socket before it is closed; without one: close everything."""
        for monitor, (watched, _) in list(self._watched.items()):
            if socket is None or watched is socket:
                watched.disable_monitor()
                monitor.close()
                del self._watched[monitor]
        if socket is None and self._zap is not None:
            self._zap.close()
            self._zap = None

    def _answer_requests(self) -> bool:
        if self._zap is None:
            return False
        for _ in range(PER_TURN):
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            # route, empty, version, request id, domain, address, identity, mechanism, credentials
            _, _, version, request_id, domain, address, _, mechanism, *credentials = request
            status, text, user = self._judge(domain.decode("ascii"), mechanism, credentials, address)
            self._zap.send_multipart([*request[:2], version, request_id, status, text, user, b""], zmq.NOBLOCK)
        return True

    def _judge(
        self, name: str, mechanism: bytes, credentials: list[bytes], address: bytes
    ) -> tuple[bytes, bytes, bytes]:
        assert self._keys is not None
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            key = z85.encode(credentials[0])
            if self._keys.trusts(key.decode("ascii")):
                return b"200", b"OK", key
            detail = f"key {fingerprint(key.decode('ascii'))} at {address.decode('ascii', 'replace')} is not trusted"
        else:
            detail = f"{address.decode('ascii', 'replace')} came with {mechanism!r}"
        self._refusals.add(name, "unknown_key", detail)
        return b"400", b"unknown key", b""

    def _count_failures(self, monitor: Socket, name: str) -> bool:
        for _ in range(PER_TURN):
            try:
                monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._refusals.add(name, "handshake", "a peer without a key, with a wrong one, or that is not ZeroMQ")
        return True


def key_of(frame: "zmq.Frame | Any") -> str:
    """The authenticated public key of a message's sender.

    Without keys the field is under the peer's control: do not call it then.
    """
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def address_of(frame: "zmq.Frame | Any") -> str:
    """The numeric address that a message came from."""
    return str(frame.get("Peer-Address"))


def mechanism_of(socket: Socket) -> str:
    """``CURVE`` or ``NULL``, as the socket itself says."""
    return "CURVE" if socket.mechanism == zmq.CURVE else "NULL"
