"""The result of nixl_pair.py; importing it loads no NIXL."""

import msgspec

from kvbelt.wire.about import TransportChoice


class NixlMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest transfers between two processes of this host."""

    device: str  #: the memory on both sides: ``cpu``, or ``cuda:0 to cuda:1``
    num_bytes: int = 0  #: of one large transfer
    write_gb_per_second: float = 0.0
    read_gb_per_second: float = 0.0
    write_us: float = 0.0  #: of a small transfer, from posted to done
    read_us: float = 0.0
    backends: list[str] = []
    plugins: list[str] = []
    resources: list[str] = []  #: transports and devices available to UCX, as ``cma/memory``
    transports: list[TransportChoice] = []  #: the transports that UCX chose
    complaints: list[str] = []  #: UCX's own warnings and errors
    error: str = ""  #: why nothing was measured
