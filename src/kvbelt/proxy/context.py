"""What the requests of one proxy share: workers, metrics, records, and the decode calls that wait for KV."""

import asyncio
import itertools
import logging
import secrets
from dataclasses import dataclass
from time import monotonic

from kvbelt.http import HttpError, Response
from kvbelt.proxy.observe.metrics import Metrics
from kvbelt.proxy.observe.records import Attempt, Records
from kvbelt.proxy.observe.shadow import ShadowAccount
from kvbelt.proxy.observe.tracer import Tracer, sender_of
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers.dispatcher import Dispatcher
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.proxy.workers.warm_up import Warmer
from kvbelt.proxy.workers.watch import Worker
from kvbelt.routing.output_lengths import OutputLengths
from kvbelt.routing.token_count import TokenCounts
from kvbelt.turns import Turns
from kvbelt.wire import reasons
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.notification import Notification, OutcomeReport, StepsReport, TransferDone

log = logging.getLogger("kvbelt.proxy")

#: A decode worker normally learns of a failed transfer itself, and recomputes. If it has not answered this long after
#: the prefill worker's notification, it did not learn of it.
HEARSAY_SECONDS = 1.0

_MOST_ADAPTERS = 4096  #: of which it is remembered that two workers have the same one


class KVLostError(HttpError):
    """The KV that a decode worker waits for will not arrive. ``reason`` is of ``wire/reasons.py``."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the KV is lost: {reason}")
        self.reason = reason


@dataclass(slots=True, eq=False)
class Waiting:
    """A decode call that has no answer yet, and the prefill call whose KV it waits for."""

    attempt: Attempt
    prefill: Worker
    response: Response


class Context:
    """Shared by every request; touched from the event loop only."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.levels = settings.levels
        self.fleet = Fleet(
            settings, lost=self._lost, appeared=self._appeared, changed=self._changed, told_steps=self._told_steps
        )
        self.dispatcher = Dispatcher(self.fleet, settings)
        self.warmer = Warmer(self.fleet, settings)
        receiver = sender_of(settings.otlp_endpoint, f"{settings.host}:{settings.port}")
        self.tracer = Tracer(receiver, settings.trace_ratio)
        self.records = Records(settings.records_kept)
        self.shadow = ShadowAccount(self.dispatcher.placement, self.fleet, self.records, settings)
        self.metrics = Metrics(
            lambda: self.fleet,
            self.fleet.pairs,
            self.tracer.outcomes,
            lambda: self.dispatcher.placement.waiting,
            self.shadow.now,
        )
        self.turns = Turns()  #: of large bodies
        self.token_counts = TokenCounts()
        self.output_lengths = OutputLengths()
        #: Engine id, model and LoRA adapter: under this name this decode worker has the adapter.
        self.same_adapters: set[tuple[str, str, str]] = set()
        self._waiting: dict[str, Waiting] = {}  # by transfer id
        self.incarnation = secrets.token_hex(4)  #: changes with each start of the proxy
        self._count = itertools.count(1)

    def new_id(self) -> str:
        """A name that no other request or transfer has, of this or another proxy."""
        return f"{self.incarnation}-{next(self._count):x}"

    def compared(self, decode: tuple[str, str, str], *, equal: bool) -> None:
        """A decode worker was sent KV that was computed with this adapter; ``equal``: it has used it."""
        if not equal:
            self.same_adapters.discard(decode)
        elif len(self.same_adapters) < _MOST_ADAPTERS:
            self.same_adapters.add(decode)
        else:
            self.same_adapters = {decode}

    # Decode calls that wait for KV

    def wait_for(self, waiting: Waiting) -> None:
        """Raise KVLostError in this call when its KV cannot arrive any more."""
        self._waiting[waiting.attempt.transfer_id] = waiting

    def wait_over(self, waiting: Waiting) -> None:
        self._waiting.pop(waiting.attempt.transfer_id, None)

    def notified(self, notification: Notification) -> None:
        """A worker has told of its steps, or one side of the end of a transfer."""
        if isinstance(notification, StepsReport):
            self.fleet.on_steps(notification.engine, notification.steps)
            return
        if isinstance(notification, OutcomeReport):
            self.records.on_outcome(notification.outcome)
            return
        self.metrics.notified(notification)
        self.records.on_notification(notification)
        if isinstance(notification, TransferDone):
            return
        self.blame(notification.sender, notification.receiver, notification.reason)
        waiting = self._waiting.get(notification.transfer_id)
        if waiting is not None:
            error = KVLostError(f"transfer_{reasons.as_word(notification.reason, 'failed')}")
            asyncio.get_running_loop().call_later(HEARSAY_SECONDS, self._give_up, waiting, error)

    def blame(self, sender: EngineId, receiver: EngineId, reason: str) -> None:
        """Record what a failed transfer means for its two workers, if both incarnations still run."""
        prefill, decode = self.fleet.with_engine(sender), self.fleet.with_engine(receiver)
        if prefill is None or decode is None or not reasons.of_transfer(reason).of_pair:
            return
        decode.suspect()
        if self.fleet.pairs.failed(sender, receiver, reason, "", monotonic()):
            log.warning("%s could not send to %s: %s", prefill.name, decode.name, reason)

    def _give_up(self, waiting: Waiting, error: KVLostError) -> None:
        if self._waiting.get(waiting.attempt.transfer_id) is waiting and not waiting.response.head_complete:
            waiting.response.abandon(error)

    def _appeared(self, worker: Worker) -> None:
        self.warmer.appeared(worker)

    def _changed(self, worker: Worker) -> None:
        self.dispatcher.changed(worker)

    def _told_steps(self, worker: Worker) -> None:
        self.dispatcher.told_steps(worker)

    def _lost(self, worker: Worker) -> None:
        if worker.role is not Role.PREFILL:
            return  # its connections are already closed
        for waiting in list(self._waiting.values()):
            done = isinstance(waiting.attempt.transfer, TransferDone)
            if waiting.prefill is worker and not done and not waiting.response.head_complete:
                waiting.response.abandon(KVLostError("prefill_lost"))
