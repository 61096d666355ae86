"""Mooncake's TransferEngine: TCP, or RDMA where the host has it.

What was learnt about it (docs/dependencies.md says from what):

- Opening the connection to a peer that has stopped takes a minute, in which one engine does nothing else. So each peer
  has an engine of its own, and a thread opens it; afterwards submitting and asking never block, not even when the
  network is cut.
- Ending an engine takes up to a second, in which this process's interpreter stands still. So engines of peers that
  are gone are kept for the next ones, and end with the channel.
- Over TCP a write is done when the peer has said that its bytes are in place (0.3.13 and later, without
  ``MC_TCP_PROTO=1``); it cannot be recalled, and is in flight for as long as the peer is stopped. A killed peer is
  reported within milliseconds.
- An engine asks nobody for a key, and listens on every interface. So only memory that peers are to write is
  registered with the one that they reach, and the others have none over TCP.
"""

import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Literal

import msgspec

from kvbelt.channels.choice import Choice
from kvbelt.channels.mooncake_link import Engine, Link, MooncakeWrite, Peer
from kvbelt.errors import ChannelError

#: Packages that carry the engine. The first is for hosts without GPUs.
PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "mooncake-transfer-engine-cuda13")

#: Earlier ones may report a write as done while its bytes are still on their way.
OLDEST = (0, 3, 13)

#: Read by the engine for each write and each connection. A write that waits for a stopped peer must not be given up:
#: what lies in the peer's socket would be written when it wakes up, wherever else this memory is used by then.
_ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "86400",
    "MC_TCP_STATUS_TIMEOUT_SEC": "86400",
}

#: How long a peer may take to answer the first read over a new connection.
OPEN_SECONDS = 10.0

Protocol = Literal["tcp", "rdma"]


class MooncakeChannel:
    """``transfer.ports.Channel`` over Mooncake.

    Args:
        host: this host, as peers reach it.
        protocol: how bytes travel.
        device: RDMA devices to use, as ``mlx5_0,mlx5_1``; empty: all of the host.
        prepare: called once on the thread that uses the channel, before the vendor is loaded.
    """

    name = "mooncake"

    def __init__(
        self, host: str, protocol: Protocol = "tcp", device: str = "", prepare: Callable[[], None] | None = None
    ) -> None:
        self._host = host
        self._protocol: Protocol = protocol
        self._device = device
        self._prepare = prepare
        self._regions: list[Any] = []
        self._home: _Engine | None = None  # the one that peers write through
        self._idle: list[Engine] = []
        self._links: dict[str, Link] = {}
        self._leaving: list[Link] = []  # to peers that were removed, with writes in flight
        self.backends: tuple[str, ...] = (protocol,)
        self.plugins: tuple[str, ...] = ()

    @staticmethod
    def complaints() -> list[str]:
        """Its warnings go to standard error by themselves."""
        return []

    def choices(self) -> tuple[Choice, ...]:
        """What was asked for: Mooncake does not choose."""
        memories = {"host" if region.device == "cpu" else region.device for region in self._regions}
        return tuple(Choice("", "write", memory, self._protocol) for memory in sorted(memories))

    def register(self, region: Any) -> None:
        """Make a region reachable.

        Raises:
            ChannelError: Mooncake is not installed or too old, or the host has no such device.
        """
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        vendor = _load(self._protocol)
        if region.device not in ("cpu", "cuda"):
            raise ChannelError(f"device {region.device!r}: mooncake moves memory of cpu and cuda devices here")
        if region.device == "cuda" and not vendor.SUPPORT_CUDA:
            raise ChannelError(f"{PACKAGES[0]} moves no CUDA memory; install {PACKAGES[1]} in its place")
        if self._protocol == "rdma" and not _rdma_devices(vendor, self._device):
            named = f" called {self._device}" if self._device else ""
            raise ChannelError(f"mooncake_protocol is rdma, and this host has no RDMA device{named}; use tcp")
        self._regions.append(region)

    def local_metadata(self) -> bytes:
        """What a peer needs to reach this process's regions."""
        if self._home is None:
            self._home = self._make_engine()
            self._home.register(self._regions)
        regions = [(region.address, region.num_bytes) for region in self._regions]
        return msgspec.json.encode(Peer(self._protocol, self._home.session, self._home.life, regions))

    def add_peer(self, metadata: bytes) -> str:
        """Learn a peer. Returns its agent name.

        Raises:
            ChannelError: the metadata is not Mooncake's, or of another protocol.
        """
        try:
            there = msgspec.json.decode(metadata, type=Peer)
        except msgspec.DecodeError as error:
            raise ChannelError(f"this is not a mooncake peer's metadata: {error}") from None
        if there.protocol != self._protocol:
            raise ChannelError(f"mooncake_protocol is {self._protocol} here and {there.protocol} there")
        agent = f"{there.session}/{there.life}"
        if agent not in self._links:
            self._links[agent] = Link(there, self._take_idle, self._make_sender)
        return agent

    def connect(self, agent: str) -> None:
        """Open the connection on a thread of its own: the engine's handshake, and a read of one byte.

        Raises:
            ChannelError: the peer is not known.
        """
        self._link(agent).open()

    def remove_peer(self, agent: str) -> None:
        """Forget a peer. What waits is aborted; what is in flight ends by itself, and is in flight until then."""
        link = self._links.pop(agent, None)
        if link is not None:
            link.abort(f"peer {agent} was removed")
            self._leaving.append(link)
        self._tidy()

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> MooncakeWrite:
        """Post one write of ``(local address, remote address, bytes)`` spans.

        Raises:
            ChannelError: the peer is unknown, a span lies outside registered memory, or too much waits.
        """
        link = self._link(agent)
        here = [(region.address, region.num_bytes) for region in self._regions]
        for local, remote, num_bytes in spans:
            if not _holds(here, local, num_bytes):
                raise ChannelError(f"{num_bytes} bytes of {device} memory at {local:#x} are not registered here")
            if not _holds(link.there.regions, remote, num_bytes):
                raise ChannelError(f"{num_bytes} bytes of {peer_device} memory at {remote:#x} are not registered there")
        return link.write(spans)

    def progress(self) -> None:
        """Mooncake works on its own threads; here what waits is handed to it."""
        for link in (*self._links.values(), *self._leaving):
            link.step()
        self._tidy()

    def close(self) -> None:
        """End every engine, and with it whatever is in flight, so that memory may be freed. Idempotent."""
        engines = [link.give_up("the channel was closed") for link in (*self._links.values(), *self._leaving)]
        self._links.clear()
        self._leaving.clear()
        home, self._home = self._home, None
        for engine in (home, *engines, *self._idle):
            if engine is not None:
                engine.end()
        self._idle.clear()
        self._regions.clear()

    def _link(self, agent: str) -> Link:
        try:
            return self._links[agent]
        except KeyError:
            raise ChannelError(f"peer {agent!r} is not known") from None

    def _make_engine(self) -> "_Engine":
        return _Engine(_load(self._protocol), self._host, self._protocol, self._device)

    def _make_sender(self) -> "_Engine":
        engine = self._make_engine()
        if self._protocol == "rdma":
            engine.register(self._regions)
        return engine

    def _take_idle(self, there: Peer) -> Engine | None:
        """One that nobody uses and that knows no other life at this address: an engine remembers what it met there."""
        for engine in self._idle:
            if engine.known.get(there.session, there.life) == there.life:
                self._idle.remove(engine)
                return engine
        return None

    def _tidy(self) -> None:
        for link in [link for link in self._leaving if link.quiet]:
            self._leaving.remove(link)
            engine = link.give_up("the peer was removed")
            if engine is not None:
                self._idle.append(engine)


class _Engine:
    """One TransferEngine."""

    def __init__(self, vendor: Any, host: str, protocol: Protocol, device: str) -> None:
        self._vendor = vendor.TransferEngine()
        # An IPv6 address would be taken to end in a port.
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        if self._vendor.initialize(name, "P2PHANDSHAKE", protocol, device) != 0:
            raise ChannelError(f"mooncake could not start with protocol {protocol} on {host}")
        self.session = f"{name}:{self._vendor.get_rpc_port()}"
        self.life = os.urandom(8).hex()
        self.known: dict[str, str] = {}  #: the life of each session that it remembers
        self._scratch = ctypes.create_string_buffer(8)
        self._protocol = protocol

    def register(self, regions: Sequence[Any]) -> None:
        """Make memory known.

        Raises:
            ChannelError: it cannot be registered.
        """
        for region in regions:
            if self._vendor.register_memory(region.address, region.num_bytes) != 0:
                raise ChannelError(f"mooncake could not register {region.num_bytes} bytes of {region.device} memory")

    def read(self, there: Peer) -> bool:
        """Read a byte of the peer's first region, which opens everything. Blocks; the interpreter goes on."""
        self.known[there.session] = there.life
        if not there.regions:
            return False
        local = ctypes.addressof(self._scratch)
        if self._protocol == "rdma" and self._vendor.register_memory(local, len(self._scratch)) != 0:
            return False
        batch = self._vendor.batch_transfer_async_read(there.session, [local], [there.regions[0][0]], [1])
        give_up = time.monotonic() + OPEN_SECONDS
        while _is_batch(batch) and time.monotonic() < give_up:
            state = self.state_of(batch)
            if state is not None:
                return state
            time.sleep(1e-3)
        return False

    def submit(self, session: str, local: int, remote: int, num_bytes: int) -> int | None:
        """Post one span. Returns its number; None: it was not taken."""
        batch: int = self._vendor.transfer_submit_write(session, local, remote, num_bytes)
        return batch if _is_batch(batch) else None

    def state_of(self, batch: int) -> bool | None:
        """Whether a span has landed; None: it is in flight. Asked no more once it has ended."""
        status: int = self._vendor.transfer_check_status(batch)
        return {1: True, -1: False}.get(status)

    def end(self) -> None:
        """Close its connections. Takes up to a second, in which this process's interpreter stands still."""
        self._vendor = None


def _load(protocol: Protocol) -> Any:
    """Mooncake's module, with its environment set before its first thread reads it.

    Raises:
        ChannelError: it is not installed, too old, or told to do without what is needed.
    """
    if os.environ.get("MC_TCP_PROTO") == "1":
        raise ChannelError("MC_TCP_PROTO=1 has mooncake report writes as done that have not arrived; unset it")
    if protocol == "tcp":
        os.environ.setdefault("MC_FORCE_TCP", "1")  # it would take an RDMA device that it finds
    elif "MC_FORCE_TCP" in os.environ:
        raise ChannelError("mooncake_protocol is rdma, and MC_FORCE_TCP is set; unset it")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake import engine  # noqa: PLC0415 -- only if used
    except ImportError as error:
        raise ChannelError(
            f"transfer_channel mooncake needs the package {PACKAGES[0]} (with GPUs: {PACKAGES[1]}) and the libraries "
            f"libibverbs1 and librdmacm1: {error}"
        ) from error
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ChannelError(f"{package} is {version}; install {oldest} or later, which says when bytes have arrived")
    return engine


def _rdma_devices(vendor: Any, device: str) -> bool:
    topology: dict[str, list[list[str]]] = msgspec.json.decode(vendor.TransferEngine().get_local_topology(device))
    return any(names for place in topology.values() for names in place)


def _is_batch(number: int) -> bool:
    """What is none is 0, or -1 without a sign."""
    return number not in (0, (1 << 64) - 1)


def _holds(regions: Sequence[tuple[int, int]], address: int, num_bytes: int) -> bool:
    return any(start <= address and address + num_bytes <= start + size for start, size in regions)
