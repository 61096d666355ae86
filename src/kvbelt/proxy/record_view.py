"""Records as JSON, for ``/kvbelt/requests`` and the console. Times are in milliseconds from the request's arrival."""

from typing import Any

from kvbelt.proxy.records import Attempt, Record
from kvbelt.proxy.spans import Span, spans_of, timings
from kvbelt.wire import reasons
from kvbelt.wire.notification import Notification, TransferDone

#: Of an error, in a list.
_EXCERPT = 200


def record_json(record: Record) -> dict[str, Any]:
    """All that is known of one request."""
    prefill = timings(_timing(record, "prefill"))
    decode = timings(_timing(record, "decode"))
    ms, began = _milliseconds, record.began
    sent = _sent(record)
    return {
        "request_id": record.request_id,
        "route": record.route,
        "time": record.unix_time,
        "stream": record.stream,
        "status": record.status,
        "ended": record.ended is not None,
        "decision": {"path": record.path, "reason": record.reason, "meaning": _meaning(record)},
        "after": record.after,
        "workers": {"prefill": record.prefill_worker, "decode": record.decode_worker},
        "transfer_id": sent.transfer_id if sent is not None else None,
        "kv": record.kv,
        "timings_ms": {
            "proxy": ms(_between(began, record.prefill_sent or record.decode_sent)),
            "queue": prefill.get("queue", decode.get("queue")),
            "prefill": prefill.get("prefill", decode.get("prefill")),
            "prefill_leg": ms(_between(record.prefill_sent, record.prefill_answered)),
            "kv_wait": decode.get("kv"),
            "load": decode.get("load"),
            "decode_queue": decode.get("queue"),
            "decode_headers": ms(_between(record.decode_sent, record.decode_answered)),
            # Our workers' headers leave with their first output and tell the step; others' leave before it.
            "first_decode_step": decode.get("prefill", ms(_between(record.decode_answered, record.decode_first)))
            if record.prefill_worker is not None
            else None,
            "first_token": ms(_between(began, record.first_token)),
            "between_tokens": ms(record.between_tokens),
            "total": ms(_between(began, record.ended)),
        },
        "tokens": record.gaps + 1 if record.gaps else None,
        "transfer": _transfer_json(sent.transfer if sent is not None else None),
        "spans": [_span_json(span) for span in spans_of(record)],
        "attempts": [_attempt_json(attempt, began) for attempt in record.attempts],
        "errors": record.errors,
        "prompt": record.prompt,
    }


def row_json(record: Record) -> dict[str, Any]:
    """One line of a list."""
    ms, sent = _milliseconds, _sent(record)
    told = sent.transfer if sent is not None else None
    done = isinstance(told, TransferDone)
    return {
        "number": record.number or None,
        "request_id": record.request_id,
        "time": record.unix_time,
        "status": record.status,
        "path": record.path,
        "reason": record.reason,
        "prefill": record.prefill_worker,
        "decode": record.decode_worker,
        "attempts": len(record.attempts),
        "first_token_ms": ms(record.time_to_first_token),
        "between_tokens_ms": ms(record.between_tokens),
        "total_ms": ms(_between(record.began, record.ended)),
        "transfer_ms": ms(told.seconds) if told is not None and done else None,
        "transfer_bytes": told.num_bytes if told is not None and done else None,
        "error": record.errors[-1][:_EXCERPT] if record.errors else None,
    }


def _meaning(record: Record) -> str | None:
    """The reason in words."""
    known = None if record.reason is None else reasons.find(record.reason)
    if known is None or record.reason is None:
        return None
    said = reasons.find(record.reason.removeprefix("transfer_")) if known.name == "transfer_*" else None
    return f"the transfer failed: {said.meaning}" if said is not None else known.meaning


def _sent(record: Record) -> Attempt | None:
    """The latest leg that sent KV."""
    return next((attempt for attempt in reversed(record.attempts) if attempt.transfer_id), None)


def _timing(record: Record, leg: str) -> bytes:
    """What the worker of the latest leg of a kind has said; empty: nothing."""
    return next((attempt.timing for attempt in reversed(record.attempts) if attempt.leg == leg), b"")


def _span_json(span: Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "start_ms": _milliseconds(span.start),
        "duration_ms": _milliseconds(span.duration),
        "worker": span.worker,
        "failed": span.failed,
    }


def _attempt_json(attempt: Attempt, began: float) -> dict[str, Any]:
    ms = _milliseconds
    return {
        "leg": attempt.leg,
        "worker": attempt.worker,
        "transfer_id": attempt.transfer_id or None,
        "began_ms": ms(attempt.began - began),
        "answered_ms": ms(_between(began, attempt.answered)),
        "ended_ms": ms(_between(began, attempt.ended)),
        "reason": attempt.reason,
        "detail": attempt.detail,
        "transfer": _transfer_json(attempt.transfer),
    }


def _transfer_json(told: Notification | None) -> dict[str, Any] | None:
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


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
