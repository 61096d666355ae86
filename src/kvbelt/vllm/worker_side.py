"""The half of the connector that lives where the model runs: hands blocks to the belt, and takes them from it.

Threads: the model runner's calls everything that is public; the belt's calls ``on_*``. ``_lock`` guards what is to be
reported of sending; the records of prompts that leave are the model runner's alone.

Nothing here waits, with one exception: blocks that are taken away from a request are given up only once the belt
reads them no more (a matter of microseconds, and rare).
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from kvbelt.transfer.ports import PeerOutcome, ReceivedKV, Sending, TransferOutcome
from kvbelt.vllm.about import Looks
from kvbelt.vllm.held_prefixes import HeldPrefixes
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.loading import Loading, Receiver
from kvbelt.vllm.orders import Claim, Keep, News, Orders, Send, Written
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId

log = logging.getLogger(__name__)

#: How long blocks that are taken away are waited for. The belt needs a turn of its thread and a copy.
PREEMPT_SECONDS = 2.0


class BeltPort(Receiver, Protocol):
    """What is needed of ``transfer.belt.Belt``."""

    def send(
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
        prefix_hashes: Sequence[bytes] = (),
    ) -> Sending:
        """Begin to send a prompt's KV."""

    def warm(self, address: ReceiverAddress, on_end: Callable[[PeerOutcome], None]) -> None:
        """Connect to a receiver."""


class Compute(Protocol):
    """The device's own time: its queue of work, and when it has come to a point of it."""

    def mark(self) -> Any:
        """The point that the queue has been filled up to; None where work is done when its call returns."""

    def after(self, mark: Any, call: Callable[[], None]) -> None:
        """Call once the device has passed the mark, from any thread."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prompt whose blocks are read: they leave over the belt, or are kept in host memory, or both.

    Known from the first step that reads them until vLLM has its blocks back.
    """

    sending: Sending | None = None
    complete: bool = False  #: every block has been handed over
    finished: bool = False  #: vLLM has done with the request, and waits for its blocks
    blocks_free: threading.Event = field(default_factory=threading.Event)  #: the belt reads them no more


class WorkerSide:
    """All transfers of one worker process; for what comes it has ``Loading``, for host memory ``HostWorker``."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        belt: BeltPort,
        num_layers: int,
        compute: Compute,
        host: HostWorker | None = None,
        held: HeldPrefixes | None = None,
        rank: int = 0,
        looks: Looks | None = None,
    ) -> None:
        self._belt = belt
        self._rank = rank
        self._held = held
        self._looks = looks
        self._host = host
        self._num_layers = num_layers
        self._compute = compute
        self._lock = threading.Lock()
        self._outgoing: dict[str, Outgoing] = {}
        self._loading = Loading(belt)
        # Of this step. Only the model runner's thread touches them.
        self._written: tuple[Written, ...] = ()
        self._keeps: tuple[Keep, ...] = ()
        self._saved: set[int] = set()
        # To be reported with the next output.
        self._bad_blocks: set[int] = set()
        self._sent: dict[str, str] = {}
        self._peers: dict[EngineId, str] = {}

    # The model runner's thread, in the order of a step.

    def begin_step(self, orders: Orders) -> None:
        """Before the forward pass."""
        if self._held is not None:
            self._held.update(orders.held, orders.gone)
        for request_id in orders.preempted:
            self._give_up(request_id)
        for send in orders.sends:
            self._begin_to_send(send)
        for claim in orders.claims:
            self._loading.claim(claim)
        for load in orders.loads:
            self._loading.load(load)
        for request_id in orders.drops:
            self._loading.drop(request_id)
        for receiver in orders.warms:
            self._warm(receiver)
        if orders.look and self._looks is not None:
            self._looks.begin()
        if self._host is not None:
            for restore in orders.restores:
                self._host.restore(restore)
        self._written, self._keeps = orders.written, orders.keeps
        self._saved.clear()

    def layer_written(self, layer: int) -> None:
        """Inside the forward pass: this layer's keys and values have been computed, or queued on the device."""
        if self._written and layer not in self._saved:
            self._saved.add(layer)
            self._hand_over(layer, self._compute.mark())

    def end_step(self) -> None:
        """After the forward pass."""
        written, self._written = self._written, ()
        keeps, self._keeps = self._keeps, ()
        if not written and not keeps:
            return
        mark = self._compute.mark()
        if self._host is not None:
            for keep in keeps:
                self._reads_without_sending(keep.request_id)
                self._host.keep(keep, mark)
        if written and len(self._saved) < self._num_layers:
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
        sent = {
            name
            for name, one in self._outgoing.items()
            if one.finished and one.blocks_free.is_set() and not (self._host is not None and self._host.reads(name))
        }
        for request_id in sent:
            del self._outgoing[request_id]
        loaded, bad = self._loading.take_loaded()
        self._bad_blocks |= bad
        if self._host is not None:
            restored, bad = self._host.take_loaded()
            loaded |= restored
            self._bad_blocks |= bad
        return sent, loaded

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the loads last returned by ``finished`` that were not filled."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_news(self) -> News:
        """How transfers have ended since the last call."""
        spoiled = self._host.take_spoiled() if self._host is not None else frozenset[int]()
        seen = self._looks.take() if self._looks is not None else None
        looks = {} if seen is None else {self._rank: seen}
        with self._lock:
            sent, self._sent = self._sent, {}
            peers, self._peers = self._peers, {}
        return News(self._loading.take_received(), sent, spoiled, peers, looks)

    def close(self) -> None:
        """After the belt was closed."""
        self._loading.close()
        if self._looks is not None:
            self._looks.close()
        if self._host is not None:
            self._host.close()

    # The scheduler's side, where it lives in this process and on the model runner's thread.

    def claim(self, claim: Claim) -> None:
        """Wait for the KV of a transfer, before a step says so."""
        self._loading.claim(claim)

    def at_hand(self, request_id: str, seconds: float) -> ReceivedKV | None:
        """What was claimed, if all of it is here; the belt has so long to look."""
        return self._loading.at_hand(request_id, seconds)

    def drop(self, request_id: str) -> None:
        """Nobody wants it any more."""
        self._loading.drop(request_id)

    # Sending.

    def _warm(self, receiver: ReceiverAddress) -> None:
        def on_end(outcome: PeerOutcome) -> None:
            if not outcome.ok:
                log.warning("decode server %s is not connected: %s (%s)", address, outcome.reason, outcome.detail)
            with self._lock:
                self._peers[receiver.engine_id] = "" if outcome.ok else outcome.reason

        address = receiver.of_rank(self._rank)
        if address is None:
            on_end(PeerOutcome(ok=False, reason="refused_tp_size", detail=f"it has no rank {self._rank}"))
        else:
            self._belt.warm(address, on_end)

    def _begin_to_send(self, send: Send) -> None:
        outgoing = Outgoing()
        self._outgoing[send.request_id] = outgoing

        def on_end(outcome: TransferOutcome) -> None:
            self._on_sent(send.request_id, outcome)

        receiver = send.handoff.receiver.of_rank(self._rank)
        if receiver is None:
            # With rank 0 the handshake says so, too; this rank has nobody to shake hands with.
            outgoing.blocks_free.set()
            num_ranks = 1 + len(send.handoff.receiver.ranks)
            detail = f"the receiver has {num_ranks} tensor-parallel ranks, here is rank {self._rank}"
            on_end(TransferOutcome(ok=False, reason="refused_tp_size", detail=detail))
            return
        handoff = msgspec.structs.replace(send.handoff, receiver=receiver)
        outgoing.sending = self._belt.send(
            handoff, send.num_tokens, outgoing.blocks_free.set, on_end, send.prefix_hashes
        )

    def _hand_over(self, layer: int, mark: Any) -> None:
        for prompt in self._written:
            outgoing = self._outgoing.get(prompt.request_id)
            if outgoing is not None and outgoing.sending is not None:
                outgoing.sending.blocks_written(layer, prompt.first, prompt.block_ids, mark)

    def _reads_without_sending(self, request_id: str) -> None:
        if request_id not in self._outgoing:
            outgoing = self._outgoing[request_id] = Outgoing()
            outgoing.blocks_free.set()

    def _give_up(self, request_id: str) -> None:
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is None:
            return
        if outgoing.sending is not None:
            outgoing.sending.cancel("preempted")
        free = outgoing.blocks_free.wait(PREEMPT_SECONDS)
        kept = self._host is None or self._host.give_up(request_id, PREEMPT_SECONDS)
        if not free or not kept:
            # What is still read from its blocks will never be committed, nor be loaded from host memory.
            log.error("request %s: its blocks were read for %s s after it was preempted", request_id, PREEMPT_SECONDS)

    def _on_sent(self, request_id: str, outcome: TransferOutcome) -> None:
        if not outcome.ok:
            log.warning("the KV of request %s was not sent: %s (%s)", request_id, outcome.reason, outcome.detail)
        with self._lock:
            self._sent[request_id] = "" if outcome.ok else outcome.reason
