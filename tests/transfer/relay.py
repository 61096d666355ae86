"""A network that can be ill: between two belts' real sockets, it loses, repeats and delays their frames."""

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Self

import msgspec
import zmq

from kvbelt.wire.handoff import ReceiverAddress

#: Between two looks at what is due and who wants what.
LOOK_MS = 5


@dataclass(frozen=True)
class Weather:
    """The random fate of a frame."""

    lose: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0  #: chance of being late, and so of being overtaken
    late_seconds: float = 0.1


WELL, ROUGH, CUT = Weather(), Weather(0.15, 0.15, 0.3), Weather(lose=1.0)


@dataclass(eq=False)
class _Port:
    """One port of the receiver, and one connection to it for every one that is made to the relay."""

    listening: "zmq.Socket[bytes]"
    target: str
    by_route: dict[bytes, "zmq.Socket[bytes]"] = field(default_factory=dict)
    routes: dict["zmq.Socket[bytes]", bytes] = field(default_factory=dict)


class Relay:
    """Stands before a receiver. Senders get its ``address``."""

    def __init__(self, receiver: ReceiverAddress, seed: int) -> None:
        self.weather = WELL
        self.passed = 0
        self.harmed = 0
        self._rng = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._ports = [self._listen(port) for port in (receiver.init_port, receiver.alloc_port)]
        self._late: list[tuple[float, zmq.Socket[bytes], list[bytes]]] = []
        init, alloc = (int(port.listening.last_endpoint.rpartition(b":")[2]) for port in self._ports)
        self.ports = {"init_port": init, "alloc_port": alloc}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def address(self, receiver: ReceiverAddress) -> ReceiverAddress:
        """The receiver's address through this relay."""
        return msgspec.structs.replace(receiver, **self.ports)

    def _listen(self, port: int) -> _Port:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind("tcp://127.0.0.1:*")
        self._poller.register(socket, zmq.POLLIN)
        return _Port(socket, f"tcp://127.0.0.1:{port}")

    def _run(self) -> None:
        while not self._ending.is_set():
            for socket, _ in self._poller.poll(LOOK_MS):
                self._take(socket)
            now = time.monotonic()
            for entry in [entry for entry in self._late if entry[0] <= now]:
                self._late.remove(entry)
                self._send(entry[1], entry[2])
        self._context.destroy(linger=0)

    def _take(self, socket: "zmq.Socket[bytes]") -> None:
        frames = socket.recv_multipart()
        port = next(port for port in self._ports if socket is port.listening or socket in port.routes)
        if socket is port.listening:
            self._pass_on(self._connection(port, frames[0]), frames[1:])
        else:
            self._pass_on(port.listening, [port.routes[socket], *frames])

    def _connection(self, port: _Port, route: bytes) -> "zmq.Socket[bytes]":
        if route not in port.by_route:
            socket = port.by_route[route] = self._context.socket(zmq.DEALER)
            socket.linger = 0
            socket.reconnect_ivl = 20
            socket.connect(port.target)
            port.routes[socket] = route
            self._poller.register(socket, zmq.POLLIN)
        return port.by_route[route]

    def _pass_on(self, to: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
        weather, chance = self.weather, self._rng.random
        self.passed += 1
        if chance() < weather.lose:
            self.harmed += 1
            return
        for _ in range(2 if chance() < weather.repeat else 1):
            if chance() < weather.delay:
                self._late.append((time.monotonic() + chance() * weather.late_seconds, to, frames))
                self.harmed += 1
            else:
                self._send(to, frames)

    @staticmethod
    def _send(to: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
        try:
            to.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # no listener: the frame is lost

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End it."""
        self._ending.set()
        self._thread.join()
