"""Sockets that are lists, and the packets between them: nothing arrives but what the schedule lets arrive."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from kvbelt.security.refusals import Refusals
from kvbelt.transfer.sockets import Received


class Packet(NamedTuple):
    """One message under way."""

    to: str  #: an endpoint somebody listens at, or a connection's route
    route: bytes | None  #: of the connection it comes from; None: it goes to a connection
    frame: bytes

    @property
    def speaker(self) -> str:
        """Whose connection it comes from: an engine id."""
        return (self.route or b"").decode().partition("/")[0]


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
    """All packets under way, oldest first, and who would take them."""

    def __init__(self) -> None:
        self.under_way: list[Packet] = []
        self.lines: dict[str, Line] = {}
        self.names = itertools.count()
        self.notified: list[bytes] = []

    def deliver(self, packet: Packet) -> bool:
        """Put it where its receiver finds it. False: there is nobody any more."""
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
        """It is told."""
        self.network.notified.extend(frames)


class Lines:
    """``Sockets`` of one life of one process."""

    def __init__(self, network: Network, owner: str, host: str) -> None:
        self.refusals = Refusals()
        self.own: dict[str, Line] = {}
        self._network = network
        self._owner = owner
        self._host = host

    def bind(self, name: str, host: str, port: int, what: str, setting: str) -> tuple[Line, int]:
        """Listen; whoever listened there before is gone."""
        port = {"init": 7300, "alloc": 7400}[name]
        return self._open(f"tcp://{self._host}:{port}", None), port

    def connect(self, kind: int, address: str, server_key: str | None) -> "Line | Proxy":
        """A connection of its own name."""
        if kind == zmq.PUSH:
            return Proxy(self._network)
        return self._open(f"{self._owner}/{next(self._network.names)}", address)

    def _open(self, name: str, peer: str | None) -> Line:
        line = self._network.lines[name] = self.own[name] = Line(self._network, next(self._network.names), name, peer)
        return line

    def close(self, line: Line) -> None:
        """Nobody hears it any more."""
        self.own.pop(line.name, None)
        if self._network.lines.get(line.name) is line:
            del self._network.lines[line.name]

    def close_all(self) -> None:
        """The process has died."""
        for line in list(self.own.values()):
            self.close(line)

    def received(self, line: Line) -> Iterator[Received]:
        """All that has arrived."""
        arrived, line.arrived = line.arrived, []
        return (Received(frames, None) for frames in arrived)

    def ready(self) -> set[Line]:
        """Those with messages."""
        return {line for line in self.own.values() if line.arrived}
