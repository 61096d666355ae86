"""Where one request's time went: the proxy's record of it, as bars on a common axis. Pure.

The record (``GET /kvbelt/requests/{id}``) holds durations by their part, measured by whoever did it, and few moments;
the bars are laid end to end in the order in which a request walks: proxy, P's queue, P's prefill, the wait for KV on D,
the scatter, D's first step. The transfer runs beside the prefill; its bar ends ``exposed_ms`` after it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvbelt.ops.bars import Bar, chart, milliseconds


class Decision(msgspec.Struct, frozen=True):
    """The path taken, as in ``x-kvbelt-path``."""

    path: str
    reason: str | None = None


class Workers(msgspec.Struct, frozen=True):
    """``host:port`` of each."""

    prefill: str | None = None
    decode: str | None = None


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds. None: did not happen, or nobody said."""

    proxy: float | None = None  #: from the request's arrival to the first leg's departure
    queue: float | None = None  #: on the worker that computed the prompt
    prefill: float | None = None
    prefill_leg: float | None = None  #: P's leg as the proxy saw it
    kv_wait: float | None = None  #: on D: waiting for the commit
    load: float | None = None  #: on D: scattering the slot into its blocks
    decode_queue: float | None = None
    decode_headers: float | None = None  #: from D's leg's departure to D's answer, which leaves with its first output
    first_decode_step: float | None = None  #: D's first step, as D measured it
    first_token: float | None = None  #: moment of the first token's departure to the client
    total: float | None = None


class Transfer(msgspec.Struct, frozen=True):
    """What the prefill worker told on the notification port."""

    state: str
    bytes: int
    milliseconds: float
    gb_per_second: float | None = None
    channel: str | None = None
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
    shown += [f"  error: {error}" for error in record.errors]
    return shown


def bars(record: RequestRecord) -> list[Bar]:
    """The spans that happened, in order."""
    if record.workers.prefill is None:
        return _on_one_worker(record.timings_ms)
    return _on_two_workers(record)


def _on_one_worker(timings: Timings) -> list[Bar]:
    proxy, queue, prefill = timings.proxy or 0.0, timings.queue or 0.0, timings.prefill or 0.0
    return [
        Bar("proxy", 0.0, proxy),
        Bar("queue", proxy, queue),
        Bar("prefill", proxy + queue, prefill),
    ]


def _on_two_workers(record: RequestRecord) -> list[Bar]:
    timings = record.timings_ms
    shown = _on_one_worker(timings)
    prefilled = shown[-1].start + shown[-1].duration
    if record.transfer is not None:
        shown.append(_transfer_bar(record.transfer, prefilled))
    if timings.decode_headers is None:
        return shown
    # D's leg departs when P's answer has come; P answers without waiting for the transfer.
    departed = (timings.proxy or 0.0) + (timings.prefill_leg or 0.0)
    waited, queued, loaded = timings.kv_wait or 0.0, timings.decode_queue or 0.0, timings.load or 0.0
    step = timings.first_decode_step
    if step is None:
        step = max(0.0, timings.decode_headers - waited - queued - loaded)
    shown.append(Bar("KV wait", departed, waited))
    shown.append(Bar("KV load", departed + waited + queued, loaded))
    shown.append(Bar("first decode step", departed + waited + queued + loaded, step))
    return shown


def _transfer_bar(transfer: Transfer, prefilled: float) -> Bar:
    note = _bytes(transfer.bytes)
    if transfer.writes is not None:
        note += f" in {transfer.writes} writes"
    if transfer.channel is not None:
        note += f" over {transfer.channel}"
    if transfer.gb_per_second is not None:
        note += f", {transfer.gb_per_second:.3g} GB/s"
    if transfer.exposed_ms is not None:
        # A transfer that runs beside the prefill is as slow as the layers come; what counts is its end.
        paced = transfer.exposed_ms < transfer.milliseconds / 2
        note += (" at prefill's pace" if paced else "") + f"; {milliseconds(transfer.exposed_ms)} ms after prefill"
    if transfer.state != "done":
        note = f"{transfer.state}: {transfer.reason or 'no reason given'}; {note}"
    end = prefilled + (transfer.exposed_ms or 0.0)
    return Bar("transfer", max(0.0, end - transfer.milliseconds), transfer.milliseconds, note)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
