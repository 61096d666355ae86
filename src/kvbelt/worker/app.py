"""The worker's HTTP API on Starlette: OpenAI's endpoints, health and metrics.

An answer's headers leave with the first output, or with the error that came instead of it. So an engine's refusal is an
HTTP status, and the headers can say what became of the request's KV. A client that closes its connection ends its
generation at once.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvbelt.engine.api import FinishReason, Output
from kvbelt.errors import RequestError
from kvbelt.telemetry import get_logger
from kvbelt.turns import Work, at_once
from kvbelt.wire.api_error import error_body
from kvbelt.wire.handoff import PrefillHandoff
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.peers import PEERS_REQUEST
from kvbelt.wire.probe import PROBE_REQUEST
from kvbelt.wire.requests import ChatRequest, CompletionRequest, StreamOptions
from kvbelt.worker.answers import DONE, AnswerChoice, ChatShape, CompletionShape, StreamUsage, event, usage_of
from kvbelt.worker.generation import Generation
from kvbelt.worker.links import MAX_PEERS_BYTES, MAX_PROBE_BYTES, connect_peers, probe_link
from kvbelt.worker.messages import continued_text
from kvbelt.worker.metrics import Gaps
from kvbelt.worker.requests import (
    ITL_HEADER,
    parse_chat,
    parse_completion,
    parse_handoff,
    parse_level,
)
from kvbelt.worker.sampling import echoes_only, samplings_of
from kvbelt.worker.service import Service
from kvbelt.worker.structure import Form, form_of
from kvbelt.worker.tools import Reader, Tools, tools_of

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


def error_response(error: RequestError) -> Response:
    headers = {"retry-after": "1"} if error.status == 503 else None
    return Response(_error_body(error), status_code=error.status, media_type="application/json", headers=headers)


def _error_body(error: RequestError) -> bytes:
    return error_body(error.message, kind=error.kind, param=error.param, code=error.code)


class _ClientGoneError(Exception):
    """The client closed its connection."""


async def _body_of(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise RequestError(f"the request's body is larger than the limit of {max_bytes} bytes", status=413)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class GenerateEndpoint:
    """``POST /v1/completions`` or ``/v1/chat/completions``, as an ASGI application."""

    def __init__(self, service: Service, *, chat: bool) -> None:
        self._service = service
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Request(scope).headers.get("x-request-id", "")
        if not _REQUEST_ID.match(request_id):
            request_id = uuid.uuid4().hex
        try:
            body = await _body_of(receive, self._service.limits.body_bytes)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        except _ClientGoneError:
            return
        answering = asyncio.create_task(self._answer(scope, receive, send, body, request_id))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
        with suppress(asyncio.CancelledError):
            await answering

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes, request_id: str) -> None:
        try:
            await self._serve(scope, receive, send, body, request_id)
        except RequestError as error:
            if error.status >= 500:
                log.error("request failed", request_id=request_id, reason=error.message)
            await error_response(error)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, body: bytes, request_id: str) -> None:
        service = self._service
        service.require_ready()
        reading = self._read(body)
        small = service.limits.is_small(body)
        request, form, tools = at_once(reading) if small else await service.turns.take(reading)
        handoff = parse_handoff(request.kv_transfer_params)
        itl_seconds = parse_level(Request(scope).headers.get(ITL_HEADER))
        bad_words = await service.prompts.bad_words_of(request)
        samplings = samplings_of(request, bad_words)
        if isinstance(request, ChatRequest):
            prompts = [await service.prompts.of_chat(request)]
        else:
            prompts = await service.prompts.of_completion(request)
        ids = [prompt.token_ids for prompt in prompts]
        whole = handoff.answer_tokens if isinstance(handoff, PrefillHandoff) else samplings[0].max_tokens
        service.require_room(max(map(len, ids)), whole)
        shape = self._shape(request, request_id, tool_is_named=tools is not None and tools.names_one)
        grammar = await service.prompts.matcher_of(form, service.engine.grammars)
        generation = Generation(
            service.engine,
            service.belt,
            request_id=request_id,
            prompts=prompts,
            samplings=samplings,
            handoff=handoff,
            itl_seconds=itl_seconds,
            grammar=grammar,
        )
        try:
            await generation.start()  # refuses invalid token ids, which the tokenizer could not decode
            echoes = [""] * len(ids)
            if isinstance(request, ChatRequest):
                echoes = [continued_text(request)]
            elif request.echo:
                echoes = await service.prompts.texts_of(ids)
            choices = [
                AnswerChoice(
                    i * len(samplings) + c, prompt, len(echoes[i]), None if tools is None else Reader(tools.most_calls)
                )
                for i, prompt in enumerate(ids)
                for c in range(len(samplings))
            ]
            run = _Run(service, generation, shape, choices, echoes, n=len(samplings), echoes_only=echoes_only(request))
            if request.stream:
                await run.stream(send)
            else:
                await (await run.whole())(scope, receive, send)
        finally:
            generation.cancel()

    def _read(self, body: bytes) -> Work[tuple[CompletionRequest | ChatRequest, Form | None, Tools | None]]:
        """The request, its form, and its tools. Raises RequestError."""
        service = self._service
        yield from service.limits.looking_through(body)
        yield
        parse = parse_chat if self._chat else parse_completion
        request = parse(body, service.limits, service.engine.max_model_len)
        service.require_model(request.model)
        yield
        form = form_of(request)
        tools = tools_of(request, form)
        return request, form if tools is None else tools.form, tools

    def _shape(
        self, request: CompletionRequest | ChatRequest, request_id: str, *, tool_is_named: bool
    ) -> CompletionShape | ChatShape:
        make = ChatShape if isinstance(request, ChatRequest) else CompletionShape
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        wants = request.logprobs if isinstance(request, ChatRequest) else request.logprobs is not None
        return make(
            answer_id=f"{prefix}-{request_id}",
            created=int(time.time()),
            model=self._service.model_name,
            wants_logprobs=bool(wants),
            wants_token_ids=bool(request.return_token_ids),
            tokens_by_id=bool(request.return_tokens_as_token_ids),
            usage=_usage_wanted(request.stream_options),
            tool_is_named=tool_is_named,
        )


def _usage_wanted(options: StreamOptions | None) -> StreamUsage:
    if options is None or not options.include_usage:
        return StreamUsage.NONE
    return StreamUsage.IN_EVERY_EVENT if options.continuous_usage_stats else StreamUsage.LAST


class _Run:
    def __init__(
        self,
        service: Service,
        generation: Generation,
        shape: CompletionShape | ChatShape,
        choices: Sequence[AnswerChoice],
        echoes: Sequence[str],
        *,
        n: int,
        echoes_only: bool,
    ) -> None:
        self._echoes_only = echoes_only
        self._service = service
        self._generation = generation
        self._shape = shape
        self._n = n
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._choices = choices
        self._first: Output | None = None

    async def whole(self) -> Response:
        async for _ in self._outputs():
            pass
        usage = usage_of(self._choices, self._n)
        answer = self._shape.whole(self._choices, self._echoes, usage)
        if (state := self._generation.handoff_state()) is not None:
            answer["kv_transfer_params"] = msgspec.to_builtins(state)
        return Response(msgspec.json.encode(answer), media_type="application/json", headers=self._headers())

    async def stream(self, send: Send) -> None:
        """The streaming answer. Headers leave with the first output; an error before it is an HTTP status."""
        outputs = self._outputs()
        index, output = await anext(outputs)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **self._headers()}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        opened: set[int] = set()
        tail = b""
        try:
            await _write(send, self._events(index, output, opened))
            async for index, output in outputs:
                await _write(send, self._events(index, output, opened))
            if self._shape.usage is not StreamUsage.NONE:
                tail = event(self._shape.usage_chunk(usage_of(self._choices, self._n)))
        except RequestError as error:
            log.error("stream failed", answer_id=self._shape.answer_id, reason=error.message)
            tail = b"data: " + _error_body(error) + b"\n\n"
        await send({"type": "http.response.body", "body": tail + DONE})

    async def _outputs(self) -> AsyncIterator[tuple[int, Output]]:
        times, gaps = self._service.times, Gaps(self._service.times)
        async for index, output in self._generation.outputs():
            if self._first is None:
                self._first = output
                outcome = self._generation.kv_outcome
                times.first_output(output.timing, None if outcome is None else outcome.waited_seconds)
            gaps.output(index)
            shown = _without_token(output) if self._echoes_only else output
            self._choices[index].add(shown)
            yield index, shown

    def _events(self, index: int, output: Output, opened: set[int]) -> bytes:
        events = []
        if index not in opened:
            opened.add(index)
            events += self._shape.opening(self._choices[index], self._echoes[index])
        says_more = output.text or output.logprobs or output.finish_reason is not None
        if says_more or (self._shape.wants_token_ids and output.token_ids):
            chunk = self._shape.chunk(self._choices[index], output)
            events += [] if chunk is None else [chunk]
        return b"".join(map(event, events))

    def _headers(self) -> dict[str, str]:
        timing = self._first.timing if self._first is not None else None
        spans: dict[str, float] = {}
        headers: dict[str, str] = {}
        if timing is not None:
            spans = {"queue": timing.queue, "load": timing.load, "prefill": timing.prefill}
        if (outcome := self._generation.kv_outcome) is not None:
            spans["kv"] = outcome.waited_seconds
            reason = outcome.reason or (timing.lost if timing is not None else "aborted")
            headers["x-kvbelt-kv"] = "received" if reason is None else f"recomputed; reason={reason}"
        headers["server-timing"] = ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in spans.items())
        return headers


def _without_token(output: Output) -> Output:
    return replace(output, token_ids=(), text="", logprobs=(), finish_reason=FinishReason.LENGTH, stop_reason=None)


async def _write(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


_ERRORS: tuple[Any, ...] = (RequestError, MessageError, HTTPException, _ClientGoneError, Exception)


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case RequestError():
            return error_response(error)
        case MessageError():
            return error_response(RequestError(str(error)))
        case HTTPException():
            return error_response(RequestError(str(error.detail), status=error.status_code))
        case _ClientGoneError():
            return Response(status_code=400)  # no client reads it
    log.error("internal error", path=request.url.path, exc_info=error)
    return error_response(RequestError("internal error; see the worker's log", status=500, kind="internal_error"))


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


def make_app(service: Service) -> Starlette:
    async def health(_: Request) -> Response:
        said = service.health()
        return _json(said, 200 if said.status == "ok" else 503)

    async def models(_: Request) -> Response:
        return _json(service.models())

    async def metrics(_: Request) -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def about(_: Request) -> Response:
        return _json(service.about())

    async def peers(request: Request) -> Response:
        service.require_ready()
        body = await _body_of(request.receive, MAX_PEERS_BYTES)
        return _json(await connect_peers(service.belt, PEERS_REQUEST.parse(body, "the proxy")))

    async def probe(request: Request) -> Response:
        service.require_ready()
        asked = PROBE_REQUEST.parse(await _body_of(request.receive, MAX_PROBE_BYTES), "the caller")
        return _json(await probe_link(service.belt, asked.engine_id, busy=service.busy()))

    return Starlette(
        routes=[
            Route("/v1/completions", GenerateEndpoint(service, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", GenerateEndpoint(service, chat=True), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/kvbelt/about", about, methods=["GET"]),
            Route("/kvbelt/peers", peers, methods=["POST"]),
            Route("/kvbelt/probe", probe, methods=["POST"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers=dict.fromkeys(_ERRORS, _on_error),
    )
