"""What operators look at: the page at ``/console``, what it shows, and the records of requests.

::

    GET /console                     the page; its files are below it
    GET /kvbelt/console.json         all that it shows: ?window=SECONDS of rates, requests that have ended ?after=NUMBER
    GET /kvbelt/requests             the last requests in full, ?limit=N of them
    GET /kvbelt/requests/ID          one of them

The page's files say nothing about anybody; who may see the rest, ``access.py`` says.
"""

import hashlib
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from kvbelt import __version__
from kvbelt.errors import RequestError
from kvbelt.http import Exchange
from kvbelt.proxy.access import Access
from kvbelt.proxy.admin import MethodError, refused
from kvbelt.proxy.answers import JSON
from kvbelt.proxy.asked import number_of
from kvbelt.proxy.context import Context
from kvbelt.proxy.live import live_json
from kvbelt.proxy.record_view import record_json, row_json
from kvbelt.proxy.records import Record
from kvbelt.proxy.transports import transport_of
from kvbelt.proxy.worker_view import pairs_json, worker_json
from kvbelt.routing.endpoint import Role

_PAGE = "/console"
_LIVE = "/kvbelt/console.json"
_REQUESTS = "/kvbelt/requests"

_FOLDER = Path(__file__).with_name("console_page")
_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}

#: Nothing from anywhere else, nothing written into the page, nobody's frame.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_SAFE = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
#: Of requests: nobody but who asked keeps it.
_PRIVATE = (JSON, (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))

_ROWS = 200  #: requests that have ended, in one answer
_OPEN_ROWS = 50  #: requests under way, in one answer
#: A transfer may be told of a little after its request has ended; for so long the request is told of again.
_AGAIN_SECONDS = 3.0

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _File:
    kind: bytes
    body: bytes
    tag: bytes  #: ETag


def _read_page() -> dict[str, _File]:
    found = {}
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _KINDS:
            body = file.read_bytes()
            path = _PAGE if file.name == "index.html" else f"{_PAGE}/{file.name}"
            found[path] = _File(_KINDS[file.suffix], body, b'"%b"' % hashlib.sha256(body).hexdigest()[:20].encode())
    return found


class Console:
    """Answers those who look."""

    PLACES = (_PAGE, _LIVE, _REQUESTS)

    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access
        self._files = _read_page()
        self._started = time.monotonic()

    @classmethod
    def serves(cls, path: str) -> bool:
        """Whether a path is one of these."""
        return path in cls.PLACES or path.startswith((_PAGE + "/", _REQUESTS + "/"))

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        request = exchange.request
        try:
            if request.method not in ("GET", "HEAD"):
                raise MethodError(f"{request.path} takes GET, not {request.method}", "GET")
            if request.path.startswith(_PAGE):
                self._page(exchange)
                return
            self._access.require_view(exchange)
            shown = self.shown(request.target)
            if request.path.startswith(_REQUESTS + "/"):
                await self._add_transport(shown)
            exchange.respond(200, _PRIVATE, _encode(shown))
        except RequestError as error:
            refused(exchange, error)

    def _page(self, exchange: Exchange) -> None:
        path = exchange.request.path
        if path == _PAGE + "/":
            exchange.respond(308, ((b"location", b"../console"), *_SAFE), b"")
            return
        file = self._files.get(path)
        if file is None:
            raise RequestError(f"there is no {path}; the page is {_PAGE}", status=404, kind="not_found_error")
        # Asked for again each time, and sent again only if it has changed, as it does with a new version.
        headers = ((b"content-type", file.kind), (b"etag", file.tag), (b"cache-control", b"no-cache"), *_SAFE)
        if _matches(exchange.request.headers.get(b"if-none-match", b""), file.tag):
            exchange.respond(304, headers[1:], b"")
        else:
            exchange.respond(200, headers, file.body)

    def shown(self, target: str) -> dict[str, Any]:
        """What is to be seen at a place.

        Raises:
            RequestError: there is no such request, or the query is wrong.
        """
        records, path = self._context.records, target.partition("?")[0]
        if path == _LIVE:
            return self._live(target)
        if path == _REQUESTS:
            limit = number_of(target, "limit", otherwise=100, most=1000)
            return {
                "requests": [record_json(record) for record in islice(records.newest(), limit)],
                "kept": len(records),
            }
        request_id = unquote(path.removeprefix(_REQUESTS + "/"))
        # The answer's own id is as good: it is the request's with a prefix.
        names = (request_id, request_id.removeprefix("chatcmpl-").removeprefix("cmpl-"))
        record = next(filter(None, map(records.get, names)), None)
        if record is None:
            raise RequestError(
                f"no request {request_id[:128]!r} is kept; this proxy keeps the last {records.most} (--keep-requests) "
                f"and has {len(records)} now",
                status=404,
                kind="not_found_error",
            )
        return record_json(record)

    async def _add_transport(self, shown: dict[str, Any]) -> None:
        """To one request's transfer: by what its prefill worker writes now."""
        name = shown["workers"]["prefill"]
        worker = next((one for one in self._context.fleet.of(Role.PREFILL) if one.name == name), None)
        if worker is not None and shown["transfer"] is not None:
            shown["transfer"]["transport"] = await transport_of(worker)

    def _live(self, target: str) -> dict[str, Any]:
        context = self._context
        records, metrics, now = context.records, context.metrics, time.monotonic()
        window = number_of(target, "window", otherwise=10, least=1, most=600)
        after = number_of(target, "after", otherwise=0, most=1 << 60)
        uptime = now - self._started
        workers = [worker_json(worker) for worker in context.fleet]
        return {
            "proxy": {
                "version": __version__,
                "life": context.life,
                "time": time.time(),
                "uptime_seconds": round(uptime, 3),
                "model": next((worker["model"] for worker in workers if worker["model"]), ""),
                "records": {"kept": len(records), "most": records.most},
                "prompts": context.settings.record_prompts > 0,
                "admin": self._access.has_key,
                "in_flight": metrics.in_flight,
                "requests": records.ended_count,
            },
            "workers": workers,
            "pairs": pairs_json(context.fleet),
            "live": live_json(records, now, min(window, uptime)),
            "requests": [row_json(record) for record in self._rows(after, now)],
            "after": records.ended_count,
        }

    def _rows(self, after: int, now: float) -> list[Record]:
        """Requests that have ended since the last look, and those under way; the newest first."""
        records = self._context.records
        if after > records.ended_count:
            after = 0  # of an earlier life of this proxy
        rows = list(islice(reversed(records.open.values()), _OPEN_ROWS))
        for record in records.newest_ended():
            known = record.number <= after and (record.ended is None or now - record.ended > _AGAIN_SECONDS)
            if known or len(rows) >= _ROWS:
                break
            rows.append(record)
        return rows


def _matches(asked: bytes, tag: bytes) -> bool:
    """If-None-Match, by weak comparison."""
    return asked.strip() == b"*" or tag in (part.strip().removeprefix(b"W/") for part in asked.split(b","))
