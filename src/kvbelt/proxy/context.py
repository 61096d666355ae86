"""What the requests of one proxy share: its workers, its turns, its counters, and who waits for whose KV."""

import asyncio
import itertools
import secrets

from kvbelt.http import HttpError, Response
from kvbelt.proxy.metrics import Metrics
from kvbelt.proxy.records import Records
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role
from kvbelt.routing.policy import Policy
from kvbelt.wire.ids import TransferId
from kvbelt.wire.notification import Notification, TransferDone

#: A decode worker normally hears of a failed transfer itself, and recomputes. If it has not answered this long
#: after the prefill worker's word, it did not hear.
HEARSAY_SECONDS = 1.0


class KVLostError(HttpError):
    """The KV that a decode worker waits for will not come. ``reason`` is of low cardinality."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the KV is lost: {reason}")
        self.reason = reason


class Waiting:
    """A decode leg that has not answered yet, and the transfer it waits for."""

    __slots__ = ("prefill", "response", "transfer_id")

    def __init__(self, transfer_id: TransferId, prefill: Worker, response: Response) -> None:
        self.transfer_id = transfer_id
        self.prefill = prefill
        self.response = response


class Context:
    """Shared by every request; touched from the event loop only."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.prefill = [Worker(address, Role.PREFILL, settings, self._lost) for address in settings.prefill]
        self.decode = [Worker(address, Role.DECODE, settings, self._lost) for address in settings.decode]
        self.metrics = Metrics(lambda: (*self.prefill, *self.decode))
        self.records = Records(settings.records_kept)
        self.active: set[str] = set()  #: request ids under way
        self._workers = {(worker.endpoint.role, worker.name): worker for worker in (*self.prefill, *self.decode)}
        self._prefill_policy = Policy()
        self._decode_policy = Policy()
        self._waiting: dict[TransferId, Waiting] = {}
        self._life = secrets.token_hex(6)
        self._count = itertools.count(1)

    def new_id(self) -> str:
        """A name that no request or transfer of this or another proxy has."""
        return f"{self._life}-{next(self._count):x}"

    def pick_prefill(self) -> Worker | None:
        """The prefill worker whose turn it is."""
        chosen = self._prefill_policy.pick([worker.endpoint for worker in self.prefill])
        return None if chosen is None else self._workers[Role.PREFILL, chosen.name]

    def pick_decode(self, exclude: frozenset[str] = frozenset()) -> Worker | None:
        """The decode worker whose turn it is."""
        chosen = self._decode_policy.pick([worker.endpoint for worker in self.decode], exclude=exclude)
        return None if chosen is None else self._workers[Role.DECODE, chosen.name]

    # Who waits for whose KV

    def wait_for(self, waiting: Waiting) -> None:
        """This leg waits for this transfer; it is told if the KV cannot come any more."""
        self._waiting[waiting.transfer_id] = waiting

    def wait_over(self, waiting: Waiting) -> None:
        """The decode worker has answered, or the leg is given up."""
        self._waiting.pop(waiting.transfer_id, None)

    def notified(self, notification: Notification) -> None:
        """A prefill worker says how a transfer ended."""
        self.metrics.notified(notification)
        record = self.records.of_transfer(notification.transfer_id)
        if record is not None:
            record.transfer = notification
        if isinstance(notification, TransferDone):
            return
        waiting = self._waiting.get(notification.transfer_id)
        if waiting is not None:
            error = KVLostError(f"transfer_{notification.reason}")
            asyncio.get_running_loop().call_later(HEARSAY_SECONDS, self._give_up, waiting, error)

    def _give_up(self, waiting: Waiting, error: KVLostError) -> None:
        if self._waiting.get(waiting.transfer_id) is waiting and not waiting.response.head_complete:
            waiting.response.abandon(error)

    def _lost(self, worker: Worker) -> None:
        if worker.endpoint.role is not Role.PREFILL:
            return  # its connections are closed already
        for waiting in list(self._waiting.values()):
            record = self.records.of_transfer(waiting.transfer_id)
            done = record is not None and isinstance(record.transfer, TransferDone)
            if waiting.prefill is worker and not done and not waiting.response.head_complete:
                waiting.response.abandon(KVLostError("prefill_lost"))
