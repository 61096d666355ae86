"""What a process says of itself to whoever looks for a fault: ``GET /kvbelt/about``.

Facts only, and none of them secret: what is wrong with them is for the reader to judge (``kvbelt doctor``). Fields that
a reader does not know are ignored, and those that an older process does not say have defaults.
"""

import re
from typing import Literal

import msgspec

from kvbelt.wire.handshake import Compatibility
from kvbelt.wire.json_body import JsonDecoder


class Machine(msgspec.Struct, frozen=True):
    """Where a process runs. Two processes reach each other's memory within one machine and network namespace."""

    hostname: str = ""
    boot_id: str = ""  #: the kernel's; empty: could not be read
    network: str = ""  #: the network namespace
    pid: int = 0


class Road(msgspec.Struct, frozen=True):
    """What the carrier has chosen for one kind of operation, as it says itself."""

    scope: str  #: ``"intra-node"`` or ``"inter-node"``, in the carrier's words; empty: to everybody
    operation: Literal["write", "read"]
    memory: str  #: ``"host"`` or ``"cuda"``, of the side that acts
    transport: str  #: ``"cma/memory"``, ``"cuda_ipc/cuda"``, ``"52% on tcp/lo and 48% on tcp/eth0"``: of large messages

    @property
    def over_tcp(self) -> bool:
        """Whether it is nothing but TCP."""
        ways = re.findall(r"(\w+)/", self.transport)
        return bool(ways) and set(ways) == {"tcp"}


class Link(msgspec.Struct, frozen=True):
    """What has moved to one receiver since it is connected."""

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
    """One process."""

    role: str  #: ``prefill``, ``decode``, ``both``, ``proxy``
    engine: str = ""  #: ``embedded`` or ``vllm``; empty: none
    kvbelt: str = ""
    python: str = ""
    packages: dict[str, str] = {}  #: versions of what matters to the other side
    env: dict[str, str] = {}  #: of those variables that change how KV travels; unset ones are missing
    machine: Machine = Machine()
    unix_time: float = 0.0  #: when this was said
    device: str = ""  #: of the model: ``cpu`` or ``cuda:0``
    buffer_device: str = ""  #: of the staging memory
    buffer_bytes: int = 0
    bytes_per_token: int = 0  #: of KV, all layers
    max_model_len: int | None = None
    compatibility: Compatibility | None = None  #: what the handshake compares
    backends: list[str] = []  #: of the carrier
    plugins: list[str] = []  #: that the carrier could load
    roads: list[Road] = []  #: empty: nothing has moved yet, or the carrier does not say
    links: list[Link] = []
    complaints: list[str] = []  #: the carrier's own warnings and errors, the last ones


_decoder: JsonDecoder[About] = JsonDecoder(About)


def parse(body: bytes) -> About:
    """What a process has answered.

    Raises:
        ValueError: it is something else.
    """
    return _decoder.decode(body)
