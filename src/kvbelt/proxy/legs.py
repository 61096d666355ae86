"""The two legs of a request: the calls to a prefill and a decode worker, and what becomes of the KV between them.

A leg that fails is an error for the journey to turn into a road; what the legs settle themselves is which decode
worker answers, and that the KV is not waited for once it cannot come.
"""

import logging
from collections.abc import Callable
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import ConnectError, HttpError, PeerClosedError, Response
from kvbelt.proxy.client_body import ClientBody
from kvbelt.proxy.context import Context, KVLostError, Waiting
from kvbelt.proxy.prefill_answer import PrefillAnswer
from kvbelt.proxy.records import Record
from kvbelt.proxy.workers import Worker
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import TransferId

log = logging.getLogger("kvbelt.proxy")

#: Makes a decode leg's body: over transferred KV, or without.
MakeBody = Callable[[DecodeHandoff | None], bytes]


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


class Legs:
    """One request's calls to workers.

    Attributes:
        prefill: the prefill worker chosen for it, if one was.
        decode: the decode worker that answers, or will.
        transfer: the KV that the decode worker may still hope for.
    """

    def __init__(self, context: Context, record: Record, authorization: bytes | None) -> None:
        self._context = context
        self._settings = context.settings
        self._record = record
        self._deadline = record.began + context.settings.deadline_seconds
        self._open: list[Response] = []
        self._headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"x-request-id", record.request_id.encode()),
        ]
        if authorization is not None:
            self._headers.append((b"authorization", authorization))
        self.decode: Worker
        self.prefill: Worker | None = None
        self.transfer: TransferId | None = None
        self._busy: Worker | None = None  # the decode worker whose answer is being read

    def remaining(self) -> float:
        """Seconds to the request's deadline, never quite none."""
        return max(0.001, self._deadline - monotonic())

    def close(self) -> None:
        """Close whatever is not complete, so that the workers stop."""
        for leg in self._open:
            leg.close()
        if self._busy is not None:
            self._busy.in_flight -= 1
            self._busy = None

    def path(self, path: str, reason: str | None) -> None:
        """The road taken."""
        self._record.path = path
        self._record.reason = reason

    def kv_lost(self, reason: str) -> None:
        """The decode worker computes the prompt itself."""
        self.transfer = None
        self.path("local", reason)

    async def read(self, response: Response) -> bytes:
        """A worker's whole body."""
        return await response.read(self._settings.max_answer_bytes)

    def pick_decode(self, exclude: frozenset[str] = frozenset()) -> Worker:
        """A decode worker that is ready.

        Raises:
            RequestError: 503, there is none.
        """
        worker = self._context.pick_decode(exclude)
        if worker is None:
            states = ", ".join(f"{w.name} {w.endpoint.report.health}" for w in self._context.decode)
            raise RequestError(f"no decode worker is ready ({states}); try again", status=503, kind="unavailable")
        self._record.decode_worker = worker.name
        return worker

    async def call_prefill(self, worker: Worker, body: bytes) -> Response:
        """The head of a prefill worker's answer.

        Raises:
            LegFailedError: unreachable, lost, or a status of 500 and above.
        """
        record = self._record
        record.prefill_worker = worker.name
        record.prefill_sent = monotonic()
        try:
            response = await worker.post(record.route, self._headers, body)
            self._open.append(response)
            await response.head()
        except ConnectError as error:
            raise LegFailedError("prefill_unreachable", str(error)) from None
        except HttpError as error:
            worker.suspect()
            raise LegFailedError("prefill_lost", str(error)) from error
        if response.status >= 500:
            answer = await self.read(response)
            raise LegFailedError("prefill_5xx", f"{worker.name} answered {response.status}: {excerpt(answer)}")
        return response

    async def first(self, worker: Worker, client: ClientBody) -> PrefillAnswer:
        """The prefill leg, with the KV sent to the decode worker.

        Raises:
            LegFailedError: the decode worker has to do it all.
            RefusedError: the request is one that a worker does not serve.
        """
        receiver = self.decode.endpoint.report.receiver
        assert receiver is not None
        metrics, record = self._context.metrics, self._record
        metrics.prefill_legs += 1
        worker.in_flight += 1
        try:
            for attempt in (1, 2):
                transfer_id = self.transfer = TransferId(self._context.new_id())
                self._context.records.name_transfer(record, transfer_id)
                handoff = PrefillHandoff(transfer_id, receiver, self.remaining())
                try:
                    response = await self.call_prefill(worker, client.for_prefill(handoff))
                    break
                except LegFailedError as failed:
                    if attempt == 2 or not _was_stale(failed.__cause__):
                        raise
            body = await self.read(response)
        except HttpError as error:
            worker.suspect()
            raise LegFailedError("prefill_lost", str(error)) from error
        finally:
            metrics.prefill_legs -= 1
            worker.in_flight -= 1
        record.prefill_answered = monotonic()
        record.prefill_timing = response.headers.get(b"server-timing", b"")
        if response.status != 200:
            if response.status == 400 and self._decode_takes_more(worker):
                raise LegFailedError("prefill_refused", f"{worker.name}: {excerpt(body)}")
            raise RefusedError(response, body)
        try:
            return PrefillAnswer(body)
        except ValueError as error:
            raise LegFailedError("prefill_bad_answer", f"{worker.name}: {error}") from None

    def _decode_takes_more(self, prefill: Worker) -> bool:
        """Whether the decode worker's context is the larger one, so that the verdict is its own to give."""
        here, there = prefill.endpoint.report.max_model_len, self.decode.endpoint.report.max_model_len
        return here is not None and there is not None and here < there

    async def open_decode(self, target: str, make_body: MakeBody) -> Response:
        """The head of a decode worker's answer; the KV's fate is known then.

        A worker that is lost before it answers is replaced by another, which computes the prompt itself.

        Raises:
            RequestError: 503, no decode worker is left.
        """
        record = self._record
        tried: frozenset[str] = frozenset()
        stale_allowed = True
        while True:
            worker = self.decode
            record.decode_sent = monotonic()
            try:
                response = await self._try_decode(worker, target, make_body)
                if response.status != 503 or not self._another_decode(tried | {worker.name}):
                    break
                # It is stopping or still loading, and its next health check would have said so.
                worker.suspect()
                tried |= {worker.name}
                self.decode = self.pick_decode(tried)
                if self.transfer is not None:
                    self.kv_lost("decode_unavailable")
            except KVLostError as lost:
                self.kv_lost(lost.reason)
            except HttpError as error:
                if stale_allowed and _was_stale(error):
                    stale_allowed = False
                    continue
                worker.suspect()
                record.errors.append(f"decode_lost: {error}")
                log.warning("request %s: decode worker lost before it answered: %s", record.request_id, error)
                tried |= {worker.name}
                self.decode = self.pick_decode(tried)
                if self.transfer is not None:
                    self.kv_lost("decode_lost")
        self._busy = self.decode
        self._busy.in_flight += 1
        record.decode_answered = monotonic()
        record.decode_timing = response.headers.get(b"server-timing", b"")
        kv = response.headers.get(b"x-kvbelt-kv")
        if kv is not None:
            record.kv = kv.decode("latin-1")
            if kv.startswith(b"recomputed"):
                self.kv_lost(_reason_of(record.kv))
        return response

    def _another_decode(self, tried: frozenset[str]) -> bool:
        try:
            self.pick_decode(tried)
        except RequestError:
            return False
        return True

    async def _try_decode(self, worker: Worker, target: str, make_body: MakeBody) -> Response:
        handoff = None
        if self.transfer is not None:
            seconds = min(self._settings.kv_wait_seconds, self.remaining())
            handoff = DecodeHandoff(self.transfer, seconds)
        response = await worker.post(target, self._headers, make_body(handoff))
        self._open.append(response)
        if self.transfer is None or self.prefill is None:
            await response.head()
            return response
        waiting = Waiting(self.transfer, self.prefill, response)
        self._context.wait_for(waiting)
        try:
            await response.head()
        finally:
            self._context.wait_over(waiting)
        return response


def _was_stale(error: BaseException | None) -> bool:
    """A kept connection ended without a byte of an answer: most likely the peer was just closing it."""
    return isinstance(error, PeerClosedError) and error.reused and not error.started


def _reason_of(kv: str) -> str:
    """``recomputed; reason=deadline`` → ``deadline``."""
    reason = kv.partition("reason=")[2].strip()
    return reason if reason and reason.replace("_", "").replace("-", "").isalnum() else "kv_lost"


def excerpt(body: bytes) -> str:
    """The beginning of a body, for a log."""
    return body[:200].decode("utf-8", "replace")
