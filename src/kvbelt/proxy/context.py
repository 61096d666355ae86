"""What the requests of one proxy share: its workers, its counters, and who waits for whose KV."""

import asyncio
import itertools
import logging
import secrets
from time import monotonic

from kvbelt.http import HttpError, Response
from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.likeness import Likeness
from kvbelt.proxy.metrics import Metrics
from kvbelt.proxy.records import Attempt, Records
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.tracer import Tracer, sender_of
from kvbelt.proxy.warming import Warmer
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role
from kvbelt.wire import reasons
from kvbelt.wire.ids import EngineId
from kvbelt.wire.notification import Notification, TransferDone

log = logging.getLogger("kvbelt.proxy")

#: A decode worker normally hears of a failed transfer itself, and recomputes. If it has not answered this long
#: after the prefill worker's word, it did not hear.
HEARSAY_SECONDS = 1.0


class KVLostError(HttpError):
    """The KV that a decode worker waits for will not come. ``reason`` is of low cardinality."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the KV is lost: {reason}")
        self.reason = reason


class Waiting:
    """A decode leg that has not answered yet, and the prefill leg whose KV it waits for."""

    __slots__ = ("attempt", "prefill", "response")

    def __init__(self, attempt: Attempt, prefill: Worker, response: Response) -> None:
        self.attempt = attempt
        self.prefill = prefill
        self.response = response


class Context:
    """Shared by every request; touched from the event loop only."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings, self._lost, self._appeared)
        self.warmer = Warmer(self.fleet, settings)
        self.likeness = Likeness()
        self.tracer = Tracer(sender_of(settings), settings.trace_ratio)
        self.metrics = Metrics(lambda: self.fleet, self.fleet.pairs, self.tracer.outcomes)
        self.records = Records(settings.records_kept)
        self._waiting: dict[str, Waiting] = {}  # by transfer id
        self.life = secrets.token_hex(6)  #: names this life of the proxy
        self._count = itertools.count(1)

    def new_id(self) -> str:
        """A name that no request or transfer of this or another proxy has."""
        return f"{self.life}-{next(self._count):x}"

    # Who waits for whose KV

    def wait_for(self, waiting: Waiting) -> None:
        """This leg waits for this transfer; it is told if the KV cannot come any more."""
        self._waiting[waiting.attempt.transfer_id] = waiting

    def wait_over(self, waiting: Waiting) -> None:
        """The decode worker has answered, or the leg is given up."""
        self._waiting.pop(waiting.attempt.transfer_id, None)

    def notified(self, notification: Notification) -> None:
        """A prefill worker says how a transfer ended."""
        self.metrics.notified(notification)
        self.records.tell(notification)
        if isinstance(notification, TransferDone):
            return
        self.blame(notification.sender, notification.receiver, notification.reason)
        waiting = self._waiting.get(notification.transfer_id)
        if waiting is not None:
            error = KVLostError(f"transfer_{reasons.as_word(notification.reason, 'failed')}")
            asyncio.get_running_loop().call_later(HEARSAY_SECONDS, self._give_up, waiting, error)

    def blame(self, sender: EngineId, receiver: EngineId, reason: str) -> None:
        """What a failed transfer says about the two workers. Lives that are over are nobody's any more."""
        prefill, decode = self.fleet.with_engine(sender), self.fleet.with_engine(receiver)
        if prefill is None or decode is None or not reasons.is_of_pair(reason):
            return
        decode.suspect()
        if self.fleet.pairs.failed(sender, receiver, reason, "", monotonic()):
            log.warning("%s could not send to %s: %s", prefill.name, decode.name, reason)

    def _give_up(self, waiting: Waiting, error: KVLostError) -> None:
        if self._waiting.get(waiting.attempt.transfer_id) is waiting and not waiting.response.head_complete:
            waiting.response.abandon(error)

    def _appeared(self, worker: Worker) -> None:
        self.likeness.appeared(worker, self.fleet)
        self.warmer.appeared(worker)

    def _lost(self, worker: Worker) -> None:
        if worker.role is not Role.PREFILL:
            return  # its connections are closed already
        for waiting in list(self._waiting.values()):
            done = isinstance(waiting.attempt.transfer, TransferDone)
            if waiting.prefill is worker and not done and not waiting.response.head_complete:
                waiting.response.abandon(KVLostError("prefill_lost"))
