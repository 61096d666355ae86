"""What a worker holds, from its ``/health``. After the load it must hold nothing. Pure."""

from dataclasses import dataclass, replace

from kvbelt.wire.health import WorkerHealth
from kvbelt.wire.load import NO_LOAD


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one worker holds at one moment."""

    state: str  #: the worker's; the other fields count only if it is ``ready``
    staging_bytes: int = 0  #: on both sides of the belt, without quarantined bytes
    quarantined_bytes: int = 0
    blocks: int = 0  #: of the engine, neither free nor only cached
    requests: int = 0  #: running and waiting
    transfers: int = 0  #: open ones on both sides
    queued: int = 0  #: waiting for space in the receive buffer
    refused: int = 0  #: messages and peers since the start

    @property
    def nothing(self) -> bool:
        """Whether the worker serves and holds nothing."""
        held = (self.staging_bytes, self.quarantined_bytes, self.blocks, self.requests, self.transfers)
        return self.state == "ready" and not any(held)

    def __str__(self) -> str:
        if self.state != "ready":
            return self.state
        parts = [
            (self.staging_bytes, "bytes of staging"),
            (self.quarantined_bytes, "bytes in quarantine"),
            (self.blocks, "KV blocks"),
            (self.requests, "requests"),
            (self.transfers, "transfers"),
        ]
        return ", ".join(f"{count:,} {what}" for count, what in parts if count) or "nothing"


def holdings_of(health: WorkerHealth) -> Holdings:
    load, belt = health.load or NO_LOAD, health.belt
    holdings = Holdings(health.state, blocks=load.blocks_total - load.blocks_free, requests=load.running + load.waiting)
    if belt is None:
        return holdings
    return replace(
        holdings,
        staging_bytes=belt.bytes_reserved + belt.bytes_committed + belt.overflow_bytes_used + belt.staging_bytes_used,
        quarantined_bytes=belt.bytes_quarantined,
        transfers=sum(belt.arrivals.values()) + sum(belt.sends.values()),
        queued=belt.arrivals.get("queued", 0),
        refused=sum(count for reasons in belt.refused_total.values() for count in reasons.values()),
    )
