"""One request's way through the proxy.

Every way ends in exactly one of: a whole answer, a stream that ends with ``[DONE]``, an honest error, or a
client that is gone. What went to the client is never taken back: a failure before the first byte is tried again
elsewhere or becomes a status, one behind it an error event. A failure of the prefill worker or of the transfer is never
an error: another prefill worker reads the prompt, or the decode worker computes it itself.
"""

import asyncio
import logging
from collections.abc import Callable

from kvbelt.errors import RequestError
from kvbelt.http import Exchange, HttpError, Response
from kvbelt.proxy.answers import EVENT_STREAM, JSON, Seam
from kvbelt.proxy.choice import Choice, LegFailedError, RefusedError
from kvbelt.proxy.client_body import ClientBody
from kvbelt.proxy.context import Context
from kvbelt.proxy.deadline import deadline_seconds
from kvbelt.proxy.legs import Legs, MakeBody
from kvbelt.proxy.prefill_answer import PrefillAnswer
from kvbelt.proxy.records import Record
from kvbelt.proxy.reply import Reply
from kvbelt.routing.decider import Decision, decide
from kvbelt.routing.exactness import Road, first_token
from kvbelt.wire.handoff import DecodeHandoff
from kvbelt.wire.reasons import Remedy, remedy_of

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
        self._reply = Reply(exchange, record, context.metrics)
        self._choice = Choice(context.fleet, record, context.settings.max_attempts)
        self._legs: Legs
        self._client: ClientBody
        self._local: str | None = None  # why every further try is local, once one was

    async def run(self) -> None:
        """Answer the request. Raises only CancelledError, when the client is gone."""
        headers = self._exchange.request.headers
        try:
            seconds = deadline_seconds(headers, self._settings.deadline_seconds)
        except RequestError as error:
            self._reply.fail(error)
            return
        self._legs = Legs(self._context, self._record, self._choice, headers.get(b"authorization"), seconds)
        try:
            async with asyncio.timeout(self._legs.remaining()):
                await self._answer()
        except TimeoutError:
            self._reply.fail(self._legs.overdue())
        except RequestError as error:
            self._reply.fail(error)
        except RefusedError as refused:
            self._reply.pass_on(refused.response, refused.body)
        except HttpError as error:
            self._reply.fail(
                RequestError(f"a worker was lost: {error}", status=502, kind="upstream_error", reason="decode_lost")
            )
        except Exception:
            log.exception("the request failed in the proxy itself", extra={"request_id": self._record.request_id})
            self._reply.fail(
                RequestError(
                    "internal error; the proxy's log has more", status=500, kind="internal_error", reason="internal"
                )
            )
        finally:
            self._legs.close()
            self._choice.let_go()

    async def _answer(self) -> None:
        client = self._client = ClientBody(self._exchange.request.body, chat=self._chat)
        self._record.stream = bool(client.view.stream)
        if self._settings.record_prompts:
            self._record.prompt = client.excerpt(self._settings.record_prompts)
        self._choice.take_decode()
        while True:
            try:
                await self._take_a_road()
            except LegFailedError as failed:  # of a decode worker, and nothing was said to the client
                self._choice.another_decode(failed)
            else:
                return

    async def _take_a_road(self) -> None:
        decision = self._decide(self._client)
        if decision.road is None:
            self._choice.need_no_prefill()
            self._legs.path("local", decision.reason)
            await self._relay_decode(self._record.route, lambda _: self._client.plain())
        elif decision.road is Road.PREFILL_ONLY:
            await self._prefill_only()
        else:
            await self._disaggregate(decision)

    def _decide(self, client: ClientBody) -> Decision:
        if self._local is not None:
            return Decision(None, self._local)
        prefill = self._choice.take_prefill()
        least = self._settings.min_prompt_tokens
        return decide(
            first_token(client.view, client.names, num_prompts=client.num_prompts),
            None if prefill is None else prefill.endpoint,
            self._choice.decode.worker.endpoint,
            prompt_tokens=client.estimated_prompt_tokens() if least else 0,
            min_prompt_tokens=least,
            pairs_refused=self._choice.pairs_refused(),
        )

    # The prefill worker's part

    async def _prefill_only(self) -> None:
        self._legs.path("prefill-only", None)
        while True:
            try:
                response = await self._legs.call_prefill(lambda _: self._client.plain(), sends_kv=False)
                await self._relay(response, self._legs.prefill_lost)
            except LegFailedError as failed:
                if self._choice.another_prefill(failed):
                    continue
                await self._go_local(failed)
            return

    async def _disaggregate(self, decision: Decision) -> None:
        try:
            first, failure = await self._first(decision.road is Road.FAST)
        except LegFailedError as failed:
            await self._go_local(failed)
            return
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
            await self._go_local(failure)
            return
        self._legs.path("re-derive", reason)
        client = self._client
        await self._relay_decode(
            self._record.route, lambda handoff: client.plain() if handoff is None else client.for_decode(handoff)
        )

    async def _first(self, fast: bool) -> tuple[PrefillAnswer, LegFailedError | None]:
        """A prefill worker's answer, and why its transfer has failed, if it has and nobody else is left to try.

        Raises:
            LegFailedError: none has answered.
        """
        in_hand: tuple[PrefillAnswer, LegFailedError] | None = None
        while True:
            try:
                first = await self._legs.first(self._client)
            except LegFailedError as error:
                failed = error
            else:
                needs_no_kv = fast and first.finish_reason == "stop"
                lost = None if needs_no_kv else self._legs.transfer_failed(first)
                if lost is None:
                    return first, None
                in_hand, failed = (first, lost), lost
                if remedy_of(lost.reason.removeprefix("transfer_")) is not Remedy.ELSEWHERE:
                    return in_hand
            # The decode worker may have been lost meanwhile: then there is nobody to send KV to.
            if not self._legs.can_send_kv or not self._choice.another_prefill(failed):
                # An answer without its KV is better than none: its first token is right.
                if in_hand is None:
                    raise failed
                return in_hand

    def _limit(self, first: PrefillAnswer) -> int | None:
        """Tokens that the whole answer may have."""
        limit = self._client.limit
        context = self._choice.decode.worker.endpoint.report.max_model_len
        return context - first.prompt_tokens if limit is None and context is not None else limit

    def _why_not_continue(self, first: PrefillAnswer) -> str | None:
        context = self._choice.decode.worker.endpoint.report.max_model_len
        limit = self._limit(first)
        if limit is None or context is None:
            return "unknown_context"
        if limit < 1 or first.prompt_tokens + limit > context:
            return "context_exceeded"  # what one server does with it, refuse or shorten, the decode worker does too
        return None

    async def _go_local(self, failed: LegFailedError) -> None:
        """The decode worker computes the prompt itself."""
        about = {"request_id": self._record.request_id, "reason": failed.reason}
        log.warning("the decode worker computes the prompt: %s", failed, extra=about)
        self._local = failed.reason
        self._choice.need_no_prefill()
        self._legs.kv_lost(failed.reason)
        await self._relay_decode(self._record.route, lambda _: self._client.plain())

    # The fast path

    def _finish_with(self, first: PrefillAnswer, finish_reason: str) -> None:
        """The first token was the last."""
        self._legs.path("first-token", None)
        seam = self._seam(first)
        if self._client.view.stream:
            self._reply.start(EVENT_STREAM)
            self._exchange.end(seam.opening(finish_reason) + seam.ending())
            self._reply.told_first_token()
        else:
            self._reply.whole(JSON, seam.whole(None, finish_reason))

    async def _continue(self, first: PrefillAnswer, failure: LegFailedError | None) -> None:
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
            self._legs.kv_lost(failure.reason)
        client = self._client

        def body(handoff: DecodeHandoff | None) -> bytes:
            return client.for_continuation(ids, token_id, limit - 1, handoff)

        seam = self._seam(first)
        if client.view.stream:
            await self._continue_stream(seam, body)
        else:
            await self._continue_whole(seam, body)

    async def _continue_stream(self, seam: Seam, body: MakeBody) -> None:
        reply = self._reply
        announced = reply.path
        reply.start(EVENT_STREAM, seam.opening(None))
        reply.told_first_token()
        response, chunk = await self._continuation(body)
        if response.status != 200:
            reply.break_off(chunk + await self._legs.read(response))
            return
        if reply.path != announced:
            reply.comment_path()
        await reply.stream(response, chunk, seam.relayed)

    async def _continuation(self, body: MakeBody) -> tuple[Response, bytes]:
        """The decode worker's head and first bytes. The client has the first token, so another one goes on after it."""
        while True:
            try:
                response = await self._legs.open_decode(_COMPLETIONS, body)
                try:
                    return response, await response.chunk()
                except HttpError as error:
                    raise self._legs.decode_failed(error) from error
            except LegFailedError as failed:
                self._choice.another_decode(failed)
                self._legs.kv_lost(failed.reason)

    async def _continue_whole(self, seam: Seam, body: MakeBody) -> None:
        response = await self._legs.open_decode(_COMPLETIONS, body)
        try:
            answer = await self._legs.read(response)
        except HttpError as error:
            raise self._legs.decode_failed(error) from error
        if response.status != 200:
            raise RefusedError(response, answer)
        try:
            whole = seam.whole(answer)
        except ValueError as error:
            raise RequestError(
                f"{self._record.decode_worker} answered something else than a completion: {error}",
                status=502,
                kind="upstream_error",
                reason="bad_answer",
            ) from None
        self._reply.whole(JSON, whole)

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
        await self._relay(await self._legs.open_decode(target, make_body), self._legs.decode_failed)

    # Relaying

    async def _relay(self, response: Response, lost: Callable[[HttpError], LegFailedError]) -> None:
        """A worker's answer, as it is.

        Raises:
            LegFailedError: its connection has ended, and nothing of it has reached the client (made by ``lost``).
        """
        kind = response.headers.get(b"content-type", b"application/json")
        streams = response.status == 200 and kind.startswith(b"text/event-stream")
        try:
            body = await (response.chunk() if streams else self._legs.read(response))
        except HttpError as error:
            raise lost(error) from error
        if not streams:
            self._reply.pass_on(response, body)
            return
        self._reply.start((b"content-type", kind))
        await self._reply.stream(response, body, None)
