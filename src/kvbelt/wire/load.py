"""How busy a worker is, and what its belt holds and has counted: parts of ``/health``."""

from collections.abc import Mapping

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    running: int  #: requests
    waiting: int  #: requests
    blocks_total: int  #: of KV
    blocks_free: int  #: cached ones included
    blocks_cached: int


NO_LOAD = Load(running=0, waiting=0, blocks_total=0, blocks_free=0, blocks_cached=0)


class Buffers(msgspec.Struct, frozen=True, kw_only=True):
    """A belt's memory, in bytes. A worker that receives nothing has no receive buffer."""

    receive_bytes: int  #: size of the receive buffer
    bytes_reserved: int  #: granted, being written
    bytes_committed: int  #: complete, not yet released by the consumer
    bytes_quarantined: int  #: ended, but the sender has not acknowledged it and is not known dead
    overflow_bytes: int  #: size of the overflow buffer; 0: there is none
    overflow_bytes_used: int
    staging_bytes: int  #: size of the sending side's buffer; 0: this worker sends nothing
    staging_bytes_used: int


class Sum(msgspec.Struct, frozen=True):
    """A running sum, as a Prometheus summary has it."""

    count: int = 0
    total: float = 0.0

    def plus(self, value: float) -> "Sum":
        return Sum(self.count + 1, self.total + value)


class BeltSnapshot(Buffers, frozen=True, kw_only=True):
    """One consistent look at a belt, at most a turn of its thread old. All counters run since the start."""

    # The receiving side.
    arrivals: Mapping[str, int]  #: transfers now in each receiver state (``"queued"``, ``"reserved"``, ...)
    received_total: Mapping[str, int]  #: ended transfers by reason (``"done"``, ``"cancelled"``, ``"lease"``, ...)
    received_bytes_total: int  #: that came and were made visible
    reused_bytes_total: int  #: that did not have to come, because this process's engine had them
    # The sending side.
    sends: Mapping[str, int]  #: transfers now in each sender state
    sent_total: Mapping[str, int]  #: ended transfers by reason
    sent_bytes_total: int  #: bytes of transfers that were done
    writes_total: int  #: writes posted
    write_seconds: Sum  #: first write posted to last completed, of transfers that were done
    exposed_seconds: Sum  #: end of the prompt's computation to the acknowledged commit
    # Both.
    peers: int  #: receivers this process is connected to
    mechanism: str  #: of every control socket: ``"CURVE"`` or ``"NULL"``
    #: Messages and peers refused, by socket (``"init"``, ``"alloc"``) and reason (``"unknown_key"``, ``"malformed"``)
    refused_total: Mapping[str, Mapping[str, int]]
