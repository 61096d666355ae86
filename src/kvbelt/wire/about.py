"""``GET /kvbelt/about``: facts about a process, for ``kvbelt doctor``. None is secret; the doctor judges them."""

import re
from typing import Literal

import msgspec

from kvbelt.wire.handshake import Compatibility
from kvbelt.wire.json_body import JsonMessage


class Machine(msgspec.Struct, frozen=True):
    """Where a process runs. Two processes reach each other's memory within one machine and network namespace."""

    hostname: str
    boot_id: str  #: the kernel's; empty: could not be read
    network: str  #: the network namespace
    pid: int


class TransportChoice(msgspec.Struct, frozen=True):
    """The transport that the channel has chosen for large messages of one kind, in the vendor's words."""

    scope: str  #: ``"intra-node"`` or ``"inter-node"``; empty: to every peer
    operation: Literal["write", "read"]
    memory: str  #: ``"host"`` or ``"cuda"``, of the side that acts
    transport: str  #: ``"cma/memory"``, ``"cuda_ipc/cuda"``, ``"52% on tcp/lo and 48% on tcp/eth0"``

    @property
    def over_tcp(self) -> bool:
        ways = re.findall(r"(\w+)/", self.transport)
        return bool(ways) and set(ways) == {"tcp"}


class LinkTotals(msgspec.Struct, frozen=True):
    """What has moved to one receiver since it was connected."""

    engine_id: str
    writes: int
    num_bytes: int  #: that have landed
    busy_seconds: float  #: in which at least one write was in flight
    bytes_in_flight: int = 0

    @property
    def gb_per_second(self) -> float | None:
        """While it was busy; None: it never was."""
        return self.num_bytes / self.busy_seconds / 1e9 if self.busy_seconds > 0 else None


class About(msgspec.Struct, frozen=True, kw_only=True):
    """One process. Fields with a default are those of a model or a belt, which not every process has."""

    role: str  #: ``prefill``, ``decode``, ``both``, ``proxy``
    engine: str  #: ``embedded`` or ``vllm``; empty: none
    kvbelt: str
    python: str
    packages: dict[str, str]  #: versions of what matters to the other side
    env: dict[str, str]  #: of those variables that change how KV travels; unset ones are missing
    machine: Machine
    unix_time: float  #: when this was said
    device: str = ""  #: of the model: ``cpu``, or ``cuda:`` and the GPU's number on its host, or its UUID
    buffer_device: str = ""  #: of the staging memory
    buffer_bytes: int = 0
    bytes_per_token: int = 0  #: of KV, all layers
    max_model_len: int | None = None
    compatibility: Compatibility | None = None  #: what the handshake compares
    backends: list[str] = []  #: of the channel
    plugins: list[str] = []  #: that the channel could load
    #: Empty: nothing has moved yet, or the channel does not say.
    transports: list[TransportChoice] = msgspec.field(default_factory=list, name="roads")
    links: list[LinkTotals] = []
    complaints: list[str] = []  #: the channel's own warnings and errors, the last ones


ABOUT = JsonMessage(About, "/kvbelt/about")
