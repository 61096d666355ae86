"""The proxy's routes, and the start and end of its parts."""

import asyncio
import ctypes
import gc
import logging
import re
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import uvloop

from kvbelt.about import of_this_process
from kvbelt.errors import RequestError, StartError
from kvbelt.http import JSON, BadRequestError, Exchange, Server, ServerLimits
from kvbelt.proxy import openapi
from kvbelt.proxy.admin.access import Access
from kvbelt.proxy.admin.console import Console
from kvbelt.proxy.admin.doctor import Doctor
from kvbelt.proxy.admin.http import MethodError, allow, refuse
from kvbelt.proxy.admin.workers_api import PATH, WorkersApi
from kvbelt.proxy.context import Context
from kvbelt.proxy.cors import Cors, is_preflight
from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.observe.request_log import RequestLog
from kvbelt.proxy.request import models
from kvbelt.proxy.request.handler import RequestHandler
from kvbelt.proxy.request.other_routes import PassedRequest, route_of
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers.discovery import Discovery
from kvbelt.proxy.workers.notifications import Notifications
from kvbelt.routing.ratio import lopsided
from kvbelt.telemetry import configure_logging
from kvbelt.wire.api_error import error_body
from kvbelt.wire.health import NotificationPort, ProxyHealth, Role

log = logging.getLogger("kvbelt.proxy")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_CHAT = "/v1/chat/completions"
#: What belongs to operators: no page of another origin reads it.
_OWN = ("/kvbelt", "/console", "/metrics")
_encode = msgspec.json.Encoder().encode

Route = Callable[[Exchange], Awaitable[None]]


class Proxy:
    """One proxy: ``start``, then ``close``. The caller handles signals."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.context = Context(settings)
        self.port = 0  #: set by ``start``
        self.notification_port = 0  #: set by ``start``
        self._server = Server(
            self._handle,
            limits=ServerLimits(body_bytes=settings.limits.body_bytes),
            refusal=self._refusal,
        )
        self._cors = Cors(settings.allowed_origins)
        self._notifications = Notifications(self.context.notified, settings.keys, self.context.metrics.refusals)
        self._draining = False
        self._access = access = Access(settings)
        self._admin = WorkersApi(self.context.fleet, settings, access)
        self._doctor = Doctor(settings, lambda: self.port)
        self._console = Console(self.context, access, self._doctor)
        self._discovery = Discovery(self.context.fleet, settings) if settings.discover else None
        self._request_log = RequestLog(settings.request_lines_per_second)
        self._routes: dict[str, tuple[str, Route]] = {
            "/v1/completions": ("POST", self._generate),
            _CHAT: ("POST", self._generate),
            models.LIST: ("GET", self._models),
            "/health": ("GET", self._health),
            "/kvbelt/about": ("GET", self._about),
            "/kvbelt/drain": ("POST", self._drain),
            "/metrics": ("GET", self._metrics),
            openapi.PATH: ("GET", self._openapi),
        }

    async def start(self) -> None:
        """Listen on both ports, and begin to watch the workers. Raises StartError: a port is taken."""
        settings = self.settings
        self.notification_port = self._notifications.start(settings.notification_host, settings.notification_port)
        try:
            self.port = await self._server.start(settings.host, settings.port)
        except OSError as error:
            self._notifications.close()
            raise StartError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port"
            ) from None
        self.context.fleet.start()
        if self._discovery is not None:
            await self._discovery.start()
        self.context.warmer.start()
        self.context.tracer.start()
        self.context.shadow.start()
        if (problem := lopsided(len(settings.prefill), len(settings.decode))) is not None:
            log.warning("%s", problem)
        at = f"{settings.host}:{self.port}"
        log.info("proxy on %s, notifications on %s (%s)", at, self.notification_port, self._notifications.mechanism)

    async def workers_asked(self) -> None:
        """Wait for every worker's first health check, and until healthy workers are connected."""
        for worker in list(self.context.fleet):
            await worker.wait_until_known()
        await self.context.warmer.settled()

    async def close(self) -> None:
        """Let open requests end within ``drain_seconds``, cut the rest, and free everything. Idempotent."""
        if (open_requests := self.context.metrics.in_flight) > 0:
            log.info("stopping; %d open requests have %g s", open_requests, self.settings.drain_seconds)
        await self._server.close(self.settings.drain_seconds)
        if self._discovery is not None:
            await self._discovery.close()
        self.context.dispatcher.close()
        await self.context.warmer.close()
        await self.context.shadow.close()
        await self._doctor.close()
        await asyncio.to_thread(self.context.tracer.close)
        await self.context.fleet.close()
        self._notifications.close()
        self._request_log.close()
        # The loop frees closed transports in its next turn.
        await asyncio.sleep(0)

    def cut(self) -> None:
        """While ``close`` waits for open requests: cut them now."""
        self._server.abort()

    # Routes

    def _refusal(self, error: BadRequestError) -> tuple[Sequence[tuple[bytes, bytes]], bytes]:
        body = error_body(str(error), kind=_kind(error.status), code=error.status)
        return (JSON, *self._cors.headers(error.asked)), body

    async def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        if shared := not request.path.startswith(_OWN):
            exchange.more = self._cors.headers(request.headers)
        try:
            if request.method == "OPTIONS":
                self._options(exchange, shared=shared)
            elif (answering := self._answer(exchange)) is not None:
                await answering
        except RequestError as error:
            refuse(exchange, error)

    def _options(self, exchange: Exchange, *, shared: bool) -> None:
        """Answer a browser's preflight request, or say which methods there are (RFC 9110, 9.3.7)."""
        asked = exchange.request.headers
        if shared and is_preflight(asked):
            exchange.respond(200, self._cors.preflight(asked), b"")
        else:
            exchange.respond(204, ((b"allow", self._methods(exchange.request.path).encode()),), b"")

    def _methods(self, path: str) -> str:
        """The methods of a path, as the header ``Allow`` has them. Raises RequestError 404: there is no such path."""
        if path == "*" or WorkersApi.serves(path):
            return "GET, HEAD, POST, DELETE, OPTIONS"
        if path.startswith(models.ONE) or Console.serves(path):
            return allow("GET")
        if (route := self._routes.get(path)) is not None:
            return allow(route[0])
        if (passed := route_of(path)) is not None:
            return allow(*passed.methods)
        raise self._no_route(path)

    def _no_route(self, path: str) -> RequestError:
        served = ", ".join((*self._routes, *Console.PLACES, PATH))
        message = f"there is no {path}; this server has {served}, and docs/configuration.md lists those of vLLM"
        return RequestError(message, status=404, kind="not_found_error")

    # These return what is to be awaited: each coroutine between costs a little at every wait.

    def _answer(self, exchange: Exchange) -> Awaitable[None] | None:
        path = exchange.request.path
        route = self._routes.get(path)
        asked = exchange.request.method
        if route is None and path.startswith(models.ONE):
            route = ("GET", self._model)
        if route is not None:
            method, answer = route
            if asked == method or (asked == "HEAD" and method == "GET"):
                return answer(exchange)
            raise _not_allowed(exchange, allow(method))
        if WorkersApi.serves(path):
            return self._admin.handle(exchange)
        if Console.serves(path):
            return self._console.handle(exchange)
        if (passed := route_of(path)) is not None:
            if exchange.request.method in passed.methods or (asked == "HEAD" and "GET" in passed.methods):
                return self._recorded(exchange, passed.path, partial(PassedRequest, route=passed))
            raise _not_allowed(exchange, allow(*passed.methods))
        if path == "/" and self._console.leads_to_page(exchange):
            return None
        raise self._no_route(path)

    def _generate(self, exchange: Exchange) -> Awaitable[None]:
        path = exchange.request.path
        kind = exchange.request.headers.get(b"content-type")
        if kind is not None and kind.partition(b";")[0].strip().lower() != JSON[1]:
            # Also so that a page of another origin cannot ask without a preflight request.
            shown = kind[:80].decode("latin-1")
            raise RequestError(f"content type {shown!r} is not supported; send {JSON[1].decode()}", status=415)
        return self._recorded(exchange, path, partial(RequestHandler, chat=path == _CHAT))

    async def _recorded(
        self,
        exchange: Exchange,
        route: str,
        handler: Callable[[Context, Exchange, Record], RequestHandler | PassedRequest],
    ) -> None:
        if self._draining:
            raise RequestError("this proxy is stopping; ask another", status=503, kind="service_unavailable_error")
        context = self.context
        metrics = context.metrics
        given = exchange.request.headers.get(b"x-request-id")
        if given is None or not _REQUEST_ID.match(request_id := given.decode("latin-1")):
            request_id = context.new_id()
        elif request_id in context.records.open:  # engines tell requests apart by this id
            request_id = f"{request_id[:96]}-{context.new_id()}"
        record = Record(request_id, route, exchange.request.arrived, time.time())
        record.trace = context.tracer.begin(exchange.request.headers)
        context.records.add(record)
        metrics.in_flight += 1
        try:
            await handler(context, exchange, record).run()
            record.status = exchange.status
        except asyncio.CancelledError:
            record.status = 499  # nginx's status for a client that left
            record.errors += ("the client closed its connection",)
            raise
        finally:
            context.records.end(record)
            metrics.ended(record)
            self._request_log.ended(record)
            context.tracer.ended(record)

    async def _models(self, exchange: Exchange) -> None:
        await models.answer_list(self.context, exchange)

    async def _model(self, exchange: Exchange) -> None:
        await models.answer_one(self.context, exchange)

    async def _health(self, exchange: Exchange) -> None:
        # Ready means connected as well, which takes a bounded time, so that a client begins with a warm deployment.
        ready = any(worker.ready and not worker.endpoint.warming for worker in self.context.fleet.of(Role.DECODE))
        ready = ready and not self._draining
        body = ProxyHealth(
            status="ok" if ready else "unavailable",
            state="draining" if self._draining else "ready" if ready else "waiting",
            open_requests=self.context.metrics.in_flight,
            notifications=NotificationPort(self.notification_port, self._notifications.mechanism),
            workers=self.context.fleet.rows(),
            placement=self.context.shadow.now(),
        )
        exchange.respond(200 if ready else 503, (JSON,), _encode(body))

    async def _drain(self, exchange: Exchange) -> None:
        """Take no more requests, so that the caller can stop this proxy when ``/health`` says that none is open."""
        self._access.require_admin(exchange)
        self._draining = True
        log.info("no more requests are taken; %d are open", self.context.metrics.in_flight)
        await self._health(exchange)

    async def _about(self, exchange: Exchange) -> None:
        exchange.respond(200, (JSON,), _encode(of_this_process("proxy")))

    async def _openapi(self, exchange: Exchange) -> None:
        exchange.respond(200, (JSON,), openapi.document())

    async def _metrics(self, exchange: Exchange) -> None:
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        exchange.respond(200, ((b"content-type", kind),), self.context.metrics.text())


def _not_allowed(exchange: Exchange, allowed: str) -> MethodError:
    request = exchange.request
    return MethodError(f"{request.path} takes {allowed}, not {request.method}", allowed)


def _kind(status: int) -> str:
    return "internal_error" if status >= 500 else "invalid_request_error"


def calm_collector() -> None:
    """Make garbage collections rare: requests leave almost no cycles, and each collection is a pause.

    What exists at the start is left out. With the interpreter's defaults, collections took 6 % of the proxy's time, the
    largest 12 ms (``gc.callbacks``, under the load of ``benchmarks.proxy_overhead``).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


#: Freed bytes that stay with the process, and the size from which a block is mapped apart, and so given back at once.
_KEPT_BYTES, _LARGE_BYTES = 64 << 20, 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what requests free, for the next ones. Other C libraries have no such setting.

    By default it gives more than 128 KiB of free memory back to the system, which the next bodies take again: that was
    2 to 10 page faults a request of 30 KB, each of one or two microseconds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


async def serve(settings: ProxySettings) -> None:
    """Serve until told to stop. Told again, it cuts what is open. Raises StartError: a port is taken."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    proxy = Proxy(settings)

    def told() -> None:
        if stop.is_set():
            proxy.cut()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    keep_freed_memory()
    await proxy.start()
    calm_collector()
    try:
        await stop.wait()
    finally:
        await proxy.close()


def run_proxy(settings: ProxySettings, *, log_json: bool = False) -> None:
    configure_logging(json=log_json)
    uvloop.run(serve(settings))
