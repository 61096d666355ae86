"""Workers join and leave at run time: ``/kvbelt/workers``, for operators.

::

    GET    /kvbelt/workers                  who there is, and which pairs are connected
    POST   /kvbelt/workers                  {"role": "decode", "host": "10.0.0.7", "port": 7200}: joins
    DELETE /kvbelt/workers/NAME             leaves, once nobody needs it; NAME is host:port
    POST   /kvbelt/workers/NAME/drain       gets nothing new
    POST   /kvbelt/workers/NAME/undrain     is used again

What changes something asks for ``Authorization: Bearer KEY``, the key of ``--admin-key-file``. A proxy without a key
refuses it: whoever may add a worker may read every prompt. Errors have OpenAI's shape.
"""

import asyncio
import logging
from typing import Literal
from urllib.parse import parse_qs, unquote

import msgspec

from kvbelt.errors import RequestError, SettingsError
from kvbelt.http import Exchange
from kvbelt.proxy.access import Access
from kvbelt.proxy.answers import JSON, error_body
from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.worker_view import pairs_json, worker_json
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Health, Role, Standing
from kvbelt.wire.json_body import JsonDecoder

log = logging.getLogger("kvbelt.proxy")

PATH = "/kvbelt/workers"

_MAX_BODY_BYTES = 4096
_VERBS = {"drain": Standing.DRAINING, "undrain": Standing.ACTIVE}
_encode = msgspec.json.Encoder().encode


class NewWorker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is to join."""

    role: Literal["prefill", "decode"]
    host: str
    port: int


_decoder: JsonDecoder[NewWorker] = JsonDecoder(NewWorker)


def parse_new_worker(body: bytes) -> tuple[Role, Address]:
    """The body of a request that adds a worker.

    Raises:
        RequestError: 413, it is too large; 400, with what is wrong.
    """
    if len(body) > _MAX_BODY_BYTES:
        raise RequestError(f"a body of {len(body)} bytes; at most {_MAX_BODY_BYTES} are taken", status=413)
    try:
        asked = _decoder.decode(body)
        return Role(asked.role), Address(asked.host, asked.port)
    except (ValueError, SettingsError) as error:
        raise RequestError(f'{error}; send {{"role": "prefill" or "decode", "host": …, "port": …}}') from None


class MethodError(RequestError):
    """405, and what is allowed."""

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message, status=405)
        self.allowed = allowed


def refused(exchange: Exchange, error: RequestError) -> None:
    """Answer with an error, in OpenAI's shape."""
    more = {401: (b"www-authenticate", b"Bearer")}.get(error.status)
    if isinstance(error, MethodError):
        more = (b"allow", error.allowed.encode())
    said = error_body(error.message, kind=error.kind, param=error.param, code=error.status)
    exchange.respond(error.status, (JSON,) if more is None else (JSON, more), said)


class Admin:
    """Answers the requests of operators."""

    PLACE = PATH

    def __init__(self, fleet: Fleet, settings: ProxySettings, access: Access) -> None:
        self._fleet = fleet
        self._access = access
        self._ask_seconds = settings.health_timeout_seconds

    @staticmethod
    def serves(path: str) -> bool:
        """Whether a path is one of these."""
        return path == PATH or path.startswith(PATH + "/")

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            status, body = await self._answer(exchange)
        except RequestError as error:
            refused(exchange, error)
        else:
            exchange.respond(status, (JSON,), _encode(body))

    async def _answer(self, exchange: Exchange) -> tuple[int, object]:
        request = exchange.request
        method = "GET" if request.method == "HEAD" else request.method
        name, _, verb = request.path.removeprefix(PATH).strip("/").partition("/")
        name = unquote(name)
        match method, bool(name), verb:
            case "GET", False, "":
                workers = [worker_json(worker) for worker in self._fleet]
                return 200, {"workers": workers, "pairs": pairs_json(self._fleet), "admin": self._access.has_key}
            case "POST", False, "":
                self._access.require_admin(exchange)
                return await self._add(request.body)
            case "GET", True, "":
                return 200, worker_json(self._named(exchange, name))
            case "DELETE", True, "":
                self._access.require_admin(exchange)
                return self._remove(self._named(exchange, name))
            case "POST", True, ("drain" | "undrain"):
                self._access.require_admin(exchange)
                worker = self._named(exchange, name)
                worker.stand(_VERBS[verb])
                log.info("worker %s (%s) is %s", worker.name, worker.role, _VERBS[verb])
                return 200, worker_json(worker)
        return self._refuse(request.path, method, named=bool(name), verb=verb)

    def _refuse(self, path: str, method: str, *, named: bool, verb: str) -> tuple[int, object]:
        if verb and verb not in _VERBS:
            raise RequestError(
                f"there is no {path}; a worker can be drained and undrained", status=404, kind="not_found_error"
            )
        allowed = "POST" if verb else "GET, DELETE" if named else "GET, POST"
        raise MethodError(f"{path} takes {allowed}, not {method}", allowed)

    def _named(self, exchange: Exchange, name: str) -> Worker:
        asked = parse_qs(exchange.request.target.partition("?")[2]).get("role", [None])[-1]
        if asked not in (None, Role.PREFILL, Role.DECODE):
            raise RequestError(f"role is {asked!r}; it is prefill or decode", param="role")
        return self._fleet.named(name, None if asked is None else Role(asked))

    async def _add(self, body: bytes) -> tuple[int, object]:
        worker = self._fleet.add(*parse_new_worker(body))
        worker.stand(Standing.DRAINING)  # until it is known to fit
        try:
            misfit = await self._misfit(worker)
        except asyncio.CancelledError:
            self._fleet.remove(worker)  # the operator went away before hearing whether it fits
            raise
        if misfit is not None:
            self._fleet.remove(worker)
            raise RequestError(f"{worker.name} was not added: {misfit}", status=409, kind="conflict_error")
        worker.stand(Standing.ACTIVE)
        log.info("%s worker %s has joined; it is %s", worker.role, worker.name, worker.endpoint.report.health)
        return 201, worker_json(worker)

    async def _misfit(self, worker: Worker) -> str | None:
        """Why a worker cannot be one of this proxy's; None: it can, although it may still be loading."""
        try:
            async with asyncio.timeout(self._ask_seconds):
                await worker.watched()
        except TimeoutError:
            return f"it has not said within {self._ask_seconds:g} s how it is; start it first"
        report = worker.endpoint.report
        if report.role is not None and not report.role.serves(worker.role):
            return f"it says that its role is {report.role}; add it as that"
        if report.health is not Health.READY and not report.model:
            return f"it is no worker, or not up: {report.detail}"
        served = {one.endpoint.report.model for one in self._fleet if one is not worker and one.healthy} - {""}
        if report.model and served and report.model not in served:
            return f"it serves {report.model!r}, the others serve {', '.join(map(repr, sorted(served)))}"
        return None

    def _remove(self, worker: Worker) -> tuple[int, object]:
        self._fleet.remove(worker)
        log.info("%s worker %s is leaving; %d requests need it", worker.role, worker.name, worker.in_flight)
        return 202, worker_json(worker)
