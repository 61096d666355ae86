"""The page at ``/console``, its data, and the records of requests.

::

    GET /console                     the page; its files are below it, and ``/`` leads browsers there
    GET /kvbelt/console.json         all that it shows: ?window=SECONDS of rates, requests that have ended ?after=N;
                                     with ?doctor=1 the doctor's first finding
    GET /kvbelt/requests             the last requests in full, ?limit=N of them
    GET /kvbelt/requests/ID          one of them

The page's files hold no data. ``access.py`` says who may read the rest.
"""

import hashlib
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

import msgspec

from kvbelt import __version__, stall_aware_clock
from kvbelt.errors import RequestError
from kvbelt.http import JSON, Exchange, HttpError
from kvbelt.proxy.admin.access import Access
from kvbelt.proxy.admin.doctor import Doctor
from kvbelt.proxy.admin.http import MethodError, number_of, refuse
from kvbelt.proxy.context import Context
from kvbelt.proxy.observe.alarms import alarms
from kvbelt.proxy.observe.live import live_stats
from kvbelt.proxy.observe.record_view import request_record, request_row
from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.workers.watch import Worker
from kvbelt.wire.about import ABOUT
from kvbelt.wire.console import ConsoleState, ProxyStatus, RecordCounts
from kvbelt.wire.health import Role
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.request_record import RequestList, RequestRecord

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

#: Nothing from another origin, no inline script, no frame.
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
#: Of the data, which no cache may keep.
_PRIVATE = (JSON, (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))

_ROWS = 200  #: ended requests in one answer
_OPEN_ROWS = 50  #: requests under way in one answer
#: A transfer may be reported a little after its request has ended: the request is sent again for so long.
_AGAIN_SECONDS = 3.0

_ABOUT_SECONDS = 1.0  #: an operator who opens a record should not wait long for its transport
_MAX_ABOUT_BYTES = 256 * 1024

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
    PLACES = (_PAGE, _LIVE, _REQUESTS)

    def __init__(self, context: Context, access: Access, doctor: Doctor) -> None:
        self._context = context
        self._doctor = doctor
        self._access = access
        self._files = _read_page()
        self._started = time.monotonic()

    @classmethod
    def serves(cls, path: str) -> bool:
        return path in cls.PLACES or path.startswith((_PAGE + "/", _REQUESTS + "/"))

    @staticmethod
    def leads_to_page(exchange: Exchange) -> bool:
        """Answer ``/`` for a browser, which names HTML. Programs are told the routes instead."""
        request = exchange.request
        if request.method not in ("GET", "HEAD") or b"text/html" not in request.headers.get(b"accept", b"").lower():
            return False
        exchange.respond(307, ((b"location", _PAGE[1:].encode()), (b"vary", b"accept"), *_SAFE), b"")
        return True

    async def handle(self, exchange: Exchange) -> None:
        request = exchange.request
        try:
            if request.method not in ("GET", "HEAD"):
                raise MethodError(f"{request.path} takes GET, not {request.method}", "GET")
            if request.path.startswith(_PAGE):
                self._page(exchange)
                return
            self._access.require_view(exchange)
            shown = self.shown(request.target)
            if isinstance(shown, ConsoleState) and number_of(request.target, "doctor", otherwise=0, most=1):
                shown = msgspec.structs.replace(shown, doctor=self._doctor.finding())
            if isinstance(shown, RequestRecord):
                shown = await self._with_transport(shown)
            exchange.respond(200, _PRIVATE, _encode(shown))
        except RequestError as error:
            refuse(exchange, error)

    def _page(self, exchange: Exchange) -> None:
        path = exchange.request.path
        if path == _PAGE + "/":
            exchange.respond(308, ((b"location", b"../console"), *_SAFE), b"")
            return
        file = self._files.get(path)
        if file is None:
            raise RequestError(f"there is no {path}; the page is {_PAGE}", status=404, kind="not_found_error")
        # Browsers ask each time, and get the file again only if it has changed, as it does with a new version.
        headers = ((b"content-type", file.kind), (b"etag", file.tag), (b"cache-control", b"no-cache"), *_SAFE)
        if _matches(exchange.request.headers.get(b"if-none-match", b""), file.tag):
            exchange.respond(304, headers[1:], b"")
        else:
            exchange.respond(200, headers, file.body)

    def shown(self, target: str) -> ConsoleState | RequestList | RequestRecord:
        """The data at a place. Raises RequestError: there is no such request, or the query is wrong."""
        records, path = self._context.records, target.partition("?")[0]
        if path == _LIVE:
            return self._state(target)
        if path == _REQUESTS:
            limit = number_of(target, "limit", otherwise=100, most=1000)
            newest = [request_record(record) for record in islice(records.newest(), limit)]
            return RequestList(requests=newest, kept=len(records))
        return request_record(self._record(path))

    def _record(self, path: str) -> Record:
        records = self._context.records
        request_id = unquote(path.removeprefix(_REQUESTS + "/"))
        # The answer's own id, which is the request's with a prefix, is as good.
        names = (request_id, request_id.removeprefix("chatcmpl-").removeprefix("cmpl-"))
        record = next(filter(None, map(records.get, names)), None)
        if record is None:
            raise RequestError(
                f"no request {request_id[:128]!r} is kept; this proxy keeps the last {records.most} (--keep-requests) "
                f"and has {len(records)} now",
                status=404,
                kind="not_found_error",
            )
        return record

    async def _with_transport(self, record: RequestRecord) -> RequestRecord:
        """With the transport by which the prefill worker writes now."""
        worker = next((w for w in self._context.fleet.of(Role.PREFILL) if w.name == record.workers.prefill), None)
        if worker is None or record.transfer is None:
            return record
        transfer = msgspec.structs.replace(record.transfer, transport=await _transport_of(worker))
        return msgspec.structs.replace(record, transfer=transfer)

    def _state(self, target: str) -> ConsoleState:
        context = self._context
        records, now = context.records, time.monotonic()
        window = number_of(target, "window", otherwise=10, least=1, most=600)
        after = number_of(target, "after", otherwise=0, most=1 << 60)
        uptime = now - self._started
        workers, pairs = context.fleet.rows(), context.fleet.pair_rows()
        live = live_stats(records, now, min(window, uptime))
        return ConsoleState(
            proxy=ProxyStatus(
                version=__version__,
                life=context.incarnation,
                time=time.time(),
                uptime_seconds=round(uptime, 3),
                model=next((worker.model for worker in workers if worker.model), ""),
                records=RecordCounts(len(records), records.most),
                prompts=context.settings.record_prompts > 0,
                admin=self._access.has_key,
                in_flight=context.metrics.in_flight,
                requests=records.ended_count,
                placement=context.shadow.now(),
            ),
            workers=workers,
            pairs=pairs,
            live=live,
            requests=[request_row(record) for record in self._rows(after, now)],
            after=records.ended_count,
            alarms=alarms(workers, pairs, live),
        )

    def _rows(self, after: int, now: float) -> list[Record]:
        """Requests that have ended since the last question, and those under way; the newest first."""
        records = self._context.records
        if after > records.ended_count:
            after = 0  # the page has counted requests of an earlier proxy process
        rows = list(islice(reversed(records.open.values()), _OPEN_ROWS))
        for record in records.newest_ended():
            known = record.number <= after and (record.ended is None or now - record.ended > _AGAIN_SECONDS)
            if known or len(rows) >= _ROWS:
                break
            rows.append(record)
        return rows


async def _transport_of(worker: Worker) -> str | None:
    """As ``"cma/memory"``, with the scope of each where there are several. None: unknown; vLLM has no such route."""
    try:
        async with stall_aware_clock.timeout(_ABOUT_SECONDS):
            response = await worker.call("GET", "/kvbelt/about")
            about = ABOUT.parse(await response.read(_MAX_ABOUT_BYTES), worker.name)
    except (TimeoutError, HttpError, MessageError):
        return None
    writes = {choice.transport: choice.scope for choice in about.transports if choice.operation == "write"}
    if len(writes) == 1:
        return next(iter(writes))
    return ", ".join(f"{transport} ({scope})" if scope else transport for transport, scope in writes.items()) or None


def _matches(asked: bytes, tag: bytes) -> bool:
    return asked.strip() == b"*" or tag in (part.strip().removeprefix(b"W/") for part in asked.split(b","))
