"""Records as the messages of ``/kvbelt/requests`` and of the console's list."""

from typing import Any

from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.proxy.observe.spans import parse_server_timing, spans_of
from kvbelt.wire import reasons
from kvbelt.wire.console import RequestRow
from kvbelt.wire.notification import TransferDone, TransferEnd
from kvbelt.wire.request_record import (
    Decision,
    DoneTransfer,
    FailedTransfer,
    Placing,
    RequestAttempt,
    RequestRecord,
    RequestSpan,
    Timings,
    Transfer,
    WorkerNames,
)

_EXCERPT = 200  #: characters of an error in a list


def request_record(record: Record) -> RequestRecord:
    began, sent = record.began, sent_attempt(record)
    return RequestRecord(
        request_id=record.request_id,
        route=record.route,
        time=record.unix_time,
        stream=record.stream,
        status=record.status,
        ended=record.ended is not None,
        decision=Decision(record.path, record.reason, _meaning(record.reason)),
        after=record.after,
        workers=WorkerNames(record.prefill_worker, record.decode_worker),
        transfer_id=sent.transfer_id if sent is not None else None,
        kv=record.kv or (sent.kv if sent is not None else None),
        timings_ms=_timings(record),
        tokens=record.gaps + 1 if record.gaps else None,
        transfer=_transfer(sent.transfer) if sent is not None else None,
        spans=tuple(
            RequestSpan(
                name=span.name,
                start_ms=_ms(span.start),
                duration_ms=_ms(span.duration),
                worker=span.leg.worker if span.leg is not None else None,
                failed=span.failed,
            )
            for span in spans_of(record)
        ),
        attempts=tuple(_attempt(attempt, began) for attempt in record.attempts),
        errors=record.errors,
        prompt=record.prompt,
        placing=_placing(record),
    )


def request_row(record: Record) -> RequestRow:
    sent = sent_attempt(record)
    done = sent.transfer if sent is not None and isinstance(sent.transfer, TransferDone) else None
    return RequestRow(
        number=record.number or None,
        request_id=record.request_id,
        time=record.unix_time,
        status=record.status,
        path=record.path,
        reason=record.reason,
        prefill=record.prefill_worker,
        decode=record.decode_worker,
        attempts=len(record.attempts),
        first_token_ms=ms_between(0.0, record.time_to_first_token),
        between_tokens_ms=ms_between(0.0, record.between_tokens),
        total_ms=ms_between(record.began, record.ended),
        transfer_ms=_ms(done.seconds) if done is not None else None,
        transfer_exposed_ms=_ms(done.exposed_seconds) if done is not None else None,
        transfer_bytes=done.num_bytes if done is not None else None,
        error=record.errors[-1][:_EXCERPT] if record.errors else None,
    )


def ms_between(begin: float | None, end: float | None) -> float | None:
    """Milliseconds; None: one of the two has not happened."""
    return None if begin is None or end is None else _ms(end - begin)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _placing(record: Record) -> Placing | None:
    if not record.action:
        return None
    return Placing(
        action=record.action,
        reason=record.placed_because or None,
        meaning=_meaning(record.placed_because or None),
        waited_ms=_ms(record.waited),
        predicted_first_token_ms=ms_between(record.began, record.predicted),
        ttft_level_ms=_ms(record.ttft_level),
        between_tokens_level_ms=ms_between(0.0, record.between_tokens_level),
    )


def _meaning(reason: str | None) -> str | None:
    known = None if reason is None else reasons.find(reason)
    if known is None or reason is None:
        return None
    said = reasons.find(reason.removeprefix("transfer_")) if known.name == "transfer_*" else None
    return f"the transfer failed: {said.meaning}" if said is not None else known.meaning


def sent_attempt(record: Record) -> Attempt | None:
    """The latest leg that sent KV."""
    return next((attempt for attempt in reversed(record.attempts) if attempt.transfer_id), None)


def _timings(record: Record) -> Timings:
    began = record.began
    prefill, decode = _server_timing(record, "prefill"), _server_timing(record, "decode")
    first_step = None
    if record.prefill_worker is not None:
        # Our workers' headers leave with their first output and tell the step; others' leave before it.
        first_step = decode.get("prefill", ms_between(record.decode_answered, record.decode_first))
    return Timings(
        proxy=ms_between(began, record.prefill_sent or record.decode_sent),
        queue=prefill.get("queue", decode.get("queue")),
        prefill=prefill.get("prefill", decode.get("prefill")),
        prefill_leg=ms_between(record.prefill_sent, record.prefill_answered),
        kv_wait=decode.get("kv"),
        load=decode.get("load"),
        decode_queue=decode.get("queue"),
        decode_headers=ms_between(record.decode_sent, record.decode_answered),
        first_decode_step=first_step,
        first_token=ms_between(0.0, record.time_to_first_token),
        between_tokens=ms_between(0.0, record.between_tokens),
        total=ms_between(began, record.ended),
    )


def _server_timing(record: Record, leg: str) -> dict[str, float]:
    """What the worker of the latest leg of a kind reported, in milliseconds."""
    return parse_server_timing(
        next((attempt.timing for attempt in reversed(record.attempts) if attempt.leg == leg), b"")
    )


def _attempt(attempt: Attempt, began: float) -> RequestAttempt:
    return RequestAttempt(
        leg=attempt.leg,
        worker=attempt.worker,
        transfer_id=attempt.transfer_id or None,
        began_ms=_ms(attempt.began - began),
        answered_ms=ms_between(began, attempt.answered),
        ended_ms=ms_between(began, attempt.ended),
        reason=attempt.reason,
        detail=attempt.detail,
        transfer=_transfer(attempt.transfer),
    )


def _transfer(told: TransferEnd | None) -> Transfer | None:
    if told is None:
        return None
    common: dict[str, Any] = {
        "bytes": told.num_bytes,
        "seconds": told.seconds,
        "milliseconds": _ms(told.seconds),
        "gb_per_second": round(told.num_bytes / told.seconds / 1e9, 3) if told.seconds > 0 else None,
    }
    if not isinstance(told, TransferDone):
        return FailedTransfer(**common, reason=told.reason)
    return DoneTransfer(
        **common,
        channel=told.channel,
        tokens=told.num_tokens,
        writes=told.num_writes,
        exposed_ms=_ms(told.exposed_seconds),
    )
