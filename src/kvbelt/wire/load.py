"""What a belt tells about itself, for ``/metrics`` and ``/health``."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sum:
    """A running sum, as a Prometheus summary has it."""

    count: int = 0
    total: float = 0.0

    def plus(self, value: float) -> "Sum":
        """With one more."""
        return Sum(self.count + 1, self.total + value)


@dataclass(frozen=True, slots=True)
class BeltSnapshot:
    """One consistent look, at most a turn of the belt old. All counters run since the start."""

    # The receiving side.
    receive_bytes: int  #: size of the receive buffer; 0: this process receives nothing
    overflow_bytes: int  #: size of the overflow buffer; 0: there is none
    overflow_bytes_used: int
    bytes_reserved: int  #: granted, being written
    bytes_committed: int  #: complete, not yet released by a reader
    bytes_quarantined: int  #: ended, but the writer has not acknowledged and is not known dead
    arrivals: Mapping[str, int]  #: transfers now in each receiver state (``"queued"``, ``"reserved"``, ...)
    received_total: Mapping[str, int]  #: ended transfers by reason (``"done"``, ``"cancelled"``, ``"lease"``, ...)
    received_bytes_total: int  #: that came and were made visible
    reused_bytes_total: int  #: that did not have to come, because this process's engine had them
    # The sending side.
    staging_bytes: int
    staging_bytes_used: int
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
