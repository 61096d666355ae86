"""What the doctor has seen of a running deployment. Frozen; the checks see nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec

from kvbelt.wire.about import About, Link
from kvbelt.wire.probe import Probed


@dataclass(frozen=True, slots=True)
class Sample:
    """A worker's load and belt at one moment."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    receive_bytes: int = 0  #: size of the receive buffer
    bytes_held: int = 0  #: of it in use, whatever for
    bytes_quarantined: int = 0
    queued: int = 0  #: transfers that wait for room in it
    sends_waiting: int = 0  #: transfers of a prefill worker's that were told to wait

    @classmethod
    def of(cls, health: Mapping[str, Any]) -> "Sample":
        """From the body of ``/health``; what is missing counts as 0."""
        load, belt = _mapping(health.get("load")), _mapping(health.get("belt"))
        states, sends = _mapping(belt.get("arrivals")), _mapping(belt.get("sends"))
        held = sum(_number(belt.get(f"bytes_{state}")) for state in ("reserved", "committed", "quarantined"))
        return cls(
            running=_number(load.get("running")),
            waiting=_number(load.get("waiting")),
            blocks_total=_number(load.get("blocks_total")),
            blocks_free=_number(load.get("blocks_free")),
            receive_bytes=_number(belt.get("receive_bytes")),
            bytes_held=held - _number(belt.get("overflow_bytes_used")),
            bytes_quarantined=_number(belt.get("bytes_quarantined")),
            queued=_number(states.get("queued")),
            sends_waiting=_number(sends.get("waiting")),
        )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker: what the proxy says of it, and what it says itself."""

    name: str  #: ``host:port``
    role: str
    state: str  #: the proxy's word: ``ready``, ``unready``, ``lost``, ``unknown``
    detail: str = ""  #: the proxy's
    standing: str = "active"
    model: str = ""
    in_flight: int = 0
    answer: str = ""  #: why it has not answered the doctor; empty: it has
    seconds: float | None = None  #: that it took to answer ``/health``, the median
    status: int | None = None
    engine_id: str = ""
    about: About | None = None  #: None: it does not say (a vLLM server without us, or an older kvbelt)
    samples: tuple[Sample, ...] = ()
    skew_seconds: float | None = None  #: its clock ahead of the doctor's
    skew_within: float = 0.0  #: how far that may be wrong

    @property
    def answers(self) -> bool:
        """Whether it answered the doctor at all."""
        return not self.answer

    @property
    def waiting(self) -> float:
        """Requests that wait in it, the median of the samples."""
        return median(sample.waiting for sample in self.samples) if self.samples else 0.0

    @property
    def running(self) -> float:
        """Requests that run in it, likewise."""
        return median(sample.running for sample in self.samples) if self.samples else 0.0

    def share(self, hit: "Any") -> float:
        """Of the samples, how many are so; 0 without any."""
        return sum(bool(hit(sample)) for sample in self.samples) / len(self.samples) if self.samples else 0.0


@dataclass(frozen=True, slots=True)
class ProbeSeen:
    """One prompt that the doctor has sent through a pair."""

    ok: bool  #: the KV came and was used
    detail: str  #: for people
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PairSeen:
    """One prefill worker and one decode worker."""

    prefill: str
    decode: str
    state: str  #: the proxy's: ``warm``, ``unwarmed``, ``failed``, ``refused``; empty: it does not say
    reason: str = ""
    detail: str = ""
    link: Link | None = None  #: what has moved while the doctor looked, or, where nothing has, ever
    recent: bool = False  #: it is of the time in which the doctor looked
    probe: ProbeSeen | None = None
    probed: Probed | None = None  #: what the prefill worker has measured of it just now; None: it was not asked


class _Decision(msgspec.Struct, frozen=True):
    path: str | None = None
    reason: str | None = None


class _Workers(msgspec.Struct, frozen=True):
    prefill: str | None = None
    decode: str | None = None


class AttemptSeen(msgspec.Struct, frozen=True):
    """One leg of a request."""

    leg: str = ""
    worker: str = ""
    reason: str | None = None
    detail: str = ""


class TransferSeen(msgspec.Struct, frozen=True):
    """How a request's transfer ended."""

    state: str = ""
    bytes: int = 0
    seconds: float = 0.0
    exposed_ms: float | None = None
    reason: str | None = None


class RecordSeen(msgspec.Struct, frozen=True):
    """One request, as ``/kvbelt/requests`` tells of it."""

    request_id: str
    time: float = 0.0
    status: int = 0
    decision: _Decision = _Decision()
    workers: _Workers = _Workers()
    kv: str | None = None
    timings_ms: dict[str, float | None] = {}
    transfer: TransferSeen | None = None
    attempts: list[AttemptSeen] = []
    errors: list[str] = []


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """One GPU of the doctor's own host."""

    index: int
    uuid: str
    name: str
    utilisation: float  #: percent, the mean while the doctor looked
    memory_used: float  #: of 1


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything."""

    url: str
    proxy_answer: str = ""  #: why the proxy has not answered; empty: it has
    proxy_about: About | None = None
    proxy_state: str = ""
    workers: tuple[WorkerSeen, ...] = ()
    pairs: tuple[PairSeen, ...] = ()
    records: tuple[RecordSeen, ...] = ()  #: of the last minutes
    records_shown: bool = True  #: the proxy may show them to nobody without its key
    gpus: tuple[GpuSeen, ...] | None = None  #: None: no GPU here, or no nvidia-smi
    seconds: float = 0.0  #: for how long it was looked

    def of(self, role: str) -> Iterator[WorkerSeen]:
        """Workers that do this."""
        return (worker for worker in self.workers if worker.role == role)

    def worker(self, name: str) -> WorkerSeen | None:
        """One of them."""
        return next((worker for worker in self.workers if worker.name == name), None)


def same_host(one: About | None, other: About | None) -> bool:
    """Whether two processes reach each other within one machine and network namespace."""
    if one is None or other is None or not one.machine.boot_id:
        return False
    return (one.machine.boot_id, one.machine.network) == (other.machine.boot_id, other.machine.network)
