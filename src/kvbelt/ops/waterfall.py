"""Where one request's time went: the proxy's record (``GET /kvbelt/requests/{id}``) as bars on a common axis. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvbelt.ops.bars import Bar, chart, milliseconds


class Decision(msgspec.Struct, frozen=True):
    """The path taken, as in ``x-kvbelt-path``."""

    path: str
    reason: str | None = None
    meaning: str | None = None  #: of the reason


class Workers(msgspec.Struct, frozen=True):
    """``host:port`` of each."""

    prefill: str | None = None
    decode: str | None = None


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds. None: did not happen, or nobody said."""

    prefill: float | None = None  #: on the worker that computed the prompt
    kv_wait: float | None = None  #: on D: waiting for the commit
    load: float | None = None  #: on D: scattering the slot into its blocks
    first_token: float | None = None  #: moment of the first token's departure to the client
    between_tokens: float | None = None  #: on average
    total: float | None = None


class Span(msgspec.Struct, frozen=True):
    """One part of the time, in milliseconds from the request's arrival."""

    name: str
    start_ms: float
    duration_ms: float
    worker: str | None = None
    failed: str | None = None  #: why it failed


class Attempt(msgspec.Struct, frozen=True):
    """One leg, to one worker."""

    leg: str
    worker: str
    began_ms: float
    ended_ms: float | None = None
    reason: str | None = None  #: why it failed
    detail: str = ""


class Transfer(msgspec.Struct, frozen=True):
    """What the prefill worker told on the notification port."""

    state: str
    bytes: int
    milliseconds: float
    gb_per_second: float | None = None
    channel: str | None = None
    transport: str | None = None  #: of the carrier's
    tokens: int | None = None
    writes: int | None = None
    exposed_ms: float | None = None
    reason: str | None = None


class RequestRecord(msgspec.Struct, frozen=True):
    """One request. What the proxy tells beyond this is not read."""

    request_id: str
    decision: Decision
    workers: Workers
    timings_ms: Timings
    transfer_id: str | None = None
    kv: str | None = None
    transfer: Transfer | None = None
    errors: tuple[str, ...] = ()
    route: str = ""
    status: int = 0
    time: float = 0.0  #: of its arrival, in seconds since the epoch
    tokens: int | None = None  #: about; of a streamed answer
    spans: tuple[Span, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    prompt: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer and its transfer, if it had one, have ended."""
        return self.timings_ms.total is not None and (self.transfer is not None or self.transfer_id is None)

    @property
    def over_belt(self) -> bool:
        """Whether the KV crossed and was used."""
        return self.transfer is not None and self.transfer.state == "done" and self.decision.path != "local"


def parse(body: Mapping[str, Any]) -> RequestRecord:
    """Read the proxy's JSON.

    Raises:
        ValueError: it is not a record.
    """
    return msgspec.convert(body, RequestRecord)


def lines(record: RequestRecord, *, width: int = 100, plain: bool = False) -> list[str]:
    """The waterfall: a title, one line a span, and what ended how."""
    total = record.timings_ms.total
    title = f"request {record.request_id}: {record.decision.path}"
    if record.decision.reason:
        title += f" ({record.decision.reason})"
    arrow = "->" if plain else "→"
    way = f" {arrow} ".join(worker for worker in (record.workers.prefill, record.workers.decode) if worker)
    shown = [title + (f", {way}" if way else ""), *chart(bars(record), width=width, plain=plain)]
    if record.timings_ms.first_token is not None:
        shown.append(f"  first token after {milliseconds(record.timings_ms.first_token)} ms")
        if total is not None:
            shown[-1] += f", whole answer after {milliseconds(total)} ms"
        if record.timings_ms.between_tokens is not None and record.tokens:
            shown[-1] += f": {record.tokens} tokens, {milliseconds(record.timings_ms.between_tokens)} ms between two"
    shown += [f"  error: {error}" for error in record.errors]
    return shown


def bars(record: RequestRecord) -> list[Bar]:
    """The spans that happened before the second token; the rest of the answer would dwarf them."""
    return [Bar(_label(span), span.start_ms, span.duration_ms, _note(record, span))
            for span in record.spans if span.name != "answer"]  # fmt: skip


def _label(span: Span) -> str:
    return f"{span.name} failed" if span.failed and span.name != "transfer" else span.name


def _note(record: RequestRecord, span: Span) -> str:
    if span.name == "transfer" and record.transfer is not None:
        return _transfer_note(record.transfer)
    return f"{span.failed}, {span.worker}" if span.failed else ""


def _transfer_note(transfer: Transfer) -> str:
    note = _bytes(transfer.bytes)
    if transfer.writes is not None:
        note += f" in {transfer.writes} writes"
    if transfer.channel is not None:
        note += f" over {transfer.channel}"
    if transfer.transport:
        note += f" by {transfer.transport}"
    if transfer.gb_per_second is not None:
        note += f", {transfer.gb_per_second:.3g} GB/s"
    if transfer.exposed_ms is not None:
        # A transfer that runs beside the prefill is as slow as the layers come; what counts is its end.
        paced = transfer.exposed_ms < transfer.milliseconds / 2
        note += (" at prefill's pace" if paced else "") + f"; {milliseconds(transfer.exposed_ms)} ms after prefill"
    if transfer.state != "done":
        note = f"{transfer.state}: {transfer.reason or 'no reason given'}; {note}"
    return note


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
