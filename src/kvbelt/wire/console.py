"""``GET /kvbelt/console.json``: a deployment at one moment, for the console's page and ``kvbelt top``."""

import msgspec

from kvbelt.wire.health import PlacementNow
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.workers import PairRow, WorkerRow


class RecordCounts(msgspec.Struct, frozen=True):
    kept: int
    most: int


class ProxyStatus(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    life: str  #: differs after a restart
    time: float  #: seconds since the epoch
    uptime_seconds: float
    model: str  #: empty: no worker has said yet
    records: RecordCounts
    prompts: bool  #: the records hold the beginnings of prompts
    admin: bool  #: the proxy has an admin key
    in_flight: int
    requests: int  #: that have ended since the start
    placement: PlacementNow | None = None  #: None: an older version


class Percentiles(msgspec.Struct, frozen=True):
    """By nearest rank; None: there was no value."""

    count: int
    p50: float | None
    p99: float | None
    p90: float | None = None


class LegRates(msgspec.Struct, frozen=True):
    prefill: dict[str, float]
    decode: dict[str, float]


class LinkRates(msgspec.Struct, frozen=True, kw_only=True):
    """What one prefill worker sends to one decode worker."""

    prefill: str
    decode: str
    transfers_per_second: float
    failures_per_second: float
    bytes_per_second: int


class LastError(msgspec.Struct, frozen=True, kw_only=True):
    time: float
    request_id: str
    error: str


class LiveStats(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float  #: that the records cover, at most the window asked for
    requests_per_second: float
    errors_per_second: float
    tokens_per_second: float
    transfers_per_second: float
    bytes_per_second: int
    first_token_ms: Percentiles
    between_tokens_ms: Percentiles
    transfer_ms: Percentiles  #: from the first write posted to the last one completed
    transfer_gb_per_second: Percentiles
    legs: LegRates
    links: list[LinkRates]
    last_errors: list[LastError]
    #: From the end of a prompt's computation to its acknowledged commit: what the client may notice of a transfer.
    transfer_exposed_ms: Percentiles = Percentiles(0, None, None)


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request in a list. Times are in milliseconds from its arrival."""

    number: int | None  #: in the order in which requests have ended; None: under way
    request_id: str
    time: float
    status: int
    path: str
    reason: str | None
    prefill: str | None
    decode: str | None
    attempts: int
    first_token_ms: float | None
    between_tokens_ms: float | None
    total_ms: float | None
    transfer_ms: float | None
    transfer_bytes: int | None
    error: str | None  #: its last one, shortened
    transfer_exposed_ms: float | None = None


class Alarm(msgspec.Struct, frozen=True):
    """Something that is wrong now."""

    severity: str  #: ``critical`` or ``warning``
    subject: str  #: the figure or the worker's column that shows it: ``first_token_ms``, ``waiting``, …
    alert: str  #: the alert of ``deploy/prometheus`` that fires if it lasts
    what: str  #: one line
    change: str  #: what to do
    worker: str = ""  #: ``host:port``; empty: it is of no one worker
    role: str = ""


class DoctorFinding(msgspec.Struct, frozen=True):
    """What ``kvbelt doctor`` has found first."""

    severity: str  #: as an alarm's
    what: str
    change: str


class ConsoleState(msgspec.Struct, frozen=True, kw_only=True):
    proxy: ProxyStatus
    workers: list[WorkerRow]
    pairs: list[PairRow]
    live: LiveStats
    requests: list[RequestRow]  #: ended since ``after``, and under way; the newest first
    after: int  #: to send with the next question
    alarms: list[Alarm] = []  #: the worst first; empty from an older version, too
    doctor: DoctorFinding | None = None  #: only if asked for with ``?doctor=1``


CONSOLE_STATE = JsonMessage(ConsoleState, "/kvbelt/console.json")
