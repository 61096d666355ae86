"""Draws where one request's time went: the proxy's record as bars on a common axis. Pure."""

from kvbelt.ops.bars import Bar, bytes_of, chart, milliseconds
from kvbelt.wire.request_record import DoneTransfer, RequestRecord, RequestSpan, Transfer


def lines(record: RequestRecord, *, width: int = 100, plain: bool = False) -> list[str]:
    """A title, one bar per span, and the outcome."""
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
            shown[-1] += f": {record.tokens} tokens, {milliseconds(record.timings_ms.between_tokens)} ms per token"
    shown += [f"  error: {error}" for error in record.errors]
    return shown


def bars(record: RequestRecord) -> list[Bar]:
    """The spans before the second token; the rest of the answer would dwarf them."""
    return [Bar(_label(span), span.start_ms, span.duration_ms, _note(record, span))
            for span in record.spans if span.name != "answer"]  # fmt: skip


def _label(span: RequestSpan) -> str:
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
    if transfer.gb_per_second is not None:
        note += f", {transfer.gb_per_second:.3g} GB/s"
    if not isinstance(transfer, DoneTransfer):
        return f"failed: {transfer.reason}; {note}"
    # A transfer that overlaps the prefill is as slow as the layers are computed; only its end matters.
    paced = transfer.exposed_ms < transfer.milliseconds / 2
    return note + (" at prefill's pace" if paced else "") + f"; {milliseconds(transfer.exposed_ms)} ms after prefill"
