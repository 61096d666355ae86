"""``/kvbelt/workers``: operators add, drain and remove workers at run time.

::

    GET    /kvbelt/workers                  the workers, and which pairs are connected
    POST   /kvbelt/workers                  {"role": "decode", "host": "10.0.0.7", "port": 7200}: joins
    DELETE /kvbelt/workers/NAME             leaves, once no request needs it; NAME is host:port
    POST   /kvbelt/workers/NAME/drain       gets no new requests
    POST   /kvbelt/workers/NAME/undrain     is used again

A change needs ``Authorization: Bearer KEY``, the key of ``--admin-key-file``. A proxy without a key refuses it, because
an operator who can add a worker can read every prompt. Errors have OpenAI's shape.
"""

import asyncio
import logging
from urllib.parse import unquote

import msgspec

from kvbelt.errors import RequestError, SettingsError
from kvbelt.http import JSON, Exchange
from kvbelt.proxy.admin.access import Access
from kvbelt.proxy.admin.http import MethodError, parameter, refuse
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.proxy.workers.watch import Worker
from kvbelt.routing.endpoint import Health, Standing
from kvbelt.wire.health import Role
from kvbelt.wire.workers import NEW_WORKER, WorkerList, WorkerRow

log = logging.getLogger("kvbelt.proxy")

PATH = "/kvbelt/workers"

_MAX_BODY_BYTES = 4096
_VERBS = {"drain": Standing.DRAINING, "undrain": Standing.ACTIVE}
_encode = msgspec.json.Encoder().encode

Answer = tuple[int, WorkerRow | WorkerList]


def parse_new_worker(body: bytes) -> tuple[Role, Address]:
    """A worker to add. Raises RequestError: 413, the body is too large; 400, with what is wrong."""
    if len(body) > _MAX_BODY_BYTES:
        raise RequestError(f"a body of {len(body)} bytes; at most {_MAX_BODY_BYTES} are taken", status=413)
    try:
        asked = NEW_WORKER.parse(body, "the operator")
        return Role(asked.role), Address(asked.host, asked.port)
    except (ValueError, SettingsError) as error:
        raise RequestError(f'{error}; send {{"role": "prefill" or "decode", "host": …, "port": …}}') from None


class WorkersApi:
    def __init__(self, fleet: Fleet, settings: ProxySettings, access: Access) -> None:
        self._fleet = fleet
        self._access = access
        self._ask_seconds = settings.health_timeout_seconds

    @staticmethod
    def serves(path: str) -> bool:
        return path == PATH or path.startswith(PATH + "/")

    async def handle(self, exchange: Exchange) -> None:
        try:
            status, body = await self._answer(exchange)
        except RequestError as error:
            refuse(exchange, error)
        else:
            exchange.respond(status, (JSON,), _encode(body))

    async def _answer(self, exchange: Exchange) -> Answer:
        request = exchange.request
        method = "GET" if request.method == "HEAD" else request.method
        name, _, verb = request.path.removeprefix(PATH).strip("/").partition("/")
        name = unquote(name)
        match method, bool(name), verb:
            case "GET", False, "":
                fleet = self._fleet
                return 200, WorkerList(workers=fleet.rows(), pairs=fleet.pair_rows(), admin=self._access.has_key)
            case "POST", False, "":
                self._access.require_admin(exchange)
                return await self._add(request.body)
            case "GET", True, "":
                return 200, self._named(exchange, name).row()
            case "DELETE", True, "":
                self._access.require_admin(exchange)
                worker = self._named(exchange, name)
                worker.set_standing(Standing.LEAVING)
                log.info("%s worker %s is leaving; %d requests need it", worker.role, worker.name, worker.in_flight)
                return 202, worker.row()
            case "POST", True, ("drain" | "undrain"):
                self._access.require_admin(exchange)
                worker = self._named(exchange, name)
                worker.set_standing(_VERBS[verb])
                log.info("worker %s (%s) is %s", worker.name, worker.role, _VERBS[verb])
                return 200, worker.row()
        if verb and verb not in _VERBS:
            message = f"there is no {request.path}; a worker can be drained and undrained"
            raise RequestError(message, status=404, kind="not_found_error")
        allowed = "POST" if verb else "GET, DELETE" if name else "GET, POST"
        raise MethodError(f"{request.path} takes {allowed}, not {method}", allowed)

    def _named(self, exchange: Exchange, name: str) -> Worker:
        role = parameter(exchange.request.target, "role")
        if role not in (None, Role.PREFILL, Role.DECODE):
            raise RequestError(f"role is {role!r}; it is prefill or decode", param="role")
        return self._fleet.named(name, None if role is None else Role(role))

    async def _add(self, body: bytes) -> Answer:
        worker = self._fleet.add(*parse_new_worker(body))
        worker.set_standing(Standing.DRAINING)  # until it is known to fit
        try:
            misfit = await self._misfit(worker)
        except asyncio.CancelledError:
            worker.set_standing(Standing.LEAVING)  # the operator has closed the connection
            raise
        if misfit is not None:
            worker.set_standing(Standing.LEAVING)
            raise RequestError(f"{worker.name} was not added: {misfit}", status=409, kind="conflict_error")
        worker.set_standing(Standing.ACTIVE)
        log.info("%s worker %s has joined; it is %s", worker.role, worker.name, worker.endpoint.report.health)
        return 201, worker.row()

    async def _misfit(self, worker: Worker) -> str | None:
        """Why a worker does not fit this proxy; None: it fits, although it may still be loading."""
        try:
            async with asyncio.timeout(self._ask_seconds):
                await worker.wait_until_known()
        except TimeoutError:
            return f"it has not answered /health within {self._ask_seconds:g} s; start it first"
        report = worker.endpoint.report
        if report.role is not None and not report.role.serves(worker.role):
            return f"its role is {report.role}; add it as that"
        if report.health is not Health.READY and not report.model:
            return f"it is not a worker, or not up: {report.detail}"
        served = {one.endpoint.report.model for one in self._fleet if one is not worker and one.healthy} - {""}
        if report.model and served and report.model not in served:
            return f"it serves {report.model!r}, the others serve {', '.join(map(repr, sorted(served)))}"
        return None
