"""Routes of a worker's engine that the proxy passes on: one worker answers, whole.

Only routes that serve clients are passed on. Those that change a server (``/sleep``, ``/v1/load_lora_adapter``) are
not: one client could stop everybody's answers.
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import JSON, ConnectError, Exchange, HttpError, Response
from kvbelt.proxy.context import Context
from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.proxy.request.limits import deadline_seconds, levels_of
from kvbelt.proxy.request.reply import Reply
from kvbelt.proxy.request.selection import WorkerSelection
from kvbelt.proxy.workers.dispatcher import NotPlacedError
from kvbelt.proxy.workers.watch import Held
from kvbelt.routing.booking import Demand
from kvbelt.routing.token_count import BYTES_PER_TOKEN

PATH = "passed-on"  #: in ``x-kvbelt-path``


class Work(Enum):
    """What a request costs the engine."""

    NONE = auto()  #: it is sent at once
    PROMPT = auto()  #: it is placed, as a prompt without an answer
    ANSWER = auto()  #: it is placed, as a prompt with an answer


@dataclass(frozen=True, slots=True)
class Route:
    path: str  #: one that ends in ``/`` is the beginning of many
    methods: tuple[str, ...]
    work: Work = Work.NONE


_GET, _POST = ("GET",), ("POST",)

ROUTES = (
    Route("/v1/responses", _POST, Work.ANSWER),
    Route("/v1/responses/", ("GET", "POST")),
    Route("/v1/messages", _POST, Work.ANSWER),
    Route("/v1/messages/count_tokens", _POST),
    Route("/v1/messages/render", _POST),
    Route("/v1/chat/completions/batch", _POST, Work.ANSWER),
    Route("/v1/chat/completions/render", _POST),
    Route("/v1/chat/completions/derender", _POST),
    Route("/v1/completions/render", _POST),
    Route("/v1/completions/derender", _POST),
    Route("/inference/v1/generate", _POST, Work.ANSWER),
    Route("/generative_scoring", _POST, Work.ANSWER),
    Route("/invocations", _POST, Work.ANSWER),
    Route("/cohere/v2/chat", _POST, Work.ANSWER),
    Route("/v1/audio/transcriptions", _POST, Work.ANSWER),
    Route("/v1/audio/translations", _POST, Work.ANSWER),
    Route("/v1/embeddings", _POST, Work.PROMPT),
    Route("/v2/embed", _POST, Work.PROMPT),
    Route("/classify", _POST, Work.PROMPT),
    Route("/pooling", _POST, Work.PROMPT),
    Route("/score", _POST, Work.PROMPT),
    Route("/v1/score", _POST, Work.PROMPT),
    Route("/rerank", _POST, Work.PROMPT),
    Route("/v1/rerank", _POST, Work.PROMPT),
    Route("/v2/rerank", _POST, Work.PROMPT),
    Route("/tokenize", _POST),
    Route("/detokenize", _POST),
    Route("/tokenizer_info", _GET),
    Route("/version", _GET),
    Route("/ping", ("GET", "POST")),
    Route("/load", _GET),
)

_EXACT = {route.path: route for route in ROUTES}
_BEGINNINGS = tuple(route for route in ROUTES if route.path.endswith("/"))

# Of the connection, not of the message (RFC 9110, 7.6.1), or written anew.
_NOT_PASSED_ON = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length", b"date", b"server",
        b"accept-encoding", b"x-request-id",
    }
)  # fmt: skip

#: FastAPI's answer where no route matches.
_NO_ROUTE = b'{"detail":"Not Found"}'


def route_of(path: str) -> Route | None:
    return _EXACT.get(path) or next((route for route in _BEGINNINGS if path.startswith(route.path)), None)


class PassedRequest:
    """One request to a route of ``ROUTES``, from its arrival to its end."""

    def __init__(self, context: Context, exchange: Exchange, record: Record, route: Route) -> None:
        self._context = context
        self._exchange = exchange
        self._record = record
        self._route = route
        self._reply = Reply(exchange, record, context.metrics)
        self._selection = WorkerSelection(context.dispatcher, record)
        self._unplaced: Held | None = None  # the worker of a request that needs no place
        self._retry_after = 1

    async def run(self) -> None:
        headers, record = self._exchange.request.headers, self._record
        record.path = PATH
        seconds = self._context.settings.deadline_seconds
        try:
            seconds = deadline_seconds(headers, seconds)
            async with asyncio.timeout(seconds):
                await self._try_workers()
        except TimeoutError:
            detail = f"the request took longer than {seconds:g} s"
            self._reply.fail(RequestError(detail, status=504, kind="timeout_error", reason="deadline"))
        except RequestError as error:
            self._reply.fail(error, retry_after=self._retry_after)
        finally:
            self._release()

    async def _try_workers(self) -> None:
        """Ask one worker after another until one answers. Raises RequestError."""
        failed: dict[str, str] = {}  # why, by incarnation
        for _ in range(self._context.settings.max_attempts):
            held = await self._take_worker(frozenset(failed))
            if held is None:
                break
            if held.chosen.report.engine == "embedded":
                raise self._not_there("the embedded engine")
            attempt = self._context.records.attempt(self._record, "decode", held.worker.name)
            try:
                response = await self._call(held)
                await self._answer(response)
            except HttpError as error:
                self._failed(held, attempt, error)
                failed[held.chosen.incarnation] = str(error)
            else:
                attempt.end()
                return
        raise RequestError(
            "; ".join(failed.values()) or "no worker is ready; try again",
            status=503,
            kind="unavailable",
            reason="decode_lost" if failed else "no_decode_worker",
        )

    async def _take_worker(self, exclude: frozenset[str]) -> Held | None:
        """Hold a worker that has not failed the request; None: there is none. Raises RequestError: 429."""
        self._release()
        context, request, work = self._context, self._exchange.request, self._route.work
        if work is Work.NONE:
            left = [one for one in context.fleet if one.ready and one.endpoint.incarnation not in exclude]
            worker = min(left, key=lambda one: (not one.endpoint.settled, one.in_flight), default=None)
            self._unplaced = None if worker is None else Held(worker)
            return self._unplaced
        demand = Demand(
            tokens=max(1, int(len(request.body) / BYTES_PER_TOKEN)),
            output=context.output_lengths.expected("", None) if work is Work.ANSWER else 1,
            arrived=self._record.began,
            levels=levels_of(request.headers, context.levels),
            splittable=False,
            silent=True,
            exclude=exclude,
        )
        try:
            await self._selection.place(demand)
        except NotPlacedError as error:
            if error.reason == "no_decode_worker":
                return None
            self._retry_after = error.retry_after
            raise RequestError(str(error), status=429, kind="rate_limit_error", reason=error.reason) from None
        return self._selection.decode

    def _release(self) -> None:
        self._selection.release()
        if self._unplaced is not None:
            self._unplaced.release()

    async def _call(self, held: Held) -> Response:
        """The head of the worker's answer. Raises HttpError."""
        request, record = self._exchange.request, self._record
        headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_PASSED_ON]
        headers.append((b"x-request-id", record.request_id.encode()))
        record.decode_worker, record.decode_sent = held.worker.name, monotonic()
        # Our client cannot read an answer to HEAD; the server drops the body of one to GET.
        method = "GET" if request.method == "HEAD" else request.method
        body = None if method == "GET" else request.body
        response = await held.worker.call(method, request.target, headers, body)
        record.decode_answered = monotonic()
        return response

    async def _answer(self, response: Response) -> None:
        """Pass the answer on: a stream as it comes, any other one whole. Raises HttpError: nothing was passed on."""
        kind = response.headers.get(b"content-type", JSON[1])
        if response.status == 200 and kind.startswith(b"text/event-stream"):
            self._reply.start((b"content-type", kind))
            try:
                await self._reply.stream(response, await response.chunk(), None)
            except HttpError as error:
                detail = f"a worker was lost: {error}"
                self._reply.fail(RequestError(detail, status=502, kind="upstream_error", reason="decode_lost"))
            finally:
                response.close()
            return
        body = await response.read(self._context.settings.max_answer_bytes)
        if response.status == 404 and body == _NO_ROUTE:
            raise self._not_there("the workers' engine")
        self._reply.pass_on(response, body)

    def _failed(self, held: Held, attempt: Attempt, error: HttpError) -> None:
        held.worker.suspect()
        attempt.end("decode_unreachable" if isinstance(error, ConnectError) else "decode_lost", str(error))

    def _not_there(self, where: str) -> RequestError:
        return RequestError(f"there is no {self._exchange.request.path} in {where}", status=404, kind="not_found_error")
