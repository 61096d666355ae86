"""What the proxy knows of a worker: where it is, what it does, how it is.

An endpoint's address and role are settings, and an operator says whether it is to be used; the rest is what the
worker last said of itself, as one frozen report, so that a choice never mixes two moments.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId


class Role(StrEnum):
    """What a worker does. Values are those of ``/health``."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    def serves(self, wanted: "Role") -> bool:
        """Whether a worker of this role can be used as ``wanted``."""
        return self in (wanted, Role.BOTH)


class Health(StrEnum):
    """How a worker is, as far as is known."""

    UNKNOWN = "unknown"  #: not asked yet
    READY = "ready"
    UNREADY = "unready"  #: it answers, and says that it takes no requests
    LOST = "lost"  #: it does not answer


class Standing(StrEnum):
    """What an operator wants of a worker."""

    ACTIVE = "active"
    DRAINING = "draining"  #: it finishes what it has, and gets nothing new
    LEAVING = "leaving"  #: likewise, and is forgotten then


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own count of its work."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0


@dataclass(frozen=True, slots=True)
class Buffers:
    """A belt's memory, in bytes. A worker that receives nothing has no receive buffer."""

    receive_bytes: int = 0
    bytes_reserved: int = 0
    bytes_committed: int = 0
    bytes_quarantined: int = 0
    overflow_bytes: int = 0
    overflow_bytes_used: int = 0
    staging_bytes: int = 0
    staging_bytes_used: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What one health check found."""

    health: Health
    detail: str = ""  #: for people: why it is not ready
    engine_id: EngineId | None = None
    model: str = ""
    role: Role | None = None
    max_model_len: int | None = None
    load: Load = Load()
    buffers: Buffers | None = None  #: None: it has no belt, or does not tell
    receiver: ReceiverAddress | None = None
    engine: str = ""  #: ``embedded`` or ``vllm``
    hash_seed: str | None = None  #: its PYTHONHASHSEED; None: it does not say


NOT_ASKED = Report(Health.UNKNOWN, "no health check has ended yet")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One worker at one moment."""

    name: str  #: ``host:port``
    role: Role  #: what it is configured for
    report: Report = NOT_ASKED
    standing: Standing = Standing.ACTIVE
    #: Its connections to the other side are still being made, for the first time in its life.
    warming: bool = False
    late: bool = False  #: it has been asked for its health, and takes longer than it should

    @property
    def ready(self) -> bool:
        """Whether it takes new requests in its role."""
        return self.report.health is Health.READY and self.standing is Standing.ACTIVE

    @property
    def settled(self) -> bool:
        """Whether nothing speaks for taking another one that is ready, too."""
        return not self.warming and not self.late

    @property
    def state(self) -> str:
        """In one word, for people."""
        if self.standing is not Standing.ACTIVE:
            return str(self.standing)
        return "warming" if self.warming and self.ready else str(self.report.health)

    @property
    def life(self) -> str:
        """Names one life of it: a worker that was started again is another one to whoever has tried the first."""
        return f"{self.name} {self.report.engine_id or ''}"
