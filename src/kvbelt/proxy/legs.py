"""The two legs of a request: the calls to a prefill and a decode worker, and what becomes of the KV between them.

A leg that fails says why, and the journey decides what is tried next. What the legs settle themselves is that KV is
not waited for once it cannot come.
"""

import logging
from collections.abc import Callable
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import ConnectError, HttpError, PeerClosedError, Response
from kvbelt.proxy.choice import Choice, Held, LegFailedError, RefusedError
from kvbelt.proxy.client_body import ClientBody
from kvbelt.proxy.context import Context, KVLostError, Waiting
from kvbelt.proxy.prefill_answer import PrefillAnswer
from kvbelt.proxy.records import Attempt, Record
from kvbelt.proxy.workers import Worker
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId
from kvbelt.wire.notification import TransferFailed
from kvbelt.wire.reasons import as_word

log = logging.getLogger("kvbelt.proxy")

#: Makes a decode leg's body: over transferred KV, or without.
MakeBody = Callable[[DecodeHandoff | None], bytes]

#: The last part of a request's time, in which no KV is waited for: the decode worker may still compute the prompt, and
#: the prefill worker has said why the KV did not come. A tenth of the whole, and at most so many seconds.
MARGIN_SECONDS = 1.0


class Legs:
    """One request's calls to the workers of its ``choice``."""

    def __init__(
        self, context: Context, record: Record, choice: Choice, authorization: bytes | None, deadline_seconds: float
    ) -> None:
        self._context = context
        self._settings = context.settings
        self._record = record
        self._choice = choice
        self._seconds = deadline_seconds
        self._deadline = record.began + deadline_seconds
        self._margin = min(MARGIN_SECONDS, deadline_seconds / 10)
        self._open: list[Response] = []
        self._headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"x-request-id", record.request_id.encode()),
        ]
        if authorization is not None:
            self._headers.append((b"authorization", authorization))
        self._decode_attempt: Attempt | None = None
        self._sent: tuple[Attempt, Held] | None = None  # the latest KV that may still come, and to whom

    @property
    def transfer(self) -> Attempt | None:
        """The prefill leg whose KV the decode worker may still hope for."""
        if self._sent is None or self._sent[1] is not self._choice.decode:
            return None
        return self._sent[0]

    def remaining(self) -> float:
        """Seconds to the request's deadline, never quite none."""
        return max(0.001, self._deadline - monotonic())

    def close(self) -> None:
        """Close whatever is not complete, so that the workers stop."""
        for leg in self._open:
            leg.close()
        for attempt in self._record.attempts:
            attempt.end()

    def path(self, path: str, reason: str | None) -> None:
        """The road taken."""
        self._record.path = path
        self._record.reason = reason

    def kv_lost(self, reason: str) -> None:
        """The decode worker computes the prompt itself."""
        self._sent = None
        self.path("local", reason)

    def overdue(self) -> RequestError:
        """What to tell the client when its time is over."""
        told = [attempt.transfer for attempt in self._record.attempts]
        if any(isinstance(end, TransferFailed) and end.reason == "receiver_full" for end in told):
            return RequestError(
                f"decode worker {self._decode.name} had no room for the prompt within {self._seconds:g} s; try again",
                status=503,
                kind="unavailable",
                reason="receiver_full",
            )
        return RequestError(
            f"the request took longer than {self._seconds:g} s", status=504, kind="timeout_error", reason="deadline"
        )

    # The prefill leg

    async def call_prefill(self, make_body: Callable[[TransferId], bytes], *, sends_kv: bool) -> Response:
        """The head of the chosen prefill worker's answer. A connection that was just being closed is made again.

        Raises:
            LegFailedError: unreachable, lost, or a status of 500 and above.
        """
        self._choice.tries.made("prefill")
        try:
            return await self._call_prefill(make_body, sends_kv=sends_kv)
        except LegFailedError as failed:
            if failed.reason != "stale_connection":
                raise
            return await self._call_prefill(make_body, sends_kv=sends_kv, last=True)

    async def _call_prefill(
        self, make_body: Callable[[TransferId], bytes], *, sends_kv: bool, last: bool = False
    ) -> Response:
        worker, record = self._prefill, self._record
        transfer_id = TransferId(self._context.new_id())
        attempt = self._context.records.attempt(record, "prefill", worker.name, transfer_id if sends_kv else "")
        self._sent = (attempt, self._choice.decode) if sends_kv else None
        record.prefill_worker = worker.name
        record.prefill_sent = attempt.began
        try:
            response = await worker.post(record.route, self._headers_of(attempt), make_body(transfer_id))
            self._open.append(response)
            await response.head()
            attempt.answered = monotonic()
            attempt.timing = response.headers.get(b"server-timing", b"")
            if response.status >= 500:
                answer = await self.read(response)
                worker.suspect()
                detail = f"{worker.name} answered {response.status}: {excerpt(answer)}"
                raise self._failed(attempt, "prefill_5xx", detail)
        except ConnectError as error:
            raise self._failed(attempt, "prefill_unreachable", str(error)) from None
        except HttpError as error:
            if not last and _was_stale(error):
                raise self._failed(attempt, "stale_connection", str(error)) from error
            raise self.prefill_lost(error) from error
        return response

    def prefill_lost(self, error: HttpError) -> LegFailedError:
        """The connection to the chosen prefill worker has ended."""
        self._prefill.suspect()
        return self._failed(self._record.attempts[-1], "prefill_lost", str(error))

    @property
    def can_send_kv(self) -> bool:
        """Whether the chosen decode worker, as it was last seen, takes KV."""
        return self._decode.endpoint.report.receiver is not None

    async def first(self, client: ClientBody) -> PrefillAnswer:
        """The prefill leg, with the KV sent to the decode worker.

        Raises:
            LegFailedError: no answer to use.
            RefusedError: the request is one that a worker does not serve.
        """
        worker, receiver = self._prefill, self._decode.endpoint.report.receiver
        assert receiver is not None
        metrics, record = self._context.metrics, self._record
        metrics.prefill_legs += 1
        try:
            response = await self.call_prefill(
                lambda transfer_id: client.for_prefill(PrefillHandoff(transfer_id, receiver, self._kv_seconds(1.25))),
                sends_kv=True,
            )
            body = await self.read(response)
        except HttpError as error:
            raise self.prefill_lost(error) from error
        finally:
            metrics.prefill_legs -= 1
        attempt = record.attempts[-1]
        record.prefill_answered = monotonic()
        if response.status != 200:
            if response.status == 400 and self._decode_takes_more(worker):
                # Not its words: a refusal may quote the prompt, and this goes into the log.
                raise self._failed(attempt, "prefill_refused", f"{worker.name} answered 400")
            attempt.end()
            raise RefusedError(response, body)
        try:
            first = PrefillAnswer(body)
        except ValueError as error:
            raise self._failed(attempt, "prefill_bad_answer", f"{worker.name}: {error}") from None
        attempt.end()
        return first

    def transfer_failed(self, first: PrefillAnswer) -> LegFailedError | None:
        """Whether the prefill leg's transfer has failed already, by its answer or by a notification."""
        attempt, state = self.transfer, first.handoff
        if attempt is None:
            return None
        if state is not None and state.state == "failed":
            why = as_word(state.reason, "failed")
        elif isinstance(attempt.transfer, TransferFailed):
            why = as_word(attempt.transfer.reason, "failed")
        else:
            return None
        worker = self._prefill
        if worker.engine_id is not None and self._decode.engine_id is not None:
            self._context.blame(worker.engine_id, self._decode.engine_id, why)
        attempt.ended = None  # the answer was good, the leg as a whole was not
        return self._failed(attempt, f"transfer_{why}", f"{worker.name} says that the transfer failed: {why}")

    def _decode_takes_more(self, prefill: Worker) -> bool:
        """Whether the decode worker's context is the larger one, so that the verdict is its own to give."""
        here, there = prefill.endpoint.report.max_model_len, self._decode.endpoint.report.max_model_len
        return here is not None and there is not None and here < there

    # The decode leg

    async def open_decode(self, target: str, make_body: MakeBody) -> Response:
        """The head of the decode worker's answer; the KV's fate is known then.

        Raises:
            LegFailedError: unreachable, lost, another process than the KV was sent to, or a status of 500 and above.
        """
        record = self._record
        stale_allowed = True
        self._choice.tries.made("decode")
        while True:
            attempt = self._decode_attempt = self._context.records.attempt(record, "decode", self._decode.name)
            record.decode_sent = attempt.began
            try:
                response = await self._try_decode(target, make_body)
                break
            except KVLostError as lost:
                # The same worker is asked again, without: nothing is wrong with it.
                self._failed(attempt, lost.reason, str(lost))
                self.kv_lost(lost.reason)
            except HttpError as error:
                if stale_allowed and _was_stale(error):
                    stale_allowed = False
                    attempt.end("stale_connection", str(error))
                    continue
                raise self.decode_failed(error) from error
        record.decode_answered = attempt.answered = monotonic()
        if response.status >= 500:
            raise await self._decode_5xx(response)
        attempt.timing = response.headers.get(b"server-timing", b"")
        self._learn_fate(response)
        return response

    async def _try_decode(self, target: str, make_body: MakeBody) -> Response:
        worker, transfer = self._decode, self.transfer
        if worker.lost:
            raise PeerClosedError(f"worker {worker.name} is lost: {worker.endpoint.report.detail}")
        handoff = None
        if transfer is not None:
            if self._choice.decode.restarted:
                raise _RestartedError(f"worker {worker.name} was started again after the KV had been sent to it")
            seconds = min(self._settings.kv_wait_seconds, self._kv_seconds(1.0))
            handoff = DecodeHandoff(TransferId(transfer.transfer_id), seconds)
        response = await worker.post(target, self._headers_of(self._decode_attempt), make_body(handoff))
        self._open.append(response)
        if transfer is None:
            await response.head()
            return response
        waiting = Waiting(transfer, self._prefill, response)
        self._context.wait_for(waiting)
        try:
            await response.head()
        finally:
            self._context.wait_over(waiting)
        return response

    def decode_failed(self, error: HttpError) -> LegFailedError:
        """The decode worker gave no answer, or its connection ended before anything of it reached the client."""
        assert self._decode_attempt is not None
        reason = {ConnectError: "decode_unreachable", _RestartedError: "decode_restarted"}.get(
            type(error), "decode_lost"
        )
        self._decode.suspect()
        about = {"request_id": self._record.request_id, "reason": reason, "worker": self._decode.name}
        log.warning("no answer from the decode worker: %s", error, extra=about)
        return self._failed(self._decode_attempt, reason, str(error))

    async def _decode_5xx(self, response: Response) -> LegFailedError:
        """It is stopping, still loading, or has failed; its next health check may say so."""
        assert self._decode_attempt is not None
        try:
            body = await self.read(response)
        except HttpError as error:
            return self.decode_failed(error)
        self._decode.suspect()
        detail = f"{self._decode.name} answered {response.status}: {excerpt(body)}"
        failed = self._failed(self._decode_attempt, "decode_5xx", detail)
        failed.refusal = RefusedError(response, body)
        return failed

    def _learn_fate(self, response: Response) -> None:
        """What became of the KV. Whoever sent it is needed no more."""
        kv = response.headers.get(b"x-kvbelt-kv")
        if kv is not None:
            self._record.kv = kv.decode("latin-1")
            if kv.startswith(b"recomputed"):
                self.kv_lost(_reason_of(self._record.kv))
        self._choice.need_no_prefill()

    # Both

    @property
    def _decode(self) -> Worker:
        return self._choice.decode.worker

    @property
    def _prefill(self) -> Worker:
        held = self._choice.prefill
        assert held is not None
        return held.worker

    def _headers_of(self, attempt: Attempt | None) -> list[tuple[bytes, bytes]]:
        """What a worker is told, its place in the request's trace included."""
        trace = self._record.trace
        if trace is None or attempt is None:
            return self._headers
        attempt.span_id = self._context.tracer.new_span() if trace.recorded else trace.span_id
        return [*self._headers, *trace.headers(attempt.span_id)]

    async def read(self, response: Response) -> bytes:
        """A worker's whole body."""
        return await response.read(self._settings.max_answer_bytes)

    def _kv_seconds(self, margins: float) -> float:
        """How long KV may take: not to the very end of the request's time.

        The prefill worker is given a little less than the decode worker, so that it is the one to say why.
        """
        return max(0.001, self.remaining() - margins * self._margin)

    def _failed(self, attempt: Attempt, reason: str, detail: str) -> LegFailedError:
        attempt.end(reason, detail)
        self._record.errors += (f"{reason}: {detail}",)
        self._context.metrics.failed_attempts[attempt.leg].add(reason)
        return LegFailedError(reason, detail)


class _RestartedError(HttpError):
    """The process that the KV was sent to is no more."""


def _was_stale(error: BaseException | None) -> bool:
    """A kept connection ended without a byte of an answer: most likely the peer was just closing it."""
    return isinstance(error, PeerClosedError) and error.reused and not error.started


def _reason_of(kv: str) -> str:
    """``recomputed; reason=deadline`` → ``deadline``."""
    return as_word(kv.partition("reason=")[2].strip(), "kv_lost")


def excerpt(body: bytes) -> str:
    """The beginning of a body, for a log."""
    return body[:200].decode("utf-8", "replace")
