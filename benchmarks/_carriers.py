"""Both ends of every system that ``benchmarks/carriers.py`` compares, one process each.

Every round has different bytes. The receiver's memory is overwritten before it, and every byte is compared after it.
Time runs from the moment when the sender has the bytes to the moment when the receiver has them and knows it; all
systems report over the same kind of pipe. Both processes use one clock, CLOCK_MONOTONIC.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbelt.channels.factory import ChannelSettings, make_channel
from kvbelt.transfer.ports import Channel, Region

Memory = npt.NDArray[np.uint8]

#: What UCX, NIXL's transport, is told by the environment of the processes.
UCX_TLS = {"nixl-tcp": "tcp"}

SPOILT = 0xEE

#: As the belt: between two looks of a receiver at its channel while a peer may be writing.
PROGRESS_SECONDS = 1e-3


class Sender(Protocol):
    """Has the bytes, and sends them."""

    def send(self) -> None:
        """Returns once the receiver may be told."""


class Receiver(Protocol):
    """Has the memory, and hears of the end."""

    def receive(self, told: Connection) -> None:
        """Returns once the bytes are here."""


def channel_of(kind: str) -> Channel:
    if kind == "mooncake":
        return make_channel(ChannelSettings("mooncake"), "", "127.0.0.1")
    return make_channel(ChannelSettings(), f"{kind}-{os.getpid()}-{time.monotonic_ns()}", "127.0.0.1")


def region_of(memory: Memory) -> Region:
    """The whole memory."""
    return Region(memory.ctypes.data, memory.nbytes, "cpu")


class OneSidedSender:
    """Writes into the receiver's memory, one span a layer."""

    def __init__(self, kind: str, memory: Memory, peer: Any) -> None:
        metadata, there = peer
        self._polls = kind != "mooncake"
        self._channel = channel_of(kind)
        self._channel.open({"cpu"})
        self._channel.register(region_of(memory))
        self._agent = self._channel.add_peer(metadata)
        self._channel.connect(self._agent)
        layer = memory.nbytes // len(memory)
        self._spans = [(memory.ctypes.data + i * layer, there + i * layer, layer) for i in range(len(memory))]

    def send(self) -> None:
        """Returns once the receiver may be told."""
        write = self._channel.write(self._agent, self._spans, "cpu", "cpu")
        while not write.done():
            if not self._polls:
                time.sleep(50e-6)
        write.release()


class OneSidedReceiver:
    """Gives its memory to the sender."""

    def __init__(self, kind: str, memory: Memory) -> None:
        self._polls = kind != "mooncake"
        self._channel = channel_of(kind)
        self._channel.open({"cpu"})
        self._channel.register(region_of(memory))
        self.address = self._channel.local_metadata(), memory.ctypes.data

    def receive(self, told: Connection) -> None:
        """Returns once the bytes are here."""
        while self._polls and not told.poll(0):
            self._channel.progress()
        told.recv()


def redis_client(port: int) -> Any:
    """redis-py, with its parser in C."""
    import redis  # noqa: PLC0415 -- an extra of this benchmark

    return redis.Redis(port=port)


class RedisSender:
    """Sets one value a layer, in one pipeline, directly from its memory."""

    def __init__(self, memory: Memory, port: int) -> None:
        self._redis = redis_client(port)
        self._layers = [memoryview(layer) for layer in memory]

    def send(self) -> None:
        """Returns once the receiver may be told."""
        pipeline = self._redis.pipeline(transaction=False)
        for number, layer in enumerate(self._layers):
            pipeline.set(f"layer:{number}", layer)
        pipeline.execute()


class RedisReceiver:
    """Gets the values with one command, and copies each into its memory."""

    def __init__(self, memory: Memory, port: int) -> None:
        self._redis = redis_client(port)
        self._redis.ping()
        self._memory = memory
        self._keys = [f"layer:{number}" for number in range(len(memory))]
        self.address = None

    def receive(self, told: Connection) -> None:
        """Returns once the bytes are here."""
        told.recv()
        for layer, value in zip(self._memory, self._redis.mget(self._keys), strict=True):
            layer[:] = np.frombuffer(value, dtype=np.uint8)


def pattern(num_layers: int, layer_bytes: int) -> Memory:
    """The same random bytes in every process."""
    return np.random.default_rng(1).integers(0, 256, (num_layers, layer_bytes), dtype=np.uint8)


def run_receiver(kind: str, shape: tuple[int, int], port: int, control: Connection, told: Connection) -> None:
    """A receiving process: sends the address of its memory, then handles one round at a time."""
    _prepare(kind)
    memory = np.full(shape, SPOILT, dtype=np.uint8)
    base = pattern(*shape)
    end: OneSidedReceiver | RedisReceiver
    end = RedisReceiver(memory, port) if kind == "redis" else OneSidedReceiver(kind, memory)
    control.send(end.address)
    while (number := control.recv()) is not None:
        memory.fill(SPOILT)
        control.send("ready")
        end.receive(told)
        at = time.monotonic()
        control.send((at, bool(np.array_equal(memory, base ^ np.uint8(number % 256)))))
    _leave(control)


def run_sender(kind: str, shape: tuple[int, int], port: int, control: Connection, tell: Connection) -> None:
    """A sending process: gets the address, then sends one round at a time."""
    _prepare(kind)
    base = pattern(*shape)
    memory = base.copy()
    peer = control.recv()
    end: Sender = RedisSender(memory, port) if kind == "redis" else OneSidedSender(kind, memory, peer)
    control.send("ready")
    while (number := control.recv()) is not None:
        np.bitwise_xor(base, np.uint8(number % 256), out=memory)
        at = time.monotonic()
        end.send()
        tell.send("there")
        control.send(at)
    _leave(control)


def run_first_writes(kind: str, role: str, control: Connection, other: Connection) -> None:
    """Either process of the second measurement: new ends for every command ``(connect, pause)``."""
    _prepare(kind)
    memory = np.zeros(4096, dtype=np.uint8)
    kept: list[Channel] = []  # ending some of them takes a second, which need not be waited for
    while (order := control.recv()) is not None:
        connect, pause = order
        channel = channel_of(kind)
        channel.register(region_of(memory))
        kept.append(channel)
        if role == "receiver":
            other.send((channel.local_metadata(), memory.ctypes.data))
            _work(channel, lambda: other.poll(0))
            control.send(other.recv())
        else:
            metadata, there = other.recv()
            agent = channel.add_peer(metadata)
            if connect:
                channel.connect(agent)
            until = time.monotonic() + pause
            _work(channel, lambda until=until: time.monotonic() > until)  # type: ignore[misc]
            at = time.monotonic()
            write = channel.write(agent, [(memory.ctypes.data, there, 4096)], "cpu", "cpu")
            while not write.done():
                time.sleep(100e-6)
            other.send("there")
            control.send(1e3 * (time.monotonic() - at))
    _leave(control)


def _work(channel: Channel, until: Callable[[], bool]) -> None:
    """Make progress, as the belt does after a handshake."""
    while not until():
        channel.progress()
        time.sleep(PROGRESS_SECONDS)


def _prepare(kind: str) -> None:
    os.environ.pop("UCX_TLS", None)
    if kind in UCX_TLS:
        os.environ["UCX_TLS"] = UCX_TLS[kind]


def _leave(control: Connection) -> None:
    """Exit at once: nothing is in flight, and vendors take long to end."""
    with suppress(OSError):
        control.close()
    os._exit(0)
