"""Sockets that are lists, and the packets between them: nothing arrives but what the schedule lets arrive."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from kvbelt.security.refusals import Refusals
from kvbelt.transfer.sockets import Received
from tests.transfer.simulation.memory import Ether


class Packet(NamedTuple):
    """One message under way."""

    to: str  #: the endpoint of a listener, or a connection's route
    route: bytes | None  #: of the connection it comes from; None: it goes to a connection
    frame: bytes

    @property
    def speaker(self) -> str:
        """The engine id of the connection's owner."""
        return (self.route or b"").decode().partition("/")[0]

    @property
    def sender(self) -> str:
        """The engine id of the sender whose connection carries it, in either direction."""
        return self.speaker or self.to.partition("/")[0]


@dataclass(eq=False)
class Line:
    """One socket: listening at an endpoint, or connected to one."""

    network: "Network"
    number: int
    name: str
    peer: str | None = None  #: None: it listens
    arrived: list[list[bytes]] = field(default_factory=list)

    def __hash__(self) -> int:
        """So that sets of lines have the same order in every run."""
        return self.number

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        """As a ROUTER or a DEALER sends."""
        if self.peer is None:
            route, frame = frames
            self.network.under_way.append(Packet(route.decode(), None, frame))
        else:
            (frame,) = frames
            self.network.under_way.append(Packet(self.peer, self.name.encode(), frame))


class Network:
    """All packets under way, oldest first, and their possible receivers."""

    def __init__(self) -> None:
        self.under_way: list[Packet] = []
        self.lines: dict[str, Line] = {}
        self.names = itertools.count()
        self.notified: list[bytes] = []
        self.held: set[tuple[str, str]] = set()  #: liveness connections: (sender, receiver)
        self.ended: set[str] = set()  #: senders whose kernel has closed their connections
        self.cut: set[str] = set()  #: hosts of senders that nothing reaches and nothing leaves

    def is_cut(self, engine_id: str) -> bool:
        """Whether a sender's host is cut off."""
        return engine_id.rpartition("-")[0] in self.cut

    def deliver(self, packet: Packet) -> bool:
        """Put a packet into its receiver's queue. False: the receiver is gone."""
        line = self.lines.get(packet.to)
        if line is None:
            return False
        line.arrived.append([packet.frame] if packet.route is None else [packet.route, packet.frame])
        return True


class Proxy:
    """The other end of the notification socket."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        """Take a notification."""
        self.network.notified.extend(frames)


class Listener:
    """``LivenessListener`` of one receiver. The schedule's kernels close connections, and its writes arrive late."""

    port = 7700

    def __init__(self, network: Network, owner: str, ether: Ether) -> None:
        self._network = network
        self._owner = owner
        self._ether = ether

    def token(self, sender: str) -> bytes:
        """The token of one sender."""
        return f"{sender} to {self._owner}".encode()

    def work(self) -> None:
        """Nothing."""

    def has_ended(self, sender: str) -> bool:
        """A killed process's connection is closed; a cut network hides it; a stopped process keeps it."""
        network = self._network
        return (sender, self._owner) in network.held and sender in network.ended and not network.is_cut(sender)

    def is_dead(self, sender: str) -> bool:
        """Whether it has ended and none of its writes is under way."""
        return self.has_ended(sender) and not self._ether.writes(sender, self._owner)


class Connections:
    """``LivenessConnections`` of one sender. ``reachable``: no firewall is before the port."""

    def __init__(self, network: Network, owner: str, *, reachable: bool) -> None:
        self._network = network
        self._owner = owner
        self._reachable = reachable
        self._told: list[tuple[Callable[[str | None], None], str | None]] = []

    def open(self, receiver: str, host: str, port: int, token: bytes, on_end: Callable[[str | None], None]) -> None:
        """Open a connection, which is answered with the next turn."""
        assert (port, token) == (Listener.port, f"{self._owner} to {receiver}".encode())
        if self._reachable:
            self._network.held.add((self._owner, receiver))
        self._told.append((on_end, None if self._reachable else "refused"))

    def work(self) -> None:
        """Report changes."""
        told, self._told = self._told, []
        for on_end, problem in told:
            on_end(problem)


class Lines:
    """``Sockets`` of one life of one process."""

    def __init__(self, network: Network, owner: str, host: str, ether: Ether, *, reachable: bool = True) -> None:
        self.refusals = Refusals()
        self.own: dict[str, Line] = {}
        self._network = network
        self._owner = owner
        self._host = host
        self._ether = ether
        self._reachable = reachable

    def listen_for_liveness(self, host: str, port: int) -> Listener:
        """A receiver's end."""
        return Listener(self._network, self._owner, self._ether)

    def liveness_connections(self) -> Connections:
        """A sender's ends."""
        return Connections(self._network, self._owner, reachable=self._reachable)

    def bind(self, name: str, host: str, port: int, what: str, setting: str) -> tuple[Line, int]:
        """Listen. An earlier listener at this endpoint is gone."""
        port = {"init": 7300, "alloc": 7400}[name]
        return self._open(f"tcp://{self._host}:{port}", None), port

    def connect(self, kind: int, address: str, server_key: str | None) -> "Line | Proxy":
        """Open a connection with a name of its own."""
        if kind == zmq.PUSH:
            return Proxy(self._network)
        return self._open(f"{self._owner}/{next(self._network.names)}", address)

    def _open(self, name: str, peer: str | None) -> Line:
        line = self._network.lines[name] = self.own[name] = Line(self._network, next(self._network.names), name, peer)
        return line

    def close(self, line: Line) -> None:
        """Close a socket."""
        self.own.pop(line.name, None)
        if self._network.lines.get(line.name) is line:
            del self._network.lines[line.name]

    def close_all(self) -> None:
        """Close every socket of a dead process."""
        for line in list(self.own.values()):
            self.close(line)

    def received(self, line: Line) -> Iterator[Received]:
        """Take all messages that have arrived."""
        arrived, line.arrived = line.arrived, []
        return (Received(frames, None, "") for frames in arrived)

    def ready(self) -> set[Line]:
        """The sockets with messages."""
        return {line for line in self.own.values() if line.arrived}
