"""A channel within one process, for tests: memmove, and faults on demand.

Every channel of one ``MemoryNetwork`` reaches every other. A fault applies to all writes posted to an agent
from then on, until it is taken away.
"""

import ctypes
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any

from kvbelt.errors import ChannelError


class Fault(StrEnum):
    """What may go wrong with a write."""

    STALL = "stall"  # it stays in flight until the fault is taken away, then it is done late
    FAIL = "fail"  # it fails
    DROP = "drop"  # it is reported done, and nothing has arrived


class MemoryNetwork:
    """The channels of one process, by agent."""

    def __init__(self) -> None:
        self.agents: dict[str, MemoryChannel] = {}
        self.faults: dict[str, Fault] = {}


class MemoryChannel:
    """``transfer.ports.Channel`` within one process."""

    name = "memory"

    def __init__(self, agent: str, network: MemoryNetwork) -> None:
        self._agent = agent
        self._network = network
        self._regions: list[tuple[int, int]] = []
        self._peers: set[str] = set()
        self._in_flight: list[MemoryWrite] = []
        network.agents[agent] = self

    def open(self, devices: Collection[str]) -> None:
        """Nothing to load."""

    def register(self, region: Any) -> None:
        """Make a region reachable."""
        self._regions.append((region.address, region.num_bytes))

    def local_metadata(self) -> bytes:
        """The agent's name."""
        return self._agent.encode()

    def add_peer(self, metadata: bytes) -> str:
        """Learn a peer.

        Raises:
            ChannelError: there is no such agent.
        """
        agent = metadata.decode(errors="replace")
        if agent not in self._network.agents:
            raise ChannelError(f"there is no agent {agent!r} in this process")
        self._peers.add(agent)
        return agent

    def connect(self, agent: str) -> None:
        """Nothing to open.

        Raises:
            ChannelError: the peer is not known.
        """
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")

    def remove_peer(self, agent: str) -> None:
        """Forget a peer; writes in flight to it never land."""
        self._peers.discard(agent)
        for write in self._in_flight:
            if write.agent == agent:
                write.error = f"peer {agent} was removed"
        self._in_flight = [write for write in self._in_flight if write.agent != agent]

    def write(
        self,
        agent: str,
        spans: Sequence[tuple[int, int, int]],
        device: str,
        peer_device: str,
    ) -> "MemoryWrite":
        """Copy, or do what the fault says.

        Raises:
            ChannelError: the peer is unknown, or a span lies outside registered memory.
        """
        self._check(agent, spans)
        return self._post(MemoryWrite(self._network, agent, tuple(spans)))

    def read(
        self,
        agent: str,
        spans: Sequence[tuple[int, int, int]],
        device: str,
        peer_device: str,
    ) -> "MemoryWrite":
        """Likewise, from the peer's memory to ours.

        Raises:
            ChannelError: as of a write.
        """
        self._check(agent, spans)
        return self._post(MemoryWrite(self._network, agent, tuple((there, here, size) for here, there, size in spans)))

    def _check(self, agent: str, spans: Sequence[tuple[int, int, int]]) -> None:
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")
        peer = self._network.agents.get(agent)
        if peer is None:
            raise ChannelError(f"peer {agent!r} is gone")
        for local, remote, num_bytes in spans:
            if not self._holds(local, num_bytes) or not peer._holds(remote, num_bytes):
                raise ChannelError(f"{num_bytes} bytes between {local:#x} and {remote:#x} are not registered")

    def _post(self, write: "MemoryWrite") -> "MemoryWrite":
        if not write.try_land():
            self._in_flight.append(write)
        return write

    def progress(self) -> None:
        """Nothing: a copy needs none."""

    def close(self) -> None:
        """Make this agent unreachable."""
        self._network.agents.pop(self._agent, None)

    def _holds(self, address: int, num_bytes: int) -> bool:
        return any(start <= address and address + num_bytes <= start + size for start, size in self._regions)


class MemoryWrite:
    def __init__(self, network: MemoryNetwork, agent: str, spans: tuple[tuple[int, int, int], ...]) -> None:
        self.agent = agent
        self.error: str | None = None
        self._network = network
        self._spans = spans
        self._landed = False
        self._released = False

    def try_land(self) -> bool:
        """Land unless a fault prevents it. False: still in flight."""
        fault = self._network.faults.get(self.agent)
        if fault is Fault.STALL:
            return False
        if fault is Fault.FAIL:
            self.error = f"the write to {self.agent} failed"
        elif fault is not Fault.DROP:
            for local, remote, num_bytes in self._spans:
                ctypes.memmove(remote, local, num_bytes)
        self._landed = True
        return True

    def done(self) -> bool:
        """Whether it has completed.

        Raises:
            ChannelError: it failed.
        """
        if self.error is None and not self._landed and not self._released:
            self.try_land()
        if self.error is not None:
            raise ChannelError(self.error)
        return self._landed

    def release(self) -> None:
        """Forget the write; if it is in flight, it never lands."""
        self._released = True
