"""``kvbelt proxy``: the routes, and the life of the process's parts."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable

import msgspec

from kvbelt.about import of_this_process
from kvbelt.errors import StartError
from kvbelt.http import Exchange, HttpError, Server, ServerLimits
from kvbelt.proxy.access import Access
from kvbelt.proxy.admin import Admin
from kvbelt.proxy.answers import JSON, error_body
from kvbelt.proxy.console import Console
from kvbelt.proxy.context import Context
from kvbelt.proxy.discovery import Discovery
from kvbelt.proxy.journey import Journey
from kvbelt.proxy.notifications import Notifications
from kvbelt.proxy.records import Record
from kvbelt.proxy.request_log import RequestLog
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.worker_view import worker_json
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role
from kvbelt.routing.ratio import lopsided

log = logging.getLogger("kvbelt.proxy")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_MAX_MODELS_BYTES = 4 * 1024 * 1024
_encode = msgspec.json.Encoder().encode

Route = Callable[[Exchange], Awaitable[None]]


class Proxy:
    """One proxy. ``start``, then ``close``; signals are the caller's."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.context = Context(settings)
        self.port = 0  #: once started
        self.notification_port = 0  #: once started
        self._server = Server(
            self._handle,
            limits=ServerLimits(body_bytes=settings.max_body_bytes),
            refusal_body=lambda error: (JSON[1], error_body(str(error), kind=_kind(error.status), code=error.status)),
        )
        self._notifications = Notifications(self.context.notified, settings.keys, self.context.metrics.refusals)
        access = Access(settings)
        self._admin = Admin(self.context.fleet, settings, access)
        self._console = Console(self.context, access)
        self._discovery = Discovery(self.context.fleet, settings) if settings.discover else None
        self._request_log = RequestLog(settings.request_lines_per_second)
        self._routes: dict[str, tuple[str, Route]] = {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/kvbelt/about": ("GET", self._about),
            "/metrics": ("GET", self._metrics),
        }

    @property
    def _workers(self) -> list[Worker]:
        return list(self.context.fleet)

    async def start(self) -> None:
        """Listen on both ports and begin to watch the workers.

        Raises:
            StartError: a port is taken.
        """
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
        if (problem := lopsided(len(settings.prefill), len(settings.decode))) is not None:
            log.warning("%s", problem)
        log.info(
            "proxy on %s:%s, notifications on %s (%s)",
            settings.host,
            self.port,
            self.notification_port,
            self._notifications.mechanism,
        )

    async def workers_asked(self) -> None:
        """Wait until every worker's health is known for the first time, and whoever is healthy has been connected."""
        for worker in self._workers:
            await worker.watched()
        await self.context.warmer.settled()

    async def close(self) -> None:
        """Let open requests end within ``drain_seconds``, cut the rest, and free everything. Idempotent."""
        await self._server.close(self.settings.drain_seconds)
        if self._discovery is not None:
            await self._discovery.close()
        await self.context.warmer.close()
        await asyncio.to_thread(self.context.tracer.close)
        await self.context.fleet.close()
        self._notifications.close()
        self._request_log.close()
        # Closed transports are freed by the loop's next turn.
        await asyncio.sleep(0)

    # Routes

    async def _handle(self, exchange: Exchange) -> None:
        path = exchange.request.path
        route = self._routes.get(path)
        if route is None:
            if Admin.serves(path):
                await self._admin.handle(exchange)
                return
            if Console.serves(path):
                await self._console.handle(exchange)
                return
            served = ", ".join((*self._routes, *Console.PLACES, Admin.PLACE))
            _refuse(exchange, 404, f"there is no {path}; this server has {served}", "not_found_error")
            return
        method, answer = route
        asked = exchange.request.method
        if asked != method and not (asked == "HEAD" and method == "GET"):
            _refuse(
                exchange,
                405,
                f"{path} takes {method}, not {asked}",
                "invalid_request_error",
                (b"allow", method.encode()),
            )
            return
        await answer(exchange)

    async def _completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, "/v1/completions", chat=False)

    async def _chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, "/v1/chat/completions", chat=True)

    async def _generate(self, exchange: Exchange, route: str, *, chat: bool) -> None:
        context = self.context
        metrics = context.metrics
        request_id = exchange.request.headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.match(request_id):
            request_id = context.new_id()
        elif request_id in context.records.open:  # engines know requests by this id
            request_id = f"{request_id[:96]}-{context.new_id()}"
        record = Record(request_id, route, exchange.request.arrived, time.time())
        record.trace = context.tracer.begin(exchange.request.headers)
        context.records.add(record)
        metrics.in_flight += 1
        try:
            await Journey(context, exchange, record, chat=chat).run()
            record.status = exchange.status
        except asyncio.CancelledError:
            record.status = 499  # nginx's word for a client that closed its request
            record.errors += ("the client closed its connection",)
            raise
        finally:
            context.records.end(record)
            metrics.ended(record)
            self._request_log.ended(record)
            context.tracer.ended(record)

    async def _models(self, exchange: Exchange) -> None:
        tried: frozenset[str] = frozenset()
        headers = [(n, v) for n, v in exchange.request.headers.items() if n == b"authorization"]
        while (worker := self.context.fleet.pick_decode(tried)) is not None:
            try:
                async with asyncio.timeout(self.settings.health_timeout_seconds):
                    response = await worker.get("/v1/models", headers)
                    body = await response.read(_MAX_MODELS_BYTES)
            except (HttpError, TimeoutError):
                worker.suspect()
                tried |= {worker.endpoint.life}
                continue
            kind = response.headers.get(b"content-type", JSON[1])
            exchange.respond(response.status, ((b"content-type", kind),), body)
            return
        _refuse(exchange, 503, "no decode worker is ready; try again", "unavailable", (b"retry-after", b"1"))

    async def _health(self, exchange: Exchange) -> None:
        # Connected as well, which takes a bounded time: whoever waits for this begins with a warm deployment.
        ready = any(worker.ready and not worker.endpoint.warming for worker in self.context.fleet.of(Role.DECODE))
        workers = [worker_json(worker) for worker in self._workers]
        body = {
            "status": "ok" if ready else "unavailable",
            "state": "ready" if ready else "waiting",
            "notifications": {"port": self.notification_port, "mechanism": self._notifications.mechanism},
            "workers": workers,
        }
        exchange.respond(200 if ready else 503, (JSON,), _encode(body))

    async def _about(self, exchange: Exchange) -> None:
        exchange.respond(200, (JSON,), _encode(of_this_process("proxy")))

    async def _metrics(self, exchange: Exchange) -> None:
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        exchange.respond(200, ((b"content-type", kind),), self.context.metrics.text())


def _refuse(exchange: Exchange, status: int, message: str, kind: str, *more: tuple[bytes, bytes]) -> None:
    exchange.respond(status, (JSON, *more), error_body(message, kind=kind, code=status))


def _kind(status: int) -> str:
    return "internal_error" if status >= 500 else "invalid_request_error"


async def serve(settings: ProxySettings, stop: asyncio.Event) -> None:
    """Run a proxy until ``stop`` is set.

    Raises:
        StartError: a port is taken.
    """
    proxy = Proxy(settings)
    await proxy.start()
    try:
        await stop.wait()
    finally:
        await proxy.close()
