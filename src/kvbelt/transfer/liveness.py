"""Proof that a sender's process has ended, given by the kernel of its host.

Rules:

1. A sender holds one TCP connection open to each receiver. It is opened before the first reservation and carries
   one message, the token of the handshake.
2. While a write may be in flight, only the end of the sender's process closes it. A stopped process keeps it.
3. The receiver takes FIN or RST for proof. The sender's kernel sends FIN when the process ends. It sends RST, in
   answer to a keepalive probe, when it does not know the connection: the host has restarted.
4. Silence proves nothing, and neither end gives up because of it (``_NEVER_MS``). If the sender's kernel gave up in
   a cut network, its RST after the repair would look like a death.
5. Only the holder of the token speaks for a sender, and a sender with another open connection is alive.

A process forked from the sender keeps the connection open too: the slot then stays in quarantine, which is safe.
"""

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from kvbelt.errors import StartError
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.fencing import ControlEnds, Drain
from kvbelt.wire.ids import EngineId

log = logging.getLogger(__name__)

#: Longest that opening a connection may delay a handshake. A second SYN is sent after one second.
CONNECT_SECONDS = 3.0
#: Connections that have not shown a token. The oldest one is closed beyond that.
MAX_UNPROVEN = 64
#: Dead senders remembered. A forgotten one leaves its slots in quarantine.
MAX_DEAD = 4096

_KEEPALIVE_SECONDS = 5
_NEVER_MS = (1 << 31) - 1  # 24 days: the most that TCP_USER_TIMEOUT takes
_BACKLOG = 512
_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH_BYTES = 2
_MAX_TOKEN_BYTES = 1024


@dataclass(slots=True, eq=False)
class _Incoming:
    address: str
    received: bytes = b""
    sender: EngineId | None = None  #: None: it has not shown a token


class LivenessListener:
    """The receiving end: which senders are dead. Belongs to the belt's thread.

    ``control`` are this process's connections that are not the channel's.

    Raises:
        StartError: the port is taken or the address is not ours.
    """

    def __init__(
        self,
        host: str,
        port: int,
        refusals: Refusals,
        control: ControlEnds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise StartError(
                f"the liveness port cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}; "
                "free the port or set pd_peer_liveness_port"
            ) from None
        self._socket.setblocking(False)
        self._refusals = refusals
        self._control = control if control is not None else ControlEnds()
        self._clock = clock
        self._secret = secrets.token_bytes(_MAC_BYTES)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        # Every accepted connection, oldest first.
        self._connections: OrderedDict[socket.socket, _Incoming] = OrderedDict()
        self._dead: OrderedDict[EngineId, Drain] = OrderedDict()
        self._spare = socket.socket()  # given up to refuse a connection when no descriptor is left
        self.port: int = self._socket.getsockname()[1]
        self.fileno: int = self._selector.fileno()  #: readable when there is work

    def token(self, sender: EngineId) -> bytes:
        """What a sender must send over its connection."""
        name = sender.encode()
        return hmac.digest(self._secret, name, "sha256") + name

    def is_dead(self, sender: EngineId) -> bool:
        """Whether a sender's process has ended, and nothing that it has sent is still to arrive."""
        drain = self._dead.get(sender)
        return drain is not None and drain.over(self._clock())

    def has_ended(self, sender: EngineId) -> bool:
        """Whether a sender's process has ended, whatever may still arrive."""
        return sender in self._dead

    def work(self) -> None:
        """Take in what has happened. Never waits."""
        ready = [key.fileobj for key, _ in self._selector.select(0)]
        for connection in ready:
            if isinstance(connection, socket.socket) and connection is not self._socket:
                self._read(connection)
        # Last, so that a token which has arrived is read before its connection could be too old.
        if self._socket in ready:
            self._accept()

    def _accept(self) -> None:
        for _ in range(MAX_UNPROVEN):
            try:
                connection, address = self._socket.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    self._refuse()
                continue
            connection.setblocking(False)
            for option, value in (
                (socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS),
                (socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS),
                (socket.TCP_USER_TIMEOUT, _NEVER_MS),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._selector.register(connection, selectors.EVENT_READ)
            self._connections[connection] = _Incoming(address[0])
            self._read(connection)  # its token has often arrived
        unproven = [connection for connection, incoming in self._connections.items() if incoming.sender is None]
        for connection in unproven[: max(0, len(unproven) - MAX_UNPROVEN)]:
            self._refusals.add("liveness", "too_many", f"{MAX_UNPROVEN} connections without a token")
            self._forget(connection)

    def _refuse(self) -> None:
        """Close a connection that there is no descriptor for. Left alone, it would keep the thread awake."""
        self._spare.close()
        with contextlib.suppress(OSError):
            self._socket.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = socket.socket()

    def _read(self, connection: socket.socket) -> None:
        incoming = self._connections[connection]
        try:
            received = connection.recv(_LENGTH_BYTES + _MAX_TOKEN_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # Any other error is the network's: ETIMEDOUT, EHOSTUNREACH.
            self._closed(connection, proven=error.errno == errno.ECONNRESET)
            return
        if not received:
            self._closed(connection, proven=True)
            return
        incoming.received += received
        size = _LENGTH_BYTES + int.from_bytes(incoming.received[:_LENGTH_BYTES])
        if size <= _LENGTH_BYTES + _MAX_TOKEN_BYTES and len(incoming.received) < max(size, _LENGTH_BYTES + 1):
            return
        sender = EngineId(incoming.received[_LENGTH_BYTES + _MAC_BYTES :].decode(errors="replace"))
        if incoming.sender is None and hmac.compare_digest(incoming.received[_LENGTH_BYTES:], self.token(sender)):
            incoming.sender = sender
            self._dead.pop(sender, None)  # rule 5: it lives, whatever became of an earlier connection
            return
        self._refusals.add("liveness", "malformed", f"what {incoming.address} has sent is not a token")
        self._closed(connection, proven=False)

    def _closed(self, connection: socket.socket, *, proven: bool) -> None:
        incoming = self._forget(connection)
        sender = incoming.sender
        if sender is None or any(other.sender == sender for other in self._connections.values()):
            return
        if not proven:
            log.warning("the connection to sender %s has timed out: its death cannot be proven any more", sender)
            return
        log.info("the process of sender %s has ended", sender)
        living = {other.address for other in self._connections.values() if other.sender is not None}
        shared = incoming.address in living
        self._dead[sender] = Drain(incoming.address, self._clock(), self._control, shared=shared)
        while len(self._dead) > MAX_DEAD:
            self._dead.popitem(last=False)

    def _forget(self, connection: socket.socket) -> _Incoming:
        self._selector.unregister(connection)
        connection.close()
        return self._connections.pop(connection)

    def close(self) -> None:
        self._selector.close()
        for connection in (self._socket, self._spare, *self._connections):
            connection.close()


@dataclass(slots=True, eq=False)
class _Opening:
    """A connection of a sender, from the connect on."""

    connection: socket.socket
    address: tuple[str, int]
    token: bytes
    give_up_at: float
    on_end: list[Callable[[str | None], None]] = field(default_factory=list)
    opened_at: float = 0.0


class LivenessConnections:
    """The sending end: one open connection a receiver. Belongs to the belt's thread."""

    def __init__(self, control: ControlEnds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._control = control if control is not None else ControlEnds()
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._open: dict[EngineId, _Opening] = {}
        self._opening: dict[EngineId, _Opening] = {}
        self.fileno: int = self._selector.fileno()  #: readable when there is work

    def open(
        self, receiver: EngineId, host: str, port: int, token: bytes, on_end: Callable[[str | None], None]
    ) -> None:
        """Open a connection, unless there is one. ``on_end`` comes once: with None, or with what is wrong."""
        if receiver in self._open:
            on_end(None)
            return
        if len(token) > _MAX_TOKEN_BYTES:
            on_end(f"a token of {len(token)} bytes")
            return
        if receiver in self._opening:
            self._opening[receiver].on_end.append(on_end)
            return
        address = _unmapped(host)
        connection = None
        try:
            connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            connection.setblocking(False)
            # After the connect it bounds how long the token may go unacknowledged: rule 4.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _NEVER_MS)
            number = connection.connect_ex((address, port))
            problem = None if number in {0, errno.EINPROGRESS} else os.strerror(number)
        except (OSError, OverflowError) as error:
            problem = str(error)
        if connection is None or problem is not None:
            if connection is not None:
                connection.close()
            on_end(problem)
            return
        self._control.dial(address, port)
        give_up_at = self._clock() + CONNECT_SECONDS
        self._opening[receiver] = _Opening(connection, (host, port), token, give_up_at, [on_end])
        self._selector.register(connection, selectors.EVENT_WRITE, receiver)

    def work(self) -> None:
        """Take in what has happened. Never waits."""
        for key, _ in self._selector.select(0):
            opening = self._opening.get(key.data)
            if opening is not None:
                problem = opening.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self._end(key.data, os.strerror(problem) if problem else None)
            else:
                self._closed(key.data)
        now = self._clock()
        for receiver, opening in list(self._opening.items()):
            if opening.give_up_at <= now:
                self._end(receiver, f"no answer within {CONNECT_SECONDS:g} s")

    def _closed(self, receiver: EngineId) -> None:
        """The receiver never sends, so its connection has ended: the receiver is gone, or something between cut it."""
        ended = self._open.pop(receiver)
        self._selector.unregister(ended.connection)
        ended.connection.close()
        # Opened anew, it takes the receiver's proof back. One that ends at once is not opened again and again.
        if self._clock() - ended.opened_at > CONNECT_SECONDS:
            self.open(receiver, *ended.address, ended.token, partial(_report_reopened, receiver))

    def _end(self, receiver: EngineId, problem: str | None) -> None:
        opening = self._opening.pop(receiver)
        self._selector.unregister(opening.connection)
        if problem is None:
            try:
                opening.connection.sendall(len(opening.token).to_bytes(_LENGTH_BYTES) + opening.token)
            except OSError as error:
                problem = str(error)
        if problem is None:
            opening.opened_at = self._clock()
            self._open[receiver] = opening
            self._selector.register(opening.connection, selectors.EVENT_READ, receiver)
        else:
            opening.connection.close()
        for on_end in opening.on_end:
            on_end(problem)

    def close(self, *, writing: bool) -> None:
        """End. ``writing``: a write may be in flight, so the connections stay open until the process ends."""
        self._selector.close()
        for opening in (*self._open.values(), *self._opening.values()):
            if writing:
                opening.connection.detach()
            else:
                opening.connection.close()
        self._open.clear()
        self._opening.clear()


def _report_reopened(receiver: EngineId, problem: str | None) -> None:
    if problem is None:
        log.info("the liveness connection to %s had ended and is open again", receiver)


def _unmapped(host: str) -> str:
    """An IPv4 address that is written as an IPv6 one, as IPv4."""
    try:
        mapped = getattr(ipaddress.ip_address(host), "ipv4_mapped", None)
    except ValueError:
        return host
    return str(mapped) if mapped is not None else host
