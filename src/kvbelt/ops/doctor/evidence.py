"""What the doctor observed of a running deployment. Frozen; the only input of the checks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from kvbelt.ops.doctor.host import HostSeen
from kvbelt.ops.doctor.scrape import NOTHING, Counted
from kvbelt.wire.about import About, LinkTotals
from kvbelt.wire.health import PlacementNow, WorkerHealth
from kvbelt.wire.load import NO_LOAD
from kvbelt.wire.probe import ProbeResult
from kvbelt.wire.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class Sample:
    """A worker's load and belt at one moment."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    receive_bytes: int = 0  #: size of the receive buffer
    bytes_held: int = 0  #: used bytes of it
    bytes_quarantined: int = 0
    queued: int = 0  #: transfers that wait for space in it
    sends_waiting: int = 0  #: a prefill worker's transfers that were told to wait

    @classmethod
    def of(cls, health: WorkerHealth) -> "Sample":
        """From ``/health`` of an embedded worker."""
        load, belt = health.load or NO_LOAD, health.belt
        sample = cls(load.running, load.waiting, load.blocks_total, load.blocks_free)
        if belt is None:
            return sample
        return replace(
            sample,
            receive_bytes=belt.receive_bytes,
            bytes_held=belt.bytes_reserved + belt.bytes_committed + belt.bytes_quarantined - belt.overflow_bytes_used,
            bytes_quarantined=belt.bytes_quarantined,
            queued=belt.arrivals.get("queued", 0),
            sends_waiting=belt.sends.get("waiting", 0),
        )


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker: what the proxy reports of it, and what it reports itself."""

    name: str  #: ``host:port``
    role: str
    state: str  #: the proxy's view: ``ready``, ``unready``, ``lost``, ``unknown``
    detail: str = ""  #: the proxy's
    standing: str = "active"
    model: str = ""
    in_flight: int = 0
    answer: str = ""  #: why it did not answer the doctor; empty: it answered
    seconds: float | None = None  #: median time to answer ``/health``
    status: int | None = None
    engine_id: str = ""
    about: About | None = None  #: None: not reported (a vLLM server without the connector)
    samples: tuple[Sample, ...] = ()
    skew_seconds: float | None = None  #: its clock minus the doctor's
    skew_within: float = 0.0  #: uncertainty of that
    needs_key: bool = False  #: it refused the doctor's question for its key, or for the lack of one
    warming: bool = False  #: its first connections are still being made
    counted: Counted = NOTHING  #: while the doctor looked

    @property
    def answers(self) -> bool:
        return not self.answer

    @property
    def waiting(self) -> float:
        """Waiting requests, the median of the samples."""
        return median(sample.waiting for sample in self.samples) if self.samples else 0.0

    @property
    def running(self) -> float:
        """Running requests, the median of the samples."""
        return median(sample.running for sample in self.samples) if self.samples else 0.0

    def share(self, hit: Callable[[Sample], bool]) -> float:
        """Share of the samples with a condition; 0 without samples."""
        return sum(hit(sample) for sample in self.samples) / len(self.samples) if self.samples else 0.0


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One prompt that the doctor sent through a pair."""

    ok: bool  #: the decode worker used the transferred KV
    detail: str  #: for people
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PairSeen:
    """One prefill worker and one decode worker."""

    prefill: str
    decode: str
    state: str  #: the proxy's view: ``warm``, ``unwarmed``, ``failed``, ``refused``; empty: not reported
    reason: str = ""
    detail: str = ""
    link: LinkTotals | None = None  #: what moved during the observation or, if nothing did, since the start
    recent: bool = False  #: ``link`` is from the observation
    trial: TrialResult | None = None
    probed: ProbeResult | None = None  #: the prefill worker's measurement; None: not measured


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """One GPU of the doctor's host."""

    index: int
    uuid: str
    name: str
    utilisation: float  #: percent, the mean of the samples
    memory_used: float  #: as a share


@dataclass(frozen=True, slots=True)
class Evidence:
    """All observations."""

    url: str
    proxy_answer: str = ""  #: why the proxy did not answer; empty: it answered
    proxy_about: About | None = None
    placement: PlacementNow | None = None  #: None: the proxy does not say
    workers: tuple[WorkerSeen, ...] = ()
    pairs: tuple[PairSeen, ...] = ()
    records: tuple[RequestRecord, ...] = ()  #: of the last minutes
    records_shown: bool = True  #: the proxy may require its key for them
    unreadable: tuple[str, ...] = ()  #: messages that this version cannot read: sender and field
    gpus: tuple[GpuSeen, ...] | None = None  #: None: no GPU here, or no nvidia-smi
    seconds: float = 0.0  #: length of the observation
    host: HostSeen | None = None  #: the doctor's
    proxy_counted: Counted = NOTHING  #: while the doctor looked
    counted_seconds: float = 0.0  #: how long that was

    def of(self, role: str) -> Iterator[WorkerSeen]:
        """The workers of one role."""
        return (worker for worker in self.workers if worker.role == role)

    def worker(self, name: str) -> WorkerSeen | None:
        return next((worker for worker in self.workers if worker.name == name), None)

    def here(self) -> tuple[WorkerSeen, ...]:
        """The workers on the doctor's host."""
        boot_id = self.host.boot_id if self.host is not None else ""
        return tuple(
            worker
            for worker in self.workers
            if boot_id and worker.about is not None and worker.about.machine.boot_id == boot_id
        )

    def within_host(self, pair: PairSeen) -> bool:
        prefill, decode = self.worker(pair.prefill), self.worker(pair.decode)
        return prefill is not None and decode is not None and same_host(prefill.about, decode.about)


def nearest(values: Sequence[float], percent: int) -> float:
    """A percentile by nearest rank, as ``kvbelt top`` and the console have it. ``values`` may not be empty."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def same_host(one: About | None, other: About | None) -> bool:
    """Whether two processes share a machine and a network namespace."""
    if one is None or other is None or not one.machine.boot_id:
        return False
    return (one.machine.boot_id, one.machine.network) == (other.machine.boot_id, other.machine.network)
