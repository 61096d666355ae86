"""``/v1/models`` and ``/v1/models/{id}``: what a worker says that it serves."""

import asyncio

import msgspec

from kvbelt.errors import RequestError
from kvbelt.http import JSON, Exchange, HttpError
from kvbelt.proxy.context import Context
from kvbelt.wire.health import Role
from kvbelt.wire.json_body import JsonDecoder

LIST = "/v1/models"
ONE = f"{LIST}/"  #: its path ends in the model's name, which may have slashes

_MAX_BYTES = 4 * 1024 * 1024


class _Card(msgspec.Struct, frozen=True):
    id: str


class _Cards(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]


_cards: JsonDecoder[_Cards] = JsonDecoder(_Cards)
_card: JsonDecoder[_Card] = JsonDecoder(_Card)


async def answer_list(context: Context, exchange: Exchange) -> None:
    status, kind, body = await _asked(context, exchange)
    exchange.respond(status, ((b"content-type", kind),), body)


async def answer_one(context: Context, exchange: Exchange) -> None:
    status, kind, body = await _asked(context, exchange)
    if status == 200:
        name = exchange.request.path.removeprefix(ONE)
        try:
            found = next((card for card in _cards.decode(body).data if _card.decode(card).id == name), None)
        except ValueError as error:
            raise RequestError(
                f"a worker's list of models is malformed: {error}", status=502, kind="upstream_error"
            ) from None
        if found is None:
            raise RequestError(
                f"the model {name!r} does not exist; {LIST} lists those that do",
                status=404,
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )
        body = bytes(found)
    exchange.respond(status, ((b"content-type", kind),), body)


async def _asked(context: Context, exchange: Exchange) -> tuple[int, bytes, bytes]:
    """A worker's answer: status, content type, body. Raises RequestError: 503, no worker answers."""
    headers = [(n, v) for n, v in exchange.request.headers.items() if n == b"authorization"]
    workers = [worker for worker in context.fleet if worker.ready]
    for worker in sorted(workers, key=lambda one: (not one.endpoint.settled, one.role is not Role.DECODE)):
        try:
            async with asyncio.timeout(context.settings.health_timeout_seconds):
                response = await worker.call("GET", LIST, headers)
                body = await response.read(_MAX_BYTES)
        except (HttpError, TimeoutError):
            worker.suspect()
            continue
        return response.status, response.headers.get(b"content-type", JSON[1]), body
    raise RequestError("no worker is ready; try again", status=503, kind="unavailable")
