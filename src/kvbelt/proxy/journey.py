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
from kvbelt.http import ConnectError, Exchange, HttpError, PeerClosedError, Response
from kvbelt.proxy.answers import EVENT_STREAM, JSON, Seam, error_body, error_event
from kvbelt.proxy.client_body import ClientBody
from kvbelt.proxy.context import Context, KVLostError, Waiting
from kvbelt.proxy.prefill_answer import PrefillAnswer
from kvbelt.proxy.records import Record
from kvbelt.proxy.workers import Worker
from kvbelt.routing.decider import Decision, decide
from kvbelt.routing.exactness import Road, first_token
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId

log = logging.getLogger("kvbelt.proxy")

_COMPLETIONS = "/v1/completions"


class LegFailedError(Exception):
    """The prefill leg gave no answer to use; the decode worker will do it all. ``reason``: low cardinality."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class RefusedError(Exception):
    """A worker refused the request with an answer that the client is to see."""

    def __init__(self, response: Response, body: bytes) -> None:
        super().__init__(f"status {response.status}")
        self.response = response
        self.body = body


class Journey:
    """One request, from its parsed head to its end."""

    def __init__(self, context: Context, exchange: Exchange, record: Record, *, chat: bool) -> None:
        self._context = context
        self._settings = context.settings
        self._exchange = exchange
        self._record = record
        self._chat = chat
        self._deadline = record.began + context.settings.deadline_seconds
        self._legs: list[Response] = []
        self._headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"x-request-id", record.request_id.encode()),
        ]
        authorization = exchange.request.headers.get(b"authorization")
        if authorization is not None:
            self._headers.append((b"authorization", authorization))
        self._client: ClientBody
        self._decode: Worker
        self._prefill: Worker | None = None
        self._busy: Worker | None = None  # the decode worker whose answer is being read
        self._transfer: TransferId | None = None  # the KV that the decode worker may still hope for

    async def run(self) -> None:
        """Answer the request. Raises only CancelledError, when the client is gone."""
        try:
            async with asyncio.timeout(self._remaining()):
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
            for leg in self._legs:
                leg.close()
            if self._busy is not None:
                self._busy.in_flight -= 1

    async def _answer(self) -> None:
        client = self._client = ClientBody(self._exchange.request.body, chat=self._chat)
        record = self._record
        record.stream = bool(client.view.stream)
        self._decode = self._pick_decode()
        decision = self._decide(client)
        if decision.road is None:
            self._path("local", decision.reason)
            await self._relay_decode(record.route, lambda _: client.plain())
        elif decision.road is Road.PREFILL_ONLY:
            await self._prefill_only()
        else:
            await self._disaggregate(decision)

    def _decide(self, client: ClientBody) -> Decision:
        self._prefill = self._context.pick_prefill()
        least = self._settings.min_prompt_tokens
        return decide(
            first_token(client.view, client.names, num_prompts=client.num_prompts),
            None if self._prefill is None else self._prefill.endpoint,
            self._decode.endpoint,
            prompt_tokens=client.estimated_prompt_tokens() if least else 0,
            min_prompt_tokens=least,
        )

    def _pick_decode(self, exclude: frozenset[str] = frozenset()) -> Worker:
        worker = self._context.pick_decode(exclude)
        if worker is None:
            states = ", ".join(f"{w.name} {w.endpoint.report.health}" for w in self._context.decode)
            raise RequestError(f"no decode worker is ready ({states}); try again", status=503, kind="unavailable")
        self._record.decode_worker = worker.name
        return worker

    # The prefill worker's part

    async def _prefill_only(self) -> None:
        self._path("prefill-only", None)
        worker = self._prefill
        assert worker is not None
        try:
            await self._relay(await self._call_prefill(worker, self._client.plain()))
        except LegFailedError as failed:
            await self._go_local(failed.reason, str(failed))
        except HttpError as error:
            worker.suspect()
            if self._exchange.started:
                raise
            await self._go_local("prefill_lost", str(error))

    async def _call_prefill(self, worker: Worker, body: bytes) -> Response:
        """The head of a prefill worker's answer.

        Raises:
            LegFailedError: unreachable, lost, or a status of 500 and above.
        """
        record = self._record
        record.prefill_worker = worker.name
        record.prefill_sent = monotonic()
        try:
            response = await worker.post(record.route, self._headers, body)
            self._legs.append(response)
            await response.head()
        except ConnectError as error:
            raise LegFailedError("prefill_unreachable", str(error)) from None
        except HttpError as error:
            worker.suspect()
            raise LegFailedError("prefill_lost", str(error)) from error
        if response.status >= 500:
            answer = await self._read(response)
            raise LegFailedError("prefill_5xx", f"{worker.name} answered {response.status}: {_excerpt(answer)}")
        return response

    async def _first(self, worker: Worker) -> PrefillAnswer:
        """The prefill leg, with the KV sent to the decode worker.

        Raises:
            LegFailedError: the decode worker has to do it all.
            RefusedError: the request is one that a worker does not serve.
        """
        receiver = self._decode.endpoint.report.receiver
        assert receiver is not None
        metrics, record = self._context.metrics, self._record
        metrics.prefill_queue += 1
        worker.in_flight += 1
        try:
            for attempt in (1, 2):
                transfer_id = self._transfer = TransferId(self._context.new_id())
                self._context.records.name_transfer(record, transfer_id)
                handoff = PrefillHandoff(transfer_id, receiver, self._remaining())
                try:
                    response = await self._call_prefill(worker, self._client.for_prefill(handoff))
                    break
                except LegFailedError as failed:
                    if attempt == 2 or not _was_stale(failed.__cause__):
                        raise
            body = await self._read(response)
        except HttpError as error:
            worker.suspect()
            raise LegFailedError("prefill_lost", str(error)) from error
        finally:
            metrics.prefill_queue -= 1
            worker.in_flight -= 1
        record.prefill_answered = monotonic()
        record.prefill_timing = response.headers.get(b"server-timing", b"")
        if response.status != 200:
            raise RefusedError(response, body)
        try:
            return PrefillAnswer(body)
        except ValueError as error:
            raise LegFailedError("prefill_bad_answer", f"{worker.name}: {error}") from None

    async def _disaggregate(self, decision: Decision) -> None:
        assert self._prefill is not None
        try:
            first = await self._first(self._prefill)
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
            await self._go_local(failure, f"{self._prefill.name} says that the transfer failed")
            return
        self._path("re-derive", reason)
        client = self._client
        await self._relay_decode(
            self._record.route, lambda handoff: client.plain() if handoff is None else client.for_decode(handoff)
        )

    def _limit(self, first: PrefillAnswer) -> int | None:
        """Tokens that the whole answer may have."""
        limit = self._client.limit
        context = self._decode.endpoint.report.max_model_len
        return context - first.prompt_tokens if limit is None and context is not None else limit

    def _why_not_continue(self, first: PrefillAnswer) -> str | None:
        context = self._decode.endpoint.report.max_model_len
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
        self._transfer = None
        self._path("local", reason)
        await self._relay_decode(self._record.route, lambda _: self._client.plain())

    # The fast path

    def _finish_with(self, first: PrefillAnswer, finish_reason: str) -> None:
        """The first token was the last."""
        self._path("first-token", None)
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
        self._path("first-token", None)
        if failure is not None:
            self._kv_lost(failure)
        client = self._client

        def body(handoff: DecodeHandoff | None) -> bytes:
            return client.for_continuation(ids, token_id, limit - 1, handoff)

        seam = self._seam(first)
        if client.view.stream:
            await self._continue_stream(seam, body)
        else:
            await self._continue_whole(seam, body)

    async def _continue_stream(self, seam: Seam, body: Callable[[DecodeHandoff | None], bytes]) -> None:
        exchange = self._exchange
        announced = self._record.path
        exchange.start(200, self._head(EVENT_STREAM), seam.opening(None))
        self._told_first_token()
        response = await self._open_decode(_COMPLETIONS, body)
        if response.status != 200:
            self._break(await self._read(response))
            return
        if self._record.path != announced:
            exchange.write(b": x-kvbelt-path %b\n\n" % self._path_value())
        await self._relay_stream(response, seam.relayed)

    async def _continue_whole(self, seam: Seam, body: Callable[[DecodeHandoff | None], bytes]) -> None:
        response = await self._open_decode(_COMPLETIONS, body)
        answer = await self._read(response)
        if response.status != 200:
            raise RefusedError(response, answer)
        try:
            whole = seam.whole(answer)
        except (ValueError, IndexError) as error:
            raise RequestError(
                f"{self._decode.name} answered something else than a completion: {error}",
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

    async def _open_decode(self, target: str, make_body: Callable[[DecodeHandoff | None], bytes]) -> Response:
        """The head of a decode worker's answer; the KV's fate is known then.

        A worker that is lost before it answers is replaced by another, which computes the prompt itself.

        Raises:
            RequestError: 503, no decode worker is left.
        """
        record = self._record
        tried: frozenset[str] = frozenset()
        stale_allowed = True
        while True:
            worker = self._decode
            record.decode_sent = monotonic()
            try:
                response = await self._try_decode(worker, target, make_body)
                break
            except KVLostError as lost:
                self._kv_lost(lost.reason)
            except HttpError as error:
                if stale_allowed and _was_stale(error):
                    stale_allowed = False
                    continue
                worker.suspect()
                record.errors.append(f"decode_lost: {error}")
                log.warning("request %s: decode worker lost before it answered: %s", record.request_id, error)
                tried |= {worker.name}
                self._decode = self._pick_decode(tried)
                if self._transfer is not None:
                    self._kv_lost("decode_lost")
        self._busy = self._decode
        self._busy.in_flight += 1
        record.decode_answered = monotonic()
        record.decode_timing = response.headers.get(b"server-timing", b"")
        kv = response.headers.get(b"x-kvbelt-kv")
        if kv is not None:
            record.kv = kv.decode("latin-1")
            if kv.startswith(b"recomputed"):
                self._kv_lost(_reason_of(record.kv))
        return response

    async def _try_decode(
        self, worker: Worker, target: str, make_body: Callable[[DecodeHandoff | None], bytes]
    ) -> Response:
        handoff = None
        if self._transfer is not None:
            seconds = min(self._settings.kv_wait_seconds, self._remaining())
            handoff = DecodeHandoff(self._transfer, seconds)
        response = await worker.post(target, self._headers, make_body(handoff))
        self._legs.append(response)
        if self._transfer is None or self._prefill is None:
            await response.head()
            return response
        waiting = Waiting(self._transfer, self._prefill, response)
        self._context.wait_for(waiting)
        try:
            await response.head()
        finally:
            self._context.wait_over(waiting)
        return response

    async def _relay_decode(self, target: str, make_body: Callable[[DecodeHandoff | None], bytes]) -> None:
        await self._relay(await self._open_decode(target, make_body))

    # Relaying

    async def _relay(self, response: Response) -> None:
        """A worker's answer, as it is."""
        kind = response.headers.get(b"content-type", b"application/json")
        if response.status == 200 and kind.startswith(b"text/event-stream"):
            self._exchange.start(200, self._head((b"content-type", kind)))
            await self._relay_stream(response, None)
        else:
            self._pass_on(response, await self._read(response))

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
                f"{self._decode.name} sent an event that is not a completion's: {error}",
                status=502,
                kind="upstream_error",
            ) from None

    async def _read(self, response: Response) -> bytes:
        return await response.read(self._settings.max_answer_bytes)

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
        log.warning("request %s: its stream ends with an error: %s", self._record.request_id, _excerpt(body))
        self._exchange.end(error_event(body))

    # The record

    def _path(self, path: str, reason: str | None) -> None:
        self._record.path = path
        self._record.reason = reason

    def _kv_lost(self, reason: str) -> None:
        self._transfer = None
        self._path("local", reason)

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

    def _remaining(self) -> float:
        return max(0.001, self._deadline - monotonic())


def _was_stale(error: BaseException | None) -> bool:
    """A kept connection ended without a byte of an answer: most likely the peer was just closing it."""
    return isinstance(error, PeerClosedError) and error.reused and not error.started


def _reason_of(kv: str) -> str:
    """``recomputed; reason=deadline`` → ``deadline``."""
    reason = kv.partition("reason=")[2].strip()
    return reason if reason and reason.replace("_", "").replace("-", "").isalnum() else "kv_lost"


def _excerpt(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")
