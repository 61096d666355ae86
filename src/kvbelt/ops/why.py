"""``kvbelt why REQUEST_ID``: where one request's time went, which path it took, and why.

Without an id it shows the last request; with ``--list`` the last ones, one per line. The proxy keeps the records
(``--keep-requests``).
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from urllib.parse import quote

from kvbelt.errors import KVBeltError
from kvbelt.ops import proxy_client, waterfall
from kvbelt.ops.arguments import positive_int
from kvbelt.ops.bars import milliseconds
from kvbelt.ops.parser import add_examples
from kvbelt.ops.tables import table, wrapped
from kvbelt.wire import reasons
from kvbelt.wire.request_record import REQUEST_LIST, REQUEST_RECORD, DoneTransfer, RequestRecord

#: What each path means.
PATHS = {
    "first-token": "the client got the prefill worker's first token; the decode worker continued after it",
    "re-derive": "the decode worker produced the first token itself, from the transferred KV",
    "prefill-only": "the prefill worker's token was the whole answer",
    "local": "one worker computed the prompt and generated; no KV was used",
    "passed-on": "the proxy splits no request of this route; one worker answered it",
}

_REQUESTS = "/kvbelt/requests"
_UNKNOWN = "not known to this version"
_MAX_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", nargs="?", metavar="REQUEST_ID",
                        help="an answer's x-request-id or id (default: the last request's)")  # fmt: skip
    proxy_client.add_arguments(parser)
    parser.add_argument("--list", action="store_true", help="list the last requests, one per line")
    parser.add_argument("--limit", type=positive_int, default=20, metavar="N", help="how many to list")
    parser.add_argument("--json", action="store_true", help="print the proxy's JSON")
    add_examples(
        parser,
        ("kvbelt why", "the last request"),
        ("kvbelt why --list --limit 50", "the last 50, a line each"),
        ("kvbelt why chatcmpl-069dbb814b82-3", "one of them, by its answer's id or x-request-id"),
    )


def run(args: argparse.Namespace) -> int:
    proxy = proxy_client.ProxyClient.of(args)
    if args.list:
        path = f"{_REQUESTS}?limit={args.limit}"
        print(proxy.pretty(path) if args.json else "\n".join(list_lines(proxy.get(path, REQUEST_LIST).requests)))
        return 0
    path = f"{_REQUESTS}/{quote(args.request_id or _last(proxy), safe='')}"
    if args.json:
        print(proxy.pretty(path))
        return 0
    width = min(shutil.get_terminal_size((100, 24)).columns, _MAX_WIDTH)
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    print("\n".join(describe(proxy.get(path, REQUEST_RECORD), width=width, plain=plain)))
    return 0


def _last(proxy: proxy_client.ProxyClient) -> str:
    requests = proxy.get(f"{_REQUESTS}?limit=1", REQUEST_LIST).requests
    if not requests:
        raise KVBeltError(f"the proxy at {proxy.url} has no request yet")
    return requests[0].request_id


def describe(record: RequestRecord, *, width: int = 100, plain: bool = False) -> list[str]:
    """Everything that is known of one request."""
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
    return [piece for line in (*lines, *chart) for piece in wrapped(line, width)]


def _decision(record: RequestRecord) -> list[str]:
    path, reason = record.decision.path, record.decision.reason
    if not path:
        return ["no path chosen yet" if not record.status else "refused before a path was chosen"]
    lines = [f"{path}: {PATHS.get(path, 'a way that this version does not know')}"]
    if reason:
        lines.append(f"because of {reason}: {record.decision.meaning or _UNKNOWN}")
    return lines + _placing(record)


def _placing(record: RequestRecord) -> list[str]:
    placing = record.placing
    if placing is None:
        return []
    line = f"placed: {placing.action}"
    if placing.reason and placing.reason != record.decision.reason:
        line += f" ({placing.reason}: {placing.meaning or _UNKNOWN})"
    if placing.waited_ms:
        line += f", after a wait of {milliseconds(placing.waited_ms)} ms"
    if placing.predicted_first_token_ms is not None:
        line += f", first token expected after {milliseconds(placing.predicted_first_token_ms)} ms"
    return [line]


def _failed_attempts(record: RequestRecord) -> list[str]:
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


def list_lines(requests: Sequence[RequestRecord]) -> list[str]:
    """One line per request, newest first."""
    if not requests:
        return ["no request yet"]
    rows = []
    for record in requests:
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
                transfer.exposed_ms if isinstance(transfer, DoneTransfer) else None,
                timings.total,
                sum(attempt.reason is not None for attempt in record.attempts) or None,
            )
        )
    head = (
        "UTC",
        "request",
        "status",
        "path",
        "prefill",
        "decode",
        "first ms",
        "next ms",
        "KV exposed",
        "answer ms",
        "failed",
    )
    return table(head, rows)
