"""What the proxy knows about a worker at one moment.

Address and role are settings, and an operator decides whether the worker is used. The rest is the worker's latest
report, frozen, so that a choice never mixes two moments.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.health import NO_DEFAULTS, AnswerDefaults, Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.load import NO_LOAD, Buffers, Load
from kvbelt.wire.steps import StepsNow


class Health(StrEnum):
    """A worker's health, as far as the proxy knows it."""

    UNKNOWN = "unknown"  #: not asked yet
    READY = "ready"
    UNREADY = "unready"  #: it answers, and takes no requests
    LOST = "lost"  #: it does not answer


class Standing(StrEnum):
    """Whether an operator wants a worker to be used."""

    ACTIVE = "active"
    DRAINING = "draining"  #: it finishes its requests, and gets no new ones
    LEAVING = "leaving"  #: likewise, and is removed afterwards


@dataclass(frozen=True, slots=True)
class Report:
    health: Health
    detail: str = ""  #: for people: why it is not ready
    silent: bool = False  #: it is lost because no answer came; its process may only stand still
    engine_id: EngineId | None = None
    model: str = ""
    role: Role | None = None
    max_model_len: int | None = None
    load: Load = NO_LOAD
    buffers: Buffers | None = None  #: None: it has no belt, or does not report it
    receiver: ReceiverAddress | None = None
    engine: str = ""  #: ``embedded`` or ``vllm``
    hash_seed: str | None = None  #: its PYTHONHASHSEED; None: it does not report it
    device: str = ""  #: ``cpu``, or ``cuda:`` and the GPU of its host; empty: it does not report it
    steps: StepsNow | None = None  #: as this incarnation said last; None: it has not said
    defaults: AnswerDefaults = NO_DEFAULTS


NOT_ASKED = Report(Health.UNKNOWN, "no health check has ended yet")


@dataclass(frozen=True, slots=True)
class Endpoint:
    name: str  #: ``host:port``
    role: Role  #: what it is configured for
    report: Report = NOT_ASKED
    standing: Standing = Standing.ACTIVE
    warming: bool = False  #: it is new, and its connections to the other role are still being made
    late: bool = False  #: its answer to the latest health check is overdue

    @property
    def ready(self) -> bool:
        return self.report.health is Health.READY and self.standing is Standing.ACTIVE

    @property
    def settled(self) -> bool:
        """Whether it is as good as any other ready worker."""
        return not self.warming and not self.late

    @property
    def state(self) -> str:
        """One word, for people."""
        if self.standing is not Standing.ACTIVE:
            return str(self.standing)
        return "warming" if self.warming and self.ready else str(self.report.health)

    @property
    def incarnation(self) -> str:
        """The name of this process: a worker that was restarted counts as another one."""
        return f"{self.name} {self.report.engine_id or ''}"
