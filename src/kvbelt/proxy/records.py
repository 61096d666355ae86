"""What became of each request: the last few, for people and for ``/kvbelt/requests``. Never any text of it."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from kvbelt.wire.notification import Notification, TransferDone


@dataclass(slots=True)
class Record:
    """One request. Moments are ``time.monotonic()``; None: has not happened."""

    request_id: str
    route: str  #: ``/v1/completions`` or ``/v1/chat/completions``
    began: float
    unix_time: float
    stream: bool = False
    path: str = ""  #: the road taken, as in ``x-kvbelt-path``
    reason: str | None = None
    transfer_id: str | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    prefill_sent: float | None = None
    prefill_answered: float | None = None
    decode_sent: float | None = None
    decode_answered: float | None = None  #: its headers are there: the KV's fate is known
    first_token: float | None = None  #: handed to the client's socket
    decode_first: float | None = None  #: the decode worker's first bytes
    ended: float | None = None
    status: int = 0
    kv: str | None = None  #: ``x-kvbelt-kv``
    prefill_timing: bytes = b""  #: ``Server-Timing``, unparsed until somebody looks
    decode_timing: bytes = b""
    transfer: Notification | None = None
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For people; times in milliseconds from the request's arrival or of their part."""
        prefill, decode = timings(self.prefill_timing), timings(self.decode_timing)
        since, ms = self._since, _milliseconds
        return {
            "request_id": self.request_id,
            "route": self.route,
            "time": self.unix_time,
            "stream": self.stream,
            "status": self.status,
            "decision": {"path": self.path, "reason": self.reason},
            "workers": {"prefill": self.prefill_worker, "decode": self.decode_worker},
            "transfer_id": self.transfer_id,
            "kv": self.kv,
            "timings_ms": {
                "proxy": ms(since(self.prefill_sent or self.decode_sent)),
                "queue": prefill.get("queue", decode.get("queue")),
                "prefill": prefill.get("prefill", decode.get("prefill")),
                "prefill_leg": ms(_between(self.prefill_sent, self.prefill_answered)),
                "kv_wait": decode.get("kv"),
                "load": decode.get("load"),
                "decode_queue": decode.get("queue"),
                "decode_headers": ms(_between(self.decode_sent, self.decode_answered)),
                # Our workers' headers leave with their first output and tell the step; others' leave before it.
                "first_decode_step": decode.get("prefill", ms(_between(self.decode_answered, self.decode_first)))
                if self.prefill_worker is not None
                else None,
                "first_token": ms(since(self.first_token)),
                "total": ms(since(self.ended)),
            },
            "transfer": self._transfer(),
            "errors": self.errors,
        }

    def _since(self, moment: float | None) -> float | None:
        return _between(self.began, moment)

    def _transfer(self) -> dict[str, Any] | None:
        told = self.transfer
        if told is None:
            return None
        common = {"bytes": told.num_bytes, "seconds": told.seconds, "milliseconds": _milliseconds(told.seconds)}
        common["gb_per_second"] = round(told.num_bytes / told.seconds / 1e9, 3) if told.seconds > 0 else None
        if isinstance(told, TransferDone):
            return common | {
                "state": "done",
                "channel": told.channel,
                "tokens": told.num_tokens,
                "writes": told.num_writes,
                "exposed_ms": _milliseconds(told.exposed_seconds),
            }
        return common | {"state": "failed", "reason": told.reason}


class Records:
    """The last ``kept`` requests, by request id and by transfer id."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._order: deque[Record] = deque()
        self._by_id: dict[str, Record] = {}
        self._by_transfer: dict[str, Record] = {}

    def add(self, record: Record) -> None:
        """Keep a record; the oldest goes if there are too many."""
        if len(self._order) >= self._kept:
            oldest = self._order.popleft()
            if self._by_id.get(oldest.request_id) is oldest:
                del self._by_id[oldest.request_id]
            if oldest.transfer_id is not None:
                self._by_transfer.pop(oldest.transfer_id, None)
        self._order.append(record)
        self._by_id[record.request_id] = record

    def name_transfer(self, record: Record, transfer_id: str) -> None:
        """This record's transfer has this name from now on."""
        if record.transfer_id is not None:
            self._by_transfer.pop(record.transfer_id, None)
        record.transfer_id = transfer_id
        self._by_transfer[transfer_id] = record

    def get(self, request_id: str) -> Record | None:
        """The newest record of this id."""
        return self._by_id.get(request_id)

    def of_transfer(self, transfer_id: str) -> Record | None:
        """The record whose transfer has this name; a prompt's own suffix does not matter."""
        return self._by_transfer.get(transfer_id) or self._by_transfer.get(transfer_id.rpartition(".")[0])

    def recent(self, limit: int = 100) -> list[Record]:
        """The newest first."""
        newest = reversed(self._order)
        return [record for record, _ in zip(newest, range(limit), strict=False)]

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._order)


def timings(header: bytes) -> dict[str, float]:
    """``Server-Timing: queue;dur=1.5, prefill;dur=20`` → milliseconds by name. What does not parse is left out."""
    found: dict[str, float] = {}
    for entry in header.decode("latin-1").split(","):
        name, *params = (part.strip() for part in entry.split(";"))
        for param in params:
            label, _, value = param.partition("=")
            if label.strip().lower() == "dur":
                try:
                    found[name] = float(value.strip().strip('"'))
                except ValueError:
                    continue
    return found


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
