"""``kvbelt why REQUEST_ID``: where one request's time went, which way it took, and why that one.

Without an id it tells of the last request, with ``--list`` of the last ones in a line each. The proxy keeps the records
(``--keep-requests``).
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from kvbelt.errors import KVBeltError
from kvbelt.ops import proxy_client, waterfall
from kvbelt.ops.arguments import positive_int
from kvbelt.ops.bars import milliseconds
from kvbelt.ops.tables import table
from kvbelt.wire import reasons

#: What each way means.
WAYS = {
    "first-token": "the client got the prefill worker's first token, and the decode worker went on after it",
    "re-derive": "the decode worker made the first token itself, from the KV that had come",
    "prefill-only": "the prefill worker's token was the whole answer",
    "local": "the decode worker computed the prompt itself",
}

_UNKNOWN = "a word that this version does not know"
_MAX_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that ``kvbelt why`` takes."""
    parser.add_argument("request_id", nargs="?", metavar="REQUEST_ID",
                        help="an answer's x-request-id or id (default: the last request's)")  # fmt: skip
    proxy_client.add_arguments(parser)
    parser.add_argument("--list", action="store_true", help="the last requests, a line each")
    parser.add_argument("--limit", type=positive_int, default=20, metavar="N", help="of --list (default: 20)")
    parser.add_argument("--json", action="store_true", help="as the proxy says it")


def run(args: argparse.Namespace) -> int:
    """``kvbelt why`` with parsed arguments. Returns the exit status.

    Raises:
        KVBeltError: no such request, or no answer.
    """
    proxy = proxy_client.client_of(args)
    if args.request_id is not None:
        _show(proxy.get(f"/kvbelt/requests/{quote(args.request_id, safe='')}"), as_json=args.json)
        return 0
    limit = args.limit if args.list else 1
    answer = proxy.get(f"/kvbelt/requests?limit={limit}")
    requests = answer.get("requests") or []
    if args.list:
        print(json.dumps(answer, indent=2) if args.json else "\n".join(listed(requests)))
        return 0
    if not requests:
        raise KVBeltError(f"the proxy at {proxy.url} has had no request yet")
    _show(requests[0], as_json=args.json)
    return 0


def _show(body: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(body, indent=2))
        return
    width = min(shutil.get_terminal_size((100, 24)).columns, _MAX_WIDTH)
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    try:
        record = waterfall.parse(body)
    except ValueError as error:
        raise KVBeltError(f"the proxy's record of the request is none that this version reads: {error}") from None
    print("\n".join(told(record, width=width, plain=plain)))


def told(record: waterfall.RequestRecord, *, width: int = 100, plain: bool = False) -> list[str]:
    """Everything that is known of one request, in lines."""
    title, *chart = waterfall.lines(record, width=width, plain=plain)
    came = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.time)) if record.time else ""
    status = "under way" if not record.status else f"status {record.status}"
    lines = [title, "  " + ", ".join(part for part in (record.route, status, came) if part)]
    lines += [f"  {line}" for line in _decision(record)]
    lines += [f"  {line}" for line in _failed_attempts(record)]
    if record.kv:
        lines.append(f"  KV: {record.kv}")
    if record.prompt is not None:
        lines.append(f"  prompt: {record.prompt}")
    return [*lines, *chart]


def _decision(record: waterfall.RequestRecord) -> list[str]:
    way, reason = record.decision.path, record.decision.reason
    if not way:
        return ["no way was chosen yet" if not record.status else "refused before a way was chosen"]
    lines = [f"{way}: {WAYS.get(way, 'a way that this version does not know')}"]
    if reason:
        lines.append(f"because of {reason}: {record.decision.meaning or _UNKNOWN}")
    return lines


def _failed_attempts(record: waterfall.RequestRecord) -> list[str]:
    lines = []
    for number, attempt in enumerate(record.attempts, 1):
        if attempt.reason is None:
            continue
        after = f" after {milliseconds(attempt.ended_ms - attempt.began_ms)} ms" if attempt.ended_ms is not None else ""
        lines.append(f"attempt {number}, {attempt.leg} on {attempt.worker}: {attempt.reason}{after}: "
                     f"{attempt.detail or _meaning(attempt.reason)}")  # fmt: skip
    return lines


def _meaning(reason: str) -> str:
    known = reasons.find(reason)
    return _UNKNOWN if known is None else known.meaning


def listed(requests: list[Mapping[str, Any]]) -> list[str]:
    """The last requests, a line each, the newest first."""
    if not requests:
        return ["no request yet"]
    rows = []
    for body in requests:
        record = waterfall.parse(body)
        timings, transfer = record.timings_ms, record.transfer
        rows.append(
            (
                time.strftime("%H:%M:%S", time.gmtime(record.time)),
                record.request_id,
                str(record.status) if record.status else "-",
                record.decision.path + (f" ({record.decision.reason})" if record.decision.reason else ""),
                record.workers.prefill or "-",
                record.workers.decode or "-",
                timings.first_token,
                timings.between_tokens,
                transfer.milliseconds if transfer is not None else None,
                timings.total,
                sum(attempt.reason is not None for attempt in record.attempts) or None,
            )
        )
    head = ("UTC", "request", "status", "way", "prefill", "decode", "first ms", "next ms", "KV ms", "all ms", "failed")
    return table(head, rows)
