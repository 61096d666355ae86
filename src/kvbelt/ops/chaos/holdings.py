"""What a worker holds, from its own ``/health``: at the end of the load nothing may be left. Pure."""

from dataclasses import dataclass

import msgspec


class _Load(msgspec.Struct, frozen=True):
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0


class _Belt(msgspec.Struct, frozen=True):
    receive_bytes: int = 0
    bytes_reserved: int = 0
    bytes_committed: int = 0
    bytes_quarantined: int = 0
    overflow_bytes_used: int = 0
    staging_bytes_used: int = 0
    arrivals: dict[str, int] = {}
    sends: dict[str, int] = {}
    refused_total: dict[str, dict[str, int]] = {}


class _Health(msgspec.Struct, frozen=True):
    state: str = ""
    load: _Load = _Load()
    belt: _Belt | None = None


_decoder = msgspec.json.Decoder(_Health)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one worker holds at one moment."""

    state: str  #: of the worker; anything but ``ready`` is no answer to rely on
    staging_bytes: int = 0  #: of both sides of the belt, without what is quarantined
    quarantined_bytes: int = 0
    blocks: int = 0  #: of the engine, that neither are free nor only cached
    requests: int = 0  #: running and waiting
    transfers: int = 0  #: open ones, of both sides
    queued: int = 0  #: transfers that wait for room in the receive buffer
    refused: int = 0  #: messages and peers, ever

    @property
    def nothing(self) -> bool:
        """Whether it serves and holds nothing."""
        held = (self.staging_bytes, self.quarantined_bytes, self.blocks, self.requests, self.transfers)
        return self.state == "ready" and not any(held)

    def __str__(self) -> str:
        """What there is, in words."""
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


def holdings_of(health: bytes) -> Holdings:
    """From the body of a worker's ``/health``.

    Raises:
        ValueError: it is not what a worker of ours answers.
    """
    said = _decoder.decode(health)
    belt, load = said.belt or _Belt(), said.load
    return Holdings(
        state=said.state,
        staging_bytes=belt.bytes_reserved + belt.bytes_committed + belt.overflow_bytes_used + belt.staging_bytes_used,
        quarantined_bytes=belt.bytes_quarantined,
        blocks=load.blocks_total - load.blocks_free,
        requests=load.running + load.waiting,
        transfers=sum(belt.arrivals.values()) + sum(belt.sends.values()),
        queued=belt.arrivals.get("queued", 0),
        refused=sum(count for reasons in belt.refused_total.values() for count in reasons.values()),
    )
