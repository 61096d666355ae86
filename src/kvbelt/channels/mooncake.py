"""Mooncake's TransferEngine: TCP, or RDMA where the host has it.

Observations (docs/dependencies.md has the evidence):

- Opening the connection to a stopped peer takes a minute, in which the engine does nothing else. So each peer has its
  own engine, which a thread opens. After that, submitting and polling never block, even if the network is cut.
- Ending an engine takes up to a second, in which the interpreter stands still. So the engines of removed peers are kept
  for new peers, and end with the channel.
- Over TCP a write is done once the peer has confirmed that its bytes are in place (0.3.13 and later, without
  ``MC_TCP_PROTO=1``). It cannot be recalled, and is in flight as long as the peer is stopped. A killed peer is reported
  within milliseconds.
- An engine requires no key, and listens on every interface. So only memory that peers may write is registered with the
  engine that they reach. Over TCP the other engines have no registered memory.
"""

import ctypes
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from typing import Any, Literal

import msgspec

from kvbelt.channels.choice import Choice
from kvbelt.channels.mooncake_link import Engine, Link, MooncakeWrite, Peer
from kvbelt.errors import ChannelError

#: Packages that contain the engine. The first is for hosts without GPUs.
PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "mooncake-transfer-engine-cuda13")

#: Earlier versions may report a write as done while its bytes are still on their way.
OLDEST = (0, 3, 13)

#: The engine reads these for each write and each connection. It must not give up a write to a stopped peer: the bytes
#: in the peer's socket are written when the peer wakes up, and its memory may serve another transfer by then.
_ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "86400",
    "MC_TCP_STATUS_TIMEOUT_SEC": "86400",
}

#: How long a peer may take to answer the first read over a new connection.
OPEN_SECONDS = 10.0

Protocol = Literal["tcp", "rdma"]


class MooncakeChannel:
    """``transfer.ports.Channel`` over Mooncake (see ``make_channel``)."""

    name = "mooncake"

    def __init__(
        self, host: str, protocol: Protocol = "tcp", device: str = "", prepare: Callable[[], None] | None = None
    ) -> None:
        self._host = host
        self._protocol: Protocol = protocol
        self._device = device
        self._prepare = prepare
        self._regions: list[Any] = []
        self._home: _Engine | None = None  # peers write through this one
        self._idle: list[Engine] = []
        self._links: dict[str, Link] = {}
        self._leaving: list[Link] = []  # to peers that were removed, with writes in flight
        self.backends: tuple[str, ...] = (protocol,)
        self.plugins: tuple[str, ...] = ()

    @staticmethod
    def complaints() -> list[str]:
        """None: Mooncake writes its warnings to standard error."""
        return []

    def choices(self) -> tuple[Choice, ...]:
        """The transport of the settings: Mooncake does not choose."""
        memories = {"host" if region.device == "cpu" else region.device for region in self._regions}
        return tuple(Choice("", "write", memory, self._protocol) for memory in sorted(memories))

    def open(self, devices: Collection[str]) -> None:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        vendor = _load(self._protocol)
        for device in devices:
            if device not in ("cpu", "cuda"):
                raise ChannelError(f"device {device!r}: mooncake moves memory of cpu and cuda devices here")
        if "cuda" in devices and not vendor.SUPPORT_CUDA:
            raise ChannelError(f"{PACKAGES[0]} moves no CUDA memory; install {PACKAGES[1]} in its place")
        if self._protocol == "rdma" and not _rdma_devices(vendor, self._device):
            named = f" called {self._device}" if self._device else ""
            raise ChannelError(f"mooncake_protocol is rdma, and this host has no RDMA device{named}; use tcp")

    def register(self, region: Any) -> None:
        self._regions.append(region)

    def local_metadata(self) -> bytes:
        if self._home is None:
            self._home = self._make_engine()
            self._home.register(self._regions)
        regions = [(region.address, region.num_bytes) for region in self._regions]
        return msgspec.json.encode(Peer(self._protocol, self._home.session, self._home.incarnation, regions))

    def add_peer(self, metadata: bytes) -> str:
        try:
            there = msgspec.json.decode(metadata, type=Peer)
        except msgspec.DecodeError as error:
            raise ChannelError(f"this is not a mooncake peer's metadata: {error}") from None
        if there.protocol != self._protocol:
            raise ChannelError(f"mooncake_protocol is {self._protocol} here and {there.protocol} there")
        agent = f"{there.session}/{there.incarnation}"
        if agent not in self._links:
            self._links[agent] = Link(there, self._take_idle, self._make_sender)
        return agent

    def connect(self, agent: str) -> None:
        """Open the connection on a new thread: the engine's handshake, and a read of one byte."""
        self._link(agent).open()

    def remove_peer(self, agent: str) -> None:
        """Forget a peer. Waiting writes are aborted; writes in flight stay so until they end by themselves."""
        link = self._links.pop(agent, None)
        if link is not None:
            link.abort(f"peer {agent} was removed")
            self._leaving.append(link)
        self._tidy()

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> MooncakeWrite:
        link = self._link(agent)
        here = [(region.address, region.num_bytes) for region in self._regions]
        for local, remote, num_bytes in spans:
            if not _holds(here, local, num_bytes):
                raise ChannelError(f"{num_bytes} bytes of {device} memory at {local:#x} are not registered here")
            if not _holds(link.there.regions, remote, num_bytes):
                raise ChannelError(f"{num_bytes} bytes of {peer_device} memory at {remote:#x} are not registered there")
        return link.write(spans)

    def progress(self) -> None:
        """Hand waiting writes to Mooncake, which works on its own threads."""
        for link in (*self._links.values(), *self._leaving):
            link.step()
        self._tidy()

    def close(self) -> None:
        """End every engine, and with it every write in flight, so that memory can be freed. Idempotent."""
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
        """An unused engine that has met no other incarnation at this address, because an engine remembers the first."""
        for engine in self._idle:
            if engine.known.get(there.session, there.incarnation) == there.incarnation:
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
    """Implements ``mooncake_link.Engine`` with one TransferEngine."""

    def __init__(self, vendor: Any, host: str, protocol: Protocol, device: str) -> None:
        self._vendor = vendor.TransferEngine()
        # Without brackets the end of an IPv6 address would be taken for a port.
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        if self._vendor.initialize(name, "P2PHANDSHAKE", protocol, device) != 0:
            raise ChannelError(f"mooncake could not start with protocol {protocol} on {host}")
        self.session = f"{name}:{self._vendor.get_rpc_port()}"
        self.incarnation = os.urandom(8).hex()
        self.known: dict[str, str] = {}
        self._scratch = ctypes.create_string_buffer(8)
        self._protocol = protocol

    def register(self, regions: Sequence[Any]) -> None:
        for region in regions:
            if self._vendor.register_memory(region.address, region.num_bytes) != 0:
                raise ChannelError(f"mooncake could not register {region.num_bytes} bytes of {region.device} memory")

    def read(self, there: Peer) -> bool:
        # Reading one byte opens everything. Other threads go on meanwhile.
        self.known[there.session] = there.incarnation
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
        batch: int = self._vendor.transfer_submit_write(session, local, remote, num_bytes)
        return batch if _is_batch(batch) else None

    def state_of(self, batch: int) -> bool | None:
        status: int = self._vendor.transfer_check_status(batch)
        return {1: True, -1: False}.get(status)

    def end(self) -> None:
        self._vendor = None


def _load(protocol: Protocol) -> Any:
    """Mooncake's module, with its environment set before its first thread reads it."""
    if os.environ.get("MC_TCP_PROTO") == "1":
        raise ChannelError("MC_TCP_PROTO=1 makes mooncake report writes as done before they arrive; unset it")
    if protocol == "tcp":
        os.environ.setdefault("MC_FORCE_TCP", "1")  # otherwise it would use an RDMA device if it finds one
    elif "MC_FORCE_TCP" in os.environ:
        raise ChannelError("mooncake_protocol is rdma, and MC_FORCE_TCP is set; unset it")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake import engine  # noqa: PLC0415 -- only if used
    except ImportError as error:
        raise ChannelError(
            "transfer_channel mooncake needs 'kvbelt[mooncake]' (with GPUs 'kvbelt[mooncake-cuda]') and the libraries "
            f"libibverbs1 and librdmacm1: {error}"
        ) from error
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ChannelError(
                f"{package} is {version}; install {oldest} or later, which reports when bytes have arrived"
            )
    return engine


def _rdma_devices(vendor: Any, device: str) -> bool:
    topology: dict[str, list[list[str]]] = msgspec.json.decode(vendor.TransferEngine().get_local_topology(device))
    return any(names for place in topology.values() for names in place)


def _is_batch(number: int) -> bool:
    # No batch is 0, or -1 as an unsigned number.
    return number not in (0, (1 << 64) - 1)


def _holds(regions: Sequence[tuple[int, int]], address: int, num_bytes: int) -> bool:
    return any(start <= address and address + num_bytes <= start + size for start, size in regions)
