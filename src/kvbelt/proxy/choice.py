"""Which two workers one request uses: chosen, held for as long as it needs them, and replaced when they fail.

Whoever is held is not forgotten, although it may have been told to leave.
"""

import logging

from kvbelt.errors import RequestError
from kvbelt.http import Response
from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.records import Record
from kvbelt.proxy.tries import Tries
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Endpoint, Role

log = logging.getLogger("kvbelt.proxy")


class RefusedError(Exception):
    """A worker refused the request with an answer that the client is to see."""

    def __init__(self, response: Response, body: bytes) -> None:
        super().__init__(f"status {response.status}")
        self.response = response
        self.body = body


class LegFailedError(Exception):
    """A worker gave no answer to use, and nothing of it has reached the client.

    Attributes:
        reason: of ``wire/reasons.py``.
        refusal: what the client is told if nobody else is there to ask; None: an error of the proxy's own.
    """

    def __init__(self, reason: str, detail: str, refusal: RefusedError | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.refusal = refusal


class Held:
    """A worker that a request needs, and as whom it was chosen: it is that life of it which is meant."""

    __slots__ = ("chosen", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.chosen: Endpoint = worker.endpoint
        worker.hold()

    @property
    def restarted(self) -> bool:
        """Whether it is another process now."""
        return self.worker.engine_id != self.chosen.report.engine_id


class Choice:
    """Of one request."""

    def __init__(self, fleet: Fleet, record: Record, most: int) -> None:
        self._fleet = fleet
        self._record = record
        self._most = most
        self.tries = Tries(most)
        self._decode: Held | None = None
        self._prefill: Held | None = None

    @property
    def decode(self) -> Held:
        """The decode worker that answers, or will; held until the end."""
        assert self._decode is not None
        return self._decode

    @property
    def prefill(self) -> Held | None:
        """The prefill worker, if one was chosen; held until the KV's fate is known."""
        return self._prefill

    def take_decode(self) -> None:
        """Take the decode worker whose turn it is.

        Raises:
            RequestError: 503, none is ready that was not tried.
        """
        worker = self._fleet.pick_decode(self.tries.excluded("decode"))
        if worker is None:
            states = ", ".join(f"{one.name} {one.endpoint.state}" for one in self._fleet.of(Role.DECODE))
            raise RequestError(
                f"no decode worker is left ({states or 'there is none'}); try again",
                status=503,
                kind="unavailable",
                reason="no_decode_worker",
            )
        self._hold_decode(worker)
        self._record.decode_worker = worker.name

    def take_prefill(self) -> Worker | None:
        """Take the prefill worker whose turn it is; None: none is left that fits the decode worker."""
        worker = None
        if self.tries.may_go_on("prefill"):
            worker = self._fleet.pick_prefill(self.decode.worker, self.tries.excluded("prefill"))
        self._hold_prefill(worker)
        return worker

    def pairs_refused(self) -> bool:
        """Whether prefill workers are left, but none of them fits the decode worker."""
        return self._prefill is None and self._fleet.any_prefill_ready(self.tries.excluded("prefill"))

    def need_no_prefill(self) -> None:
        """The decode worker needs it no more, or does it all."""
        self._hold_prefill(None)

    def another_decode(self, failed: LegFailedError) -> None:
        """After a decode leg has failed: take another worker.

        Raises:
            RefusedError: nobody is left, and this is what the last one said.
            RequestError: 503, nobody is left.
        """
        self.tries.failed("decode", self.decode.chosen.life)
        try:
            self._require_a_try(failed)
            self.take_decode()
        except RequestError:
            if failed.refusal is not None:
                raise failed.refusal from failed
            raise
        self._retried(failed)

    def _require_a_try(self, failed: LegFailedError) -> None:
        if not self.tries.may_go_on("decode"):
            raise RequestError(
                f"{self._most} decode workers in turn did not answer, the last one because {failed}; try again",
                status=503,
                kind="unavailable",
                reason="decode_lost",
            )

    def another_prefill(self, failed: LegFailedError) -> bool:
        """After a prefill leg has failed: take another worker. False: none is left."""
        assert self._prefill is not None
        self.tries.failed("prefill", self._prefill.chosen.life)
        if self.take_prefill() is None:
            return False
        self._retried(failed)
        return True

    def let_go(self) -> None:
        """The request is over."""
        self._hold_prefill(None)
        self._hold_decode(None)

    def _retried(self, failed: LegFailedError) -> None:
        self._record.after += (failed.reason,)
        about = {"request_id": self._record.request_id, "reason": failed.reason}
        log.info("the request is tried elsewhere: %s", failed, extra=about)

    def _hold_decode(self, worker: Worker | None) -> None:
        before, self._decode = self._decode, None if worker is None else Held(worker)
        if before is not None:
            before.worker.let_go()

    def _hold_prefill(self, worker: Worker | None) -> None:
        before, self._prefill = self._prefill, None if worker is None else Held(worker)
        if before is not None:
            before.worker.let_go()
