"""Draws where one request's time went: the proxy's record as bars on a common axis. Pure."""

from kvbelt.ops.bars import Bar, bytes_of, chart, milliseconds
from kvbelt.wire.request_record import DoneTransfer, RequestRecord, RequestSpan, Transfer


def lines(record: RequestRecord, *, width: int = 100, plain: bool = False) -> list[str]:
    """A title, one bar per span, and the outcome."""
    title = f"request {record.request_id}: {record.decision.path}"
    if record.decision.reason:
        title += f" ({record.decision.reason})"
    arrow = "->" if plain else "→"
    way = f" {arrow} ".join(worker for worker in (record.workers.prefill, record.workers.decode) if worker)
    shown = [title + (f", {way}" if way else ""), *chart(bars(record), width=width, plain=plain, end=end_of(record))]
    if record.status == 200:
        shown.append(f"  {_times(record)}")
    shown += [f"  error: {error}" for error in record.errors]
    return shown


def _times(record: RequestRecord) -> str:
    timings = record.timings_ms
    first, total, between = timings.first_token, timings.total, timings.between_tokens
    said = f"first token after {milliseconds(first)} ms" if first is not None else "first token unknown (not streamed)"
    if total is not None:
        said += f", whole answer after {milliseconds(total)} ms"
    if between is not None and record.tokens:
        said += f": {record.tokens} tokens, {milliseconds(between)} ms per token"
    return said


def bars(record: RequestRecord) -> list[Bar]:
    return [Bar(_label(span), span.start_ms, span.duration_ms, _note(record, span)) for span in record.spans]


def end_of(record: RequestRecord) -> float | None:
    """The axis ends with the second token, because the rest of the answer would dwarf the other parts."""
    ends = [span.start_ms if span.name == "answer" else span.start_ms + span.duration_ms for span in record.spans]
    return max(ends, default=None)


def _label(span: RequestSpan) -> str:
    if span.name == "answer":
        return "rest of the answer"
    return f"{span.name} failed" if span.failed and span.name != "transfer" else span.name


def _note(record: RequestRecord, span: RequestSpan) -> str:
    if span.name == "transfer" and record.transfer is not None:
        return _transfer_note(record.transfer)
    return f"{span.failed}, {span.worker}" if span.failed else ""


def _transfer_note(transfer: Transfer) -> str:
    note = bytes_of(transfer.bytes)
    if isinstance(transfer, DoneTransfer):
        note += f" in {transfer.writes} writes over {transfer.channel}"
    if transfer.transport:
        note += f" by {transfer.transport}"
    if not isinstance(transfer, DoneTransfer):
        return f"failed: {transfer.reason}; {note}"
    # A transfer that runs beside the prefill is as slow as the layers are computed: its rate says nothing.
    if transfer.gb_per_second is not None and not transfer.overlapped_ms:
        note += f", {transfer.gb_per_second:.3g} GB/s"
    beside = f", {milliseconds(transfer.overlapped_ms)} ms beside the prefill" if transfer.overlapped_ms else ""
    return f"{milliseconds(transfer.exposed_ms)} ms exposed{beside}; {note}"
