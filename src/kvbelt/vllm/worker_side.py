"""The half of the connector that lives where the model runs: hands blocks to the belt, and takes them from it.

Threads: the model runner's calls everything that is public; the belt's calls ``_on_*``; a loader's copies received KV
into blocks, so that neither of the others waits for it. ``_lock`` guards the records, and is never held while
anything is copied or waited for.

Nothing here waits, with one exception: blocks that are taken away from a request are given up only once the belt
reads them no more (a matter of microseconds, and rare).
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvbelt.errors import KVBeltError
from kvbelt.transfer.ports import Lost, ReceivedKV, Sending, SlotGoneError, TransferOutcome
from kvbelt.vllm.orders import Claim, Load, News, Orders, Send, Written
from kvbelt.wire.handoff import PrefillHandoff
from kvbelt.wire.ids import TransferId

log = logging.getLogger(__name__)

#: How long blocks that are taken away are waited for. The belt needs a turn of its thread and a copy.
PREEMPT_SECONDS = 2.0


class BeltPort(Protocol):
    """What is needed of ``transfer.belt.Belt``."""

    def send(
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
    ) -> Sending:
        """Begin to send a prompt's KV."""

    def receive(
        self, transfer_id: TransferId, deadline_seconds: float, on_arrival: Callable[[ReceivedKV | Lost], None]
    ) -> Callable[[], None]:
        """Wait for a transfer's KV."""


class Compute(Protocol):
    """The device's own time: its queue of work, and when it has come to a point of it."""

    def mark(self) -> Any:
        """The point that the queue has been filled up to; None where work is done when its call returns."""

    def after(self, mark: Any, call: Callable[[], None]) -> None:
        """Call once the device has passed the mark, from any thread."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prompt that leaves. Known from its first step until vLLM has its blocks back."""

    sending: Sending | None = None
    complete: bool = False  #: every block has been handed over
    finished: bool = False  #: vLLM has done with the request, and waits for its blocks
    blocks_free: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class Incoming:
    """A prompt that comes. Known from its claim until vLLM was told that it is there, or until nobody wants it."""

    cancel: Callable[[], None] = lambda: None
    load: Load | None = None
    arrival: ReceivedKV | Lost | None = None
    dropped: bool = False
    loading: bool = False  #: the loader has it, or has had it


class WorkerSide:
    """All transfers of one worker process."""

    def __init__(self, belt: BeltPort, num_layers: int, compute: Compute) -> None:
        self._belt = belt
        self._num_layers = num_layers
        self._compute = compute
        self._lock = threading.Lock()
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[str, Incoming] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-load")
        # Of this step. Only the model runner's thread touches them.
        self._written: tuple[Written, ...] = ()
        self._saved: set[int] = set()
        # To be reported with the next output.
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._received: dict[str, str] = {}
        self._sent: dict[str, str] = {}

    # The model runner's thread, in the order of a step.

    def begin_step(self, orders: Orders) -> None:
        """Before the forward pass."""
        for request_id in orders.preempted:
            self._give_up(request_id)
        for send in orders.sends:
            self._begin_to_send(send)
        for claim in orders.claims:
            self._claim(claim)
        for load in orders.loads:
            self._load(load)
        for request_id in orders.drops:
            self._drop(request_id)
        self._written = orders.written
        self._saved.clear()

    def layer_written(self, layer: int) -> None:
        """Inside the forward pass: this layer's keys and values have been computed, or queued on the device."""
        if self._written and layer not in self._saved:
            self._saved.add(layer)
            self._hand_over(layer, self._compute.mark())

    def end_step(self) -> None:
        """After the forward pass."""
        written, self._written = self._written, ()
        if not written:
            return
        mark = self._compute.mark()
        if len(self._saved) < self._num_layers:
            # A pass that was replayed as one graph calls no hook in its layers.
            self._written = written
            for layer in range(self._num_layers):
                if layer not in self._saved:
                    self._hand_over(layer, mark)
            self._written = ()
        for prompt in written:
            outgoing = self._outgoing.get(prompt.request_id)
            if prompt.last and outgoing is not None and outgoing.sending is not None:
                outgoing.complete = True
                self._compute.after(mark, outgoing.sending.computed)

    def finished(self, finished_ids: set[str]) -> tuple[set[str], set[str]]:
        """After each step: vLLM has done with these requests. Returns (blocks no longer read, loads ended)."""
        for request_id in finished_ids:
            outgoing = self._outgoing.get(request_id)
            if outgoing is None:
                continue
            outgoing.finished = True
            if not outgoing.complete and outgoing.sending is not None:
                outgoing.sending.cancel("aborted")
        sent = {name for name, one in self._outgoing.items() if one.finished and one.blocks_free.is_set()}
        for request_id in sent:
            del self._outgoing[request_id]
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return sent, loaded

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the loads last returned by ``finished`` that were not filled."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_news(self) -> News:
        """How transfers have ended since the last call."""
        with self._lock:
            news = News(self._received, self._sent)
            if news:
                self._received, self._sent = {}, {}
        return news

    def close(self) -> None:
        """After the belt was closed."""
        self._loader.shutdown(wait=True)

    # Sending.

    def _begin_to_send(self, send: Send) -> None:
        outgoing = Outgoing()
        self._outgoing[send.request_id] = outgoing

        def on_end(outcome: TransferOutcome) -> None:
            self._on_sent(send.request_id, outcome)

        outgoing.sending = self._belt.send(send.handoff, send.num_tokens, outgoing.blocks_free.set, on_end)

    def _hand_over(self, layer: int, mark: Any) -> None:
        for prompt in self._written:
            outgoing = self._outgoing.get(prompt.request_id)
            if outgoing is not None and outgoing.sending is not None:
                outgoing.sending.blocks_written(layer, prompt.first, prompt.block_ids, mark)

    def _give_up(self, request_id: str) -> None:
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is None or outgoing.sending is None:
            return
        outgoing.sending.cancel("preempted")
        if not outgoing.blocks_free.wait(PREEMPT_SECONDS):
            # Cancelled it is in any case: what is still read from its blocks will never be committed.
            log.error("request %s: its blocks were read for %s s after it was preempted", request_id, PREEMPT_SECONDS)

    def _on_sent(self, request_id: str, outcome: TransferOutcome) -> None:
        if not outcome.ok:
            log.warning("the KV of request %s was not sent: %s (%s)", request_id, outcome.reason, outcome.detail)
        with self._lock:
            self._sent[request_id] = "" if outcome.ok else outcome.reason

    # Receiving.

    def _claim(self, claim: Claim) -> None:
        incoming = Incoming()
        self._incoming[claim.request_id] = incoming

        def on_arrival(arrival: ReceivedKV | Lost) -> None:
            self._on_arrival(claim.request_id, incoming, arrival)

        handoff = claim.handoff
        incoming.cancel = self._belt.receive(handoff.transfer_id, handoff.deadline_seconds, on_arrival)

    def _load(self, load: Load) -> None:
        with self._lock:
            incoming = self._incoming[load.request_id]
            incoming.load = load
        self._go_on(load.request_id, incoming)

    def _drop(self, request_id: str) -> None:
        with self._lock:
            incoming = self._incoming.get(request_id)
            if incoming is None:
                return
            incoming.dropped = True
            if incoming.load is None:
                # vLLM waits for nothing; what may still come is released as it comes.
                del self._incoming[request_id]
        incoming.cancel()
        self._go_on(request_id, incoming)

    def _on_arrival(self, request_id: str, incoming: Incoming, arrival: ReceivedKV | Lost) -> None:
        with self._lock:
            incoming.arrival = arrival
        self._go_on(request_id, incoming)

    def _go_on(self, request_id: str, incoming: Incoming) -> None:
        """Hand it to the loader once everything it needs is there."""
        with self._lock:
            arrival, load = incoming.arrival, incoming.load
            if arrival is None or incoming.loading or (load is None and not incoming.dropped):
                return
            incoming.loading = True
        self._loader.submit(self._finish_load, request_id, incoming, arrival, load)

    def _finish_load(self, request_id: str, incoming: Incoming, arrival: ReceivedKV | Lost, load: Load | None) -> None:
        """The loader's thread: fill the blocks, release the slot, report."""
        reason = "dropped"
        try:
            if isinstance(arrival, Lost):
                reason = arrival.reason
                if not incoming.dropped:
                    log.warning("the KV of request %s did not come: %s (%s)", request_id, reason, arrival.detail)
            elif load is not None and not incoming.dropped:
                reason = self._fill(request_id, arrival, load)
        finally:
            if not isinstance(arrival, Lost):
                arrival.release()
            if load is not None:
                with self._lock:
                    del self._incoming[request_id]
                    self._loaded.add(request_id)
                    self._received[request_id] = reason
                    if reason and not incoming.dropped:
                        self._bad_blocks.update(load.block_ids)

    @staticmethod
    def _fill(request_id: str, received: ReceivedKV, load: Load) -> str:
        # One more token than is loaded where this server derives the first token itself.
        if received.num_tokens not in (load.num_tokens, load.num_tokens + 1):
            log.error("request %s: KV of %d tokens for %d", request_id, received.num_tokens, load.num_tokens)
            return "wrong_length"
        try:
            received.scatter(load.block_ids, load.first)
        except SlotGoneError:
            return "slot_gone"
        except (KVBeltError, RuntimeError, ValueError):
            # A device that fails fails vLLM too; this request is not the one to bring it down.
            log.exception("request %s: its KV could not be copied", request_id)
            return "copy_failed"
        return ""
