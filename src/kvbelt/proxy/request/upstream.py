"""The calls of one request to its prefill and decode worker. Each ends in an outcome of the plan."""

import logging
import re
from collections.abc import Callable
from time import monotonic

from kvbelt.http import JSON, ConnectError, HttpError, PeerClosedError, Pieces, Response, encode_lines
from kvbelt.proxy.context import Context, KVLostError, Waiting
from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.proxy.observe.trace_context import new_span_id
from kvbelt.proxy.request.body import ClientBody
from kvbelt.proxy.request.merge import excerpt
from kvbelt.proxy.request.prefill_answer import PrefillAnswer
from kvbelt.proxy.request.selection import WorkerSelection
from kvbelt.proxy.request.steps import Outcome, Result
from kvbelt.proxy.workers import vllm_dialect
from kvbelt.proxy.workers.watch import Held
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId
from kvbelt.wire.notification import TransferFailed
from kvbelt.wire.reasons import as_word
from kvbelt.wire.shards import ONE_STAGE

log = logging.getLogger("kvbelt.proxy")

#: Makes a decode call's body: over transferred KV, or without.
MakeBody = Callable[[DecodeHandoff | None], Pieces]
Ended = Outcome | Result

#: Seconds before the deadline at which waiting for KV ends: the decode worker can still compute the prompt, and the
#: prefill worker has reported why the KV did not arrive. A tenth of the request's time where that is less.
MARGIN_SECONDS = 1.0

_CONTEXT = re.compile(rb"context_length_exceeded|context length|max_model_len")

_STREAM, _REFUSED, _DONE = Outcome.STREAM, Outcome.REFUSED, Outcome.DONE  # fast to read


class UpstreamCalls:
    """One request's calls to the workers of its ``selection``.

    Attributes:
        response, body: the latest answer; of a stream, its first piece.
    """

    def __init__(
        self,
        context: Context,
        record: Record,
        selection: WorkerSelection,
        *,
        authorization: bytes | None,
        deadline_seconds: float,
        itl: float | None,
    ) -> None:
        self.response: Response
        self.body = b""
        self._context = context
        self._settings = context.settings
        self._record = record
        self._selection = selection
        self._seconds = deadline_seconds
        self._deadline = record.began + deadline_seconds
        self._margin = min(MARGIN_SECONDS, deadline_seconds / 10)
        self._open: list[Response] = []
        headers = [JSON, (b"x-request-id", record.request_id.encode())]
        if itl is not None:
            headers.append((b"x-kvbelt-itl-ms", b"%g" % (1e3 * itl)))
        if authorization is not None:
            headers.append((b"authorization", authorization))
        self._headers = encode_lines(b"", headers)  # of every call
        self._attempt: Attempt  # the latest call
        self._sending: Attempt  # the latest call that sends KV
        self._reads_kv = False  # the latest decode call
        # Of the latest prefill worker's answer.
        self._adapter = ""
        self._tp_size: int | None = None
        self._stages = ONE_STAGE
        self._model = ""  # that the client asks for

    @property
    def adapter_on_decode(self) -> tuple[str, str, str]:
        """The latest prefill answer's LoRA adapter, as one that the decode worker may have under the same name."""
        return self._selection.decode.worker.engine_id or "", self._model, self._adapter

    def remaining(self) -> float:
        """Seconds to the request's deadline; always positive."""
        return max(0.001, self._deadline - monotonic())

    def close(self) -> None:
        """Close every answer that is not complete, so that the workers stop."""
        for response in self._open:
            response.close()
        for attempt in self._record.attempts:
            attempt.end()

    def overdue(self) -> Result:
        ends = [attempt.transfer for attempt in self._record.attempts]
        if any(isinstance(end, TransferFailed) and end.reason == "receiver_full" for end in ends):
            name = self._selection.decode.worker.name
            detail = f"decode worker {name} had no room for the prompt within {self._seconds:g} s; try again"
            return Result(Outcome.RECEIVER_FULL, detail=detail)
        return Result(Outcome.DEADLINE, detail=f"the request took longer than {self._seconds:g} s")

    # Prefill

    async def prefill_only(self, body: Pieces, *, may_repeat: bool) -> Ended:
        """Ask the prefill worker for the whole answer."""
        response = await self._call_prefill(body, TransferId(""), may_repeat=may_repeat)
        if isinstance(response, Result):
            return response
        return await self._first_piece(response, self._prefill_failed)

    async def prefill(self, client: ClientBody, *, may_repeat: bool) -> PrefillAnswer | Result | Outcome:
        """Ask the prefill worker for the first token, with the KV sent to the decode worker."""
        decode, metrics, record = self._selection.decode, self._context.metrics, self._record
        # It may have been lost since it was picked; then the transfer fails, or the decode call does.
        receiver = decode.worker.endpoint.report.receiver or decode.chosen.report.receiver
        assert receiver is not None
        transfer_id = TransferId(self._context.new_id())
        handoff = PrefillHandoff(transfer_id, receiver, self._kv_seconds(1.25), client.fields.limit)
        metrics.prefill_legs += 1
        try:
            response = await self._call_prefill(client.for_prefill(handoff), transfer_id, may_repeat=may_repeat)
            if isinstance(response, Result):
                return response
            body = await self._read(response)
        except HttpError as error:
            return self._prefill_failed(error)
        finally:
            metrics.prefill_legs -= 1
        record.prefill_answered = monotonic()
        worker = self._selection.prefill.worker
        if response.status != 200:
            if _exceeds_context(response, body) and self._decode_takes_more():
                # The worker's own words stay out of the log: a refusal may quote the prompt.
                return self._failed(Outcome.PREFILL_FAILED, "prefill_refused", f"{worker.name} answered 400")
            self._attempt.end()
            self.response, self.body = response, body
            return Outcome.REFUSED
        try:
            answer = PrefillAnswer(body)
        except ValueError as error:
            return self._failed(Outcome.PREFILL_FAILED, "prefill_bad_answer", f"{worker.name}: {error}")
        self._attempt.end()
        self._model = client.fields.model
        told = answer.handoff
        self._adapter, self._tp_size = (told.adapter, told.tp_size) if told is not None else ("", None)
        self._stages = told.stages if told is not None else ONE_STAGE
        return answer

    async def _call_prefill(self, body: Pieces, transfer_id: TransferId, *, may_repeat: bool) -> Response | Result:
        """The head of the prefill worker's answer, its status below 500."""
        worker, record = self._selection.prefill.worker, self._record
        attempt = self._attempt = self._context.records.attempt(record, "prefill", worker.name, transfer_id)
        if transfer_id:
            self._sending = attempt
        record.prefill_worker, record.prefill_sent = worker.name, attempt.began
        try:
            response = await worker.post(record.route, self._headers_of(attempt), body)
            del body  # a long prompt is not held while the worker computes it
            self._open.append(response)
            await response.head()
            attempt.answered = monotonic()
            attempt.timing = response.headers.get(b"server-timing", b"")
            if response.status < 500 and response.status != 404:
                return response
            answer = await self._read(response)
        except HttpError as error:
            return self._prefill_failed(error, may_repeat=may_repeat)
        if response.status == 404:
            return self._lacks_model(Outcome.PREFILL_FAILED, response, answer)
        if response.status == 500 and await worker.survived(self._selection.prefill.chosen.incarnation):
            return self._failed_by_itself(response, answer)
        worker.suspect()
        detail = f"{worker.name} answered {response.status}: {excerpt(answer)}"
        return self._failed(Outcome.PREFILL_FAILED, "prefill_5xx", detail)

    def _prefill_failed(self, error: HttpError, *, may_repeat: bool = False) -> Result:
        if may_repeat and _was_stale(error):
            return self._failed(Outcome.STALE, "stale_connection", str(error))
        self._selection.prefill.worker.suspect()
        reason = "prefill_unreachable" if isinstance(error, ConnectError) else "prefill_lost"
        return self._failed(Outcome.PREFILL_FAILED, reason, str(error))

    def failed_transfer(self, first: PrefillAnswer) -> str | None:
        """Why the latest transfer has failed, by the prefill worker's answer or its notification; None: it has not."""
        state, told = first.handoff, self._sending.transfer
        if state is not None and state.state == "failed":
            return as_word(state.reason, "failed")
        return as_word(told.reason, "failed") if isinstance(told, TransferFailed) else None

    def kv_failed(self, outcome: Outcome, why: str) -> Result:
        """Record that the answer was good, and its transfer was not."""
        prefill, decode = self._selection.prefill.worker, self._selection.decode.worker
        if prefill.engine_id is not None and decode.engine_id is not None:
            self._context.blame(prefill.engine_id, decode.engine_id, why)
        self._attempt.ended = None
        return self._failed(outcome, f"transfer_{why}", f"{prefill.name} reports that the transfer failed: {why}")

    def _decode_takes_more(self) -> bool:
        """Whether the decode worker's context is larger, so that the verdict on the prompt's length is its own."""
        here = self._selection.prefill.worker.endpoint.report.max_model_len
        there = self._selection.decode.worker.endpoint.report.max_model_len
        return here is not None and there is not None and here < there

    def _another_takes_more(self) -> bool:
        """Whether another worker's context is larger than the decode worker's."""
        here = self._selection.decode.worker.endpoint.report.max_model_len
        others = (one.endpoint.report.max_model_len for one in self._context.fleet if one.ready)
        return here is not None and any(there is not None and here < there for there in others)

    # Decode

    async def decode(  # noqa: PLR0911 - one for each outcome
        self, target: str, make_body: MakeBody, *, kv: bool, may_repeat: bool, streams: bool | None = None
    ) -> Ended:
        """Ask the decode worker, over the latest transfer's KV or without. ``streams`` None: by its content type."""
        record, held = self._record, self._selection.decode
        attempt = self._attempt = self._context.records.attempt(record, "decode", held.worker.name)
        record.decode_sent = attempt.began
        record.kv, self._reads_kv = None, kv
        if held.worker.lost:
            detail = f"worker {held.worker.name} is lost: {held.worker.endpoint.report.detail}"
            return self._decode_failed(PeerClosedError(detail))
        if kv and held.restarted:
            detail = f"worker {held.worker.name} was restarted after the KV had been sent to it"
            return self._decode_failed(HttpError(detail), "decode_restarted")
        try:
            response = await self._call_decode(target, make_body, kv=kv)
        except KVLostError as lost:  # nothing is wrong with the worker
            return self._failed(Outcome.KV_LOST, lost.reason, str(lost))
        except HttpError as error:
            if may_repeat and _was_stale(error):
                return self._failed(Outcome.STALE, "stale_connection", str(error))
            return self._decode_failed(error)
        record.decode_answered = attempt.answered = monotonic()
        if response.status >= 500 or response.status == 404:
            return await self._decode_5xx(response)
        attempt.timing = response.headers.get(b"server-timing", b"")
        self._selection.release_prefill()
        answer = await self._first_piece(response, self._decode_failed, streams=streams)
        if answer is _REFUSED and _exceeds_context(response, self.body) and self._another_takes_more():
            # The worker's own words stay out of the log: a refusal may quote the prompt.
            return self._failed(Outcome.DECODE_FAILED, "too_long", f"{held.worker.name} answered 400")
        if response.status == 200 and not isinstance(answer, Result):
            self._selection.first_token()
        if (said := response.headers.get(b"x-kvbelt-kv")) is not None:
            record.kv = said.decode("latin-1")
        elif kv and response.status == 200:
            outcome = None
            if answer is not _STREAM:
                outcome, self.body = vllm_dialect.take_outcome(self.body, self._sending.transfer_id)
            record.kv = outcome.text if outcome is not None else self._sending.kv
        reason = self._why_recomputed()
        return answer if reason is None or isinstance(answer, Result) else Result(answer, reason)

    def streamed(self) -> Outcome | Result:
        """The latest answer's stream has ended. A vLLM server may have told meanwhile what became of the KV."""
        record = self._record
        if self._reads_kv and record.kv is None:
            record.kv = self._sending.kv
            return Result(_DONE, self._why_recomputed())
        return _DONE

    def _why_recomputed(self) -> str | None:
        """Why the decode worker has computed the prompt, as far as it has said; None: it has not."""
        kv = self._record.kv
        if self._adapter and kv is not None:
            self._context.compared(self.adapter_on_decode, equal=kv == "received")
        if kv is None or not kv.startswith("recomputed"):
            return None
        return as_word(kv.partition("reason=")[2].strip(), "kv_lost")

    async def _call_decode(self, target: str, make_body: MakeBody, *, kv: bool) -> Response:
        worker = self._selection.decode.worker
        handoff = None
        if kv:
            seconds = min(self._settings.kv_wait_seconds, self._kv_seconds(1.0))
            handoff = DecodeHandoff(
                TransferId(self._sending.transfer_id), seconds, self._adapter, self._tp_size, self._stages
            )
        response = await worker.post(target, self._headers_of(self._attempt), make_body(handoff))
        self._open.append(response)
        if not kv:
            await response.head()
            return response
        waiting = Waiting(self._sending, self._selection.prefill.worker, response)
        self._context.wait_for(waiting)
        try:
            await response.head()
        finally:
            self._context.wait_over(waiting)
        return response

    def _decode_failed(self, error: HttpError, reason: str | None = None) -> Result:
        """No answer, or its connection ended before anything of it reached the client."""
        if reason is None:
            reason = "decode_unreachable" if isinstance(error, ConnectError) else "decode_lost"
        self._selection.decode.worker.suspect()
        return self._failed(Outcome.DECODE_FAILED, reason, str(error))

    async def _decode_5xx(self, response: Response) -> Result:
        """The worker is stopping, loading, or has failed; its next health check may say so. Or it lacks the model."""
        worker = self._selection.decode.worker
        try:
            self.response, self.body = response, await self._read(response)
        except HttpError as error:
            return self._decode_failed(error)
        if response.status == 404:
            return self._lacks_model(Outcome.DECODE_5XX, response, self.body)
        if response.status == 500 and await worker.survived(self._selection.decode.chosen.incarnation):
            return self._failed_by_itself(response, self.body)
        worker.suspect()
        detail = f"{worker.name} answered {response.status}: {excerpt(self.body)}"
        return self._failed(Outcome.DECODE_5XX, "decode_5xx", detail)

    # Both

    def _failed_by_itself(self, response: Response, body: bytes) -> Result:
        """The worker failed at this request and is well: the next one would fail at it, and at those beside it."""
        attempt = self._attempt
        detail = f"{attempt.worker} answered 500 and is well, so the request is not tried elsewhere: {excerpt(body)}"
        self.response, self.body = response, body
        self._failed(Outcome.REFUSED, f"{attempt.leg}_5xx", detail)
        return Result(Outcome.REFUSED, detail=detail)

    def _lacks_model(self, outcome: Outcome, response: Response, body: bytes) -> Result:
        """An adapter may be loaded into some workers only. If none has it, the client gets the last one's words."""
        self.response, self.body = response, body
        return self._failed(outcome, "model_missing", f"{self._attempt.worker} answered 404")

    async def _first_piece(
        self, response: Response, failed: Callable[[HttpError], Result], *, streams: bool | None = None
    ) -> Ended:
        """Read the first piece of a stream, or the whole of another answer."""
        if streams is None:
            streams = response.headers.get(b"content-type", b"").startswith(b"text/event-stream")
        streams = streams and response.status == 200
        try:
            self.response, self.body = response, await (response.chunk() if streams else self._read(response))
        except HttpError as error:
            return failed(error)
        if streams:
            return _STREAM
        return Outcome.WHOLE if response.status == 200 else Outcome.REFUSED

    def _headers_of(self, attempt: Attempt) -> bytes:
        """A call's headers, with its place in the request's trace."""
        trace = self._record.trace
        if trace is None:
            return self._headers
        attempt.span_id = new_span_id() if trace.recorded else trace.span_id
        return self._headers + encode_lines(b"", trace.headers(attempt.span_id))

    async def _read(self, response: Response) -> bytes:
        return await response.read(self._settings.max_answer_bytes)

    def _kv_seconds(self, margins: float) -> float:
        """How long KV may take: not to the very end of the request's time.

        The prefill worker has a little less than the decode worker, so that it is the one to report why.
        """
        return max(0.001, self._deadline - margins * self._margin - monotonic())

    def _failed(self, outcome: Outcome, reason: str, detail: str) -> Result:
        attempt, record = self._attempt, self._record
        attempt.end(reason, detail)
        record.errors += (f"{reason}: {detail}",)
        self._context.metrics.failed_attempts[attempt.leg].add(reason)
        about = {"request_id": record.request_id, "reason": reason, "worker": attempt.worker}
        level = logging.INFO if outcome is Outcome.STALE else logging.WARNING
        log.log(level, "a %s call failed: %s", attempt.leg, detail, extra=about)
        held: Held = self._selection.prefill if attempt.leg == "prefill" else self._selection.decode
        return Result(outcome, reason, detail, held.chosen.incarnation)


def _exceeds_context(response: Response, body: bytes) -> bool:
    """Whether a worker has refused a request for its length, by our own code or by vLLM's words."""
    return response.status == 400 and _CONTEXT.search(body) is not None


def _was_stale(error: HttpError) -> bool:
    """Whether a kept connection ended without a byte of an answer: most likely the peer was just closing it."""
    return isinstance(error, PeerClosedError) and error.reused and not error.started
