"""What a pair of short-lived processes measured of NIXL (``pair.py``)."""

import msgspec

from kvbelt.wire.about import Road


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Between two processes of this host; medians."""

    device: str  #: of the memory on both sides, as ``cpu`` or ``cuda:0 to cuda:1``
    num_bytes: int = 0  #: of one large transfer
    write_gb_per_second: float = 0.0
    read_gb_per_second: float = 0.0
    write_us: float = 0.0  #: of a small one, posted to done
    read_us: float = 0.0
    backends: list[str] = []
    plugins: list[str] = []
    resources: list[str] = []  #: transports and devices that UCX could use, as ``cma/memory``
    roads: list[Road] = []  #: what it has chosen
    complaints: list[str] = []  #: UCX's own warnings and errors
    error: str = ""  #: why nothing was measured
