"""One request's way through the proxy.

Every way ends in exactly one of: a whole answer, a stream that ends with ``[DONE]``, an honest error, or a
client that is gone. What went to the client is never taken back: a failure before the first byte becomes a
status, one behind it an error event. A failure of the prefill worker or of the transfer is never an error: the
decode worker computes the prompt itself.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import Exchange, HttpError, Response
from kvbelt.proxy.answers import EVENT_STREAM, JSON, Seam, error_body, error_event
from kvbelt.proxy.client_body import ClientBody
from kvbelt.proxy.context import Context
from kvbelt.proxy.legs import LegFailedError, Legs, MakeBody, RefusedError, excerpt
from kvbelt.proxy.prefill_answer import PrefillAnswer
from kvbelt.proxy.records import Record
from kvbelt.routing.decider import Decision, decide
from kvbelt.routing.exactness import Road, first_token
from kvbelt.wire.handoff import DecodeHandoff

log = logging.getLogger("kvbelt.proxy")

_COMPLETIONS = "/v1/completions"


class Journey:
    """One request, from its parsed head to its end."""

    def __init__(self, context: Context, exchange: Exchange, record: Record, *, chat: bool) -> None:
        self._context = context
        self._settings = context.settings
        self._exchange = exchange
        self._record = record
        self._chat = chat
        self._legs = Legs(context, record, exchange.request.headers.get(b"authorization"))
        self._client: ClientBody

    async def run(self) -> None:
        """Answer the request. Raises only CancelledError, when the client is gone."""
        try:
            async with asyncio.timeout(self._legs.remaining()):
                await self._answer()
        except TimeoutError:
            seconds = self._settings.deadline_seconds
            self._fail(RequestError(f"the request took longer than {seconds:g} s", status=504, kind="timeout_error"))
        except RequestError as error:
            self._fail(error)
        except RefusedError as refused:
            self._pass_on(refused.response, refused.body)
        except HttpError as error:
            self._fail(RequestError(f"a worker was lost: {error}", status=502, kind="upstream_error"))
        except Exception:
            log.exception("request %s failed in the proxy itself", self._record.request_id)
            self._fail(RequestError("internal error; the proxy's log has more", status=500, kind="internal_error"))
        finally:
            self._legs.close()

    async def _answer(self) -> None:
        client = self._client = ClientBody(self._exchange.request.body, chat=self._chat)
        record = self._record
        record.stream = bool(client.view.stream)
        self._legs.decode = self._legs.pick_decode()
        decision = self._decide(client)
        if decision.road is None:
            self._legs.path("local", decision.reason)
            await self._relay_decode(record.route, lambda _: client.plain())
        elif decision.road is Road.PREFILL_ONLY:
            await self._prefill_only()
        else:
            await self._disaggregate(decision)

    def _decide(self, client: ClientBody) -> Decision:
        self._legs.prefill = self._context.pick_prefill()
        least = self._settings.min_prompt_tokens
        return decide(
            first_token(client.view, client.names, num_prompts=client.num_prompts),
            None if self._legs.prefill is None else self._legs.prefill.endpoint,
            self._legs.decode.endpoint,
            prompt_tokens=client.estimated_prompt_tokens() if least else 0,
            min_prompt_tokens=least,
        )

    # The prefill worker's part

    async def _prefill_only(self) -> None:
        self._legs.path("prefill-only", None)
        worker = self._legs.prefill
        assert worker is not None
        try:
            await self._relay(await self._legs.call_prefill(worker, self._client.plain()))
        except LegFailedError as failed:
            await self._go_local(failed.reason, str(failed))
        except HttpError as error:
            worker.suspect()
            if self._exchange.started:
                raise
            await self._go_local("prefill_lost", str(error))

    async def _disaggregate(self, decision: Decision) -> None:
        assert self._legs.prefill is not None
        try:
            first = await self._legs.first(self._legs.prefill, self._client)
        except LegFailedError as failed:
            await self._go_local(failed.reason, str(failed))
            return
        state = first.handoff
        failure = f"transfer_{state.reason or 'failed'}" if state is not None and state.state == "failed" else None
        reason = decision.reason
        if decision.road is Road.FAST:
            if first.finish_reason == "stop":
                self._finish_with(first, "stop")
                return
            reason = first.why_not_fast() or self._why_not_continue(first)
            if reason is None:
                await self._continue(first, failure)
                return
        if failure is not None:
            await self._go_local(failure, f"{self._legs.prefill.name} says that the transfer failed")
            return
        self._legs.path("re-derive", reason)
        client = self._client
        await self._relay_decode(
            self._record.route, lambda handoff: client.plain() if handoff is None else client.for_decode(handoff)
        )

    def _limit(self, first: PrefillAnswer) -> int | None:
        """Tokens that the whole answer may have."""
        limit = self._client.limit
        context = self._legs.decode.endpoint.report.max_model_len
        return context - first.prompt_tokens if limit is None and context is not None else limit

    def _why_not_continue(self, first: PrefillAnswer) -> str | None:
        context = self._legs.decode.endpoint.report.max_model_len
        limit = self._limit(first)
        if limit is None or context is None:
            return "unknown_context"
        if limit < 1 or first.prompt_tokens + limit > context:
            return "context_exceeded"  # what one server does with it, refuse or shorten, the decode worker does too
        return None

    async def _go_local(self, reason: str, detail: str) -> None:
        """The decode worker computes the prompt itself."""
        log.warning("request %s goes local: %s: %s", self._record.request_id, reason, detail)
        self._record.errors.append(f"{reason}: {detail}")
        self._legs.transfer = None
        self._legs.path("local", reason)
        await self._relay_decode(self._record.route, lambda _: self._client.plain())

    # The fast path

    def _finish_with(self, first: PrefillAnswer, finish_reason: str) -> None:
        """The first token was the last."""
        self._legs.path("first-token", None)
        seam = self._seam(first)
        if self._client.view.stream:
            self._exchange.start(200, self._head(EVENT_STREAM))
            self._exchange.end(seam.opening(finish_reason) + seam.ending())
        else:
            self._exchange.respond(200, self._head(JSON), seam.whole(None, finish_reason))
        self._told_first_token()

    async def _continue(self, first: PrefillAnswer, failure: str | None) -> None:
        """Token 1 to the client, the rest from the decode worker."""
        limit, ids, token_id = self._limit(first), first.prompt_token_ids, first.token_id
        assert limit is not None
        assert ids is not None
        assert token_id is not None
        if limit == 1:
            self._finish_with(first, "length")
            return
        self._legs.path("first-token", None)
        if failure is not None:
            self._legs.kv_lost(failure)
        client = self._client

        def body(handoff: DecodeHandoff | None) -> bytes:
            return client.for_continuation(ids, token_id, limit - 1, handoff)

        seam = self._seam(first)
        if client.view.stream:
            await self._continue_stream(seam, body)
        else:
            await self._continue_whole(seam, body)

    async def _continue_stream(self, seam: Seam, body: MakeBody) -> None:
        exchange = self._exchange
        announced = self._record.path
        exchange.start(200, self._head(EVENT_STREAM), seam.opening(None))
        self._told_first_token()
        response = await self._legs.open_decode(_COMPLETIONS, body)
        if response.status != 200:
            self._break(await self._legs.read(response))
            return
        if self._record.path != announced:
            exchange.write(b": x-kvbelt-path %b\n\n" % self._path_value())
        await self._relay_stream(response, seam.relayed)

    async def _continue_whole(self, seam: Seam, body: MakeBody) -> None:
        response = await self._legs.open_decode(_COMPLETIONS, body)
        answer = await self._legs.read(response)
        if response.status != 200:
            raise RefusedError(response, answer)
        try:
            whole = seam.whole(answer)
        except (ValueError, IndexError) as error:
            raise RequestError(
                f"{self._legs.decode.name} answered something else than a completion: {error}",
                status=502,
                kind="upstream_error",
            ) from None
        self._exchange.respond(200, self._head(JSON), whole)
        self._told_first_token()

    def _seam(self, first: PrefillAnswer) -> Seam:
        client = self._client
        return Seam(
            first,
            chat=self._chat,
            include_usage=client.include_usage,
            token_ids=bool(client.view.return_token_ids),
        )

    # The decode worker's part

    async def _relay_decode(self, target: str, make_body: MakeBody) -> None:
        await self._relay(await self._legs.open_decode(target, make_body))

    # Relaying

    async def _relay(self, response: Response) -> None:
        """A worker's answer, as it is."""
        kind = response.headers.get(b"content-type", b"application/json")
        if response.status == 200 and kind.startswith(b"text/event-stream"):
            self._exchange.start(200, self._head((b"content-type", kind)))
            await self._relay_stream(response, None)
        else:
            self._pass_on(response, await self._legs.read(response))

    async def _relay_stream(self, response: Response, transform: Callable[[bytes], bytes] | None) -> None:
        """Whole events, as they come; what a lost worker left of an event is dropped."""
        exchange, record = self._exchange, self._record
        rest = b""
        chunk = await response.chunk()
        record.decode_first = monotonic()
        if record.first_token is None:
            self._told_first_token()
        while chunk:
            events = rest + chunk if rest else chunk
            rest = b""
            if not events.endswith(b"\n\n"):
                whole = events.rfind(b"\n\n") + 2
                if whole == 1:  # not one event is complete
                    events, rest = b"", events
                else:
                    events, rest = events[:whole], events[whole:]
            if events:
                shown = events if transform is None else self._transformed(events, transform)
                if response.complete and not rest:  # as is usual, the last events and the end came together
                    exchange.end(shown)
                    return
                exchange.write(shown)
                if exchange.paused:
                    await exchange.drain()
            chunk = await response.chunk()
        exchange.end(rest)

    def _transformed(self, events: bytes, transform: Callable[[bytes], bytes]) -> bytes:
        try:
            return transform(events)
        except ValueError as error:
            raise RequestError(
                f"{self._legs.decode.name} sent an event that is not a completion's: {error}",
                status=502,
                kind="upstream_error",
            ) from None

    def _pass_on(self, response: Response, body: bytes) -> None:
        """A worker's whole answer with its status."""
        headers = self._head((b"content-type", response.headers.get(b"content-type", b"application/json")))
        retry = response.headers.get(b"retry-after")
        if retry is not None:
            headers.append((b"retry-after", retry))
        if self._exchange.started:
            self._break(body)
            return
        self._exchange.respond(response.status, headers, body)
        if response.status == 200 and self._record.first_token is None:
            self._told_first_token()

    def _fail(self, error: RequestError) -> None:
        """An error of the proxy's own."""
        body = error_body(error.message, kind=error.kind, param=error.param, code=error.status)
        self._record.errors.append(error.message)
        if self._exchange.started:
            self._break(body)
            return
        headers = self._head(JSON)
        if error.status == 503:
            headers.append((b"retry-after", b"1"))
        self._exchange.respond(error.status, headers, body)

    def _break(self, body: bytes) -> None:
        """An error inside a stream."""
        if self._exchange.ended:
            return
        self._context.metrics.broken_streams += 1
        log.warning("request %s: its stream ends with an error: %s", self._record.request_id, excerpt(body))
        self._exchange.end(error_event(body))

    # The record

    def _path_value(self) -> bytes:
        path, reason = self._record.path, self._record.reason
        return (path if reason is None else f"{path}; reason={reason}").encode()

    def _head(self, kind: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        head = [kind, (b"x-request-id", self._record.request_id.encode())]
        if self._record.path:
            head.append((b"x-kvbelt-path", self._path_value()))
        return head

    def _told_first_token(self) -> None:
        now = self._record.first_token = monotonic()
        self._context.metrics.ttft.observe(now - self._record.began)
