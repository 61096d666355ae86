"""What the proxy knows of a worker: where it is, what it does, how it is.

An endpoint's address and role are settings; the rest is what the worker last said of itself, as one frozen
report, so that a choice never mixes two moments.
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


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own count of its work."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0


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
    receiver: ReceiverAddress | None = None


NOT_ASKED = Report(Health.UNKNOWN, "no health check has ended yet")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One worker at one moment."""

    name: str  #: ``host:port``
    role: Role  #: what it is configured for
    report: Report = NOT_ASKED

    @property
    def ready(self) -> bool:
        """Whether it takes requests in its role."""
        return self.report.health is Health.READY
