"""Received KV on its way into vLLM's blocks.

Threads: the model runner's calls everything that is public; the belt's calls ``_on_arrival``; loaders copy, so that
neither of the others waits for it. ``_lock`` guards the records, and is never held while anything is copied or waited
for.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from kvbelt.errors import KVBeltError
from kvbelt.transfer.ports import Lost, ReceivedKV, SlotGoneError
from kvbelt.vllm.orders import Claim, Load
from kvbelt.wire.ids import TransferId

log = logging.getLogger(__name__)

#: Threads that load. One fills blocks as fast as several; but a prompt larger than the buffer comes in parts, and the
#: thread that loads it waits for each of them.
_LOADERS = 4


class Receiver(Protocol):
    """What is needed of ``transfer.belt.Belt``."""

    def receive(
        self,
        transfer_id: TransferId,
        deadline_seconds: float,
        on_arrival: Callable[[ReceivedKV | Lost], None],
        on_look: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        """Wait for a transfer's KV."""


@dataclass(slots=True, eq=False)
class Incoming:
    """A prompt that comes. Known from its claim until vLLM was told that it is there, or until nobody wants it."""

    cancel: Callable[[], None] = lambda: None
    load: Load | None = None
    arrival: ReceivedKV | Lost | None = None
    dropped: bool = False
    loading: bool = False  #: the loader has it, or has had it
    looked: threading.Event = field(default_factory=threading.Event)  #: what was there when it was claimed is known


class Loading:
    """Every prompt that comes to one worker process."""

    def __init__(self, belt: Receiver) -> None:
        self._belt = belt
        self._lock = threading.Lock()
        self._incoming: dict[str, Incoming] = {}
        self._threads = ThreadPoolExecutor(_LOADERS, thread_name_prefix="kvbelt-load")
        # To be reported with the next output.
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._received: dict[str, str] = {}

    def claim(self, claim: Claim) -> None:
        """Wait for the KV of a transfer."""
        incoming = Incoming()
        self._incoming[claim.request_id] = incoming

        def on_arrival(arrival: ReceivedKV | Lost) -> None:
            self._on_arrival(claim.request_id, incoming, arrival)

        handoff = claim.handoff
        incoming.cancel = self._belt.receive(
            handoff.transfer_id, handoff.deadline_seconds, on_arrival, incoming.looked.set
        )

    def at_hand(self, request_id: str, seconds: float) -> ReceivedKV | None:
        """What was claimed, if all of it is here; the belt has so long to look. It stays here until it is loaded."""
        with self._lock:
            incoming = self._incoming.get(request_id)
        if incoming is None:
            return None
        incoming.looked.wait(seconds)
        with self._lock:
            arrival = incoming.arrival
        return None if arrival is None or isinstance(arrival, Lost) or not arrival.whole else arrival

    def load(self, load: Load) -> None:
        """Put what has been claimed into these blocks, once it is there."""
        if load.now:
            self._load_now(load)
            return
        with self._lock:
            incoming = self._incoming[load.request_id]
            incoming.load = load
        self._go_on(load.request_id, incoming)

    def drop(self, request_id: str) -> None:
        """Nobody wants it any more. A load that was ordered is still reported: vLLM waits for its blocks."""
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

    def take_loaded(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and those of their blocks that were not filled."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad_blocks = self._bad_blocks, set()
        return loaded, bad

    def take_received(self) -> dict[str, str]:
        """How loads have ended since the last call, request by request; empty means well."""
        with self._lock:
            received, self._received = self._received, {}
        return received

    def close(self) -> None:
        """After the belt was closed."""
        self._threads.shutdown(wait=True)

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
        self._threads.submit(self._finish_load, request_id, incoming, arrival, load)

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

    def _load_now(self, load: Load) -> None:
        """On the model runner's thread: what is at hand, for the forward pass that follows."""
        with self._lock:
            incoming = self._incoming.pop(load.request_id)
            arrival = incoming.arrival
        assert arrival is not None
        assert not isinstance(arrival, Lost)  # at_hand has said so, and what has arrived stays
        try:
            reason = self._fill(load.request_id, arrival, load)
        finally:
            arrival.release()
        with self._lock:
            self._received[load.request_id] = reason
            if reason:
                self._bad_blocks.update(load.block_ids)

    @staticmethod
    def _fill(request_id: str, received: ReceivedKV, load: Load) -> str:
        # One more token than is loaded where this server derives the first token itself.
        if received.num_tokens not in (load.num_tokens, load.num_tokens + 1):
            log.error("request %s: KV of %d tokens for %d", request_id, received.num_tokens, load.num_tokens)
            return "wrong_length"
        if load.first < received.first_block:
            # What this server said it had, and the prefill server has left out, has been evicted since.
            log.warning("request %s: blocks %d to %d are gone", request_id, load.first, received.first_block)
            return "prefix_evicted"
        try:
            received.scatter(load.block_ids, load.first)
        except SlotGoneError:
            return "slot_gone"
        except (KVBeltError, RuntimeError, ValueError):
            # A device that fails fails vLLM too; this request is not the one to bring it down.
            log.exception("request %s: its KV could not be copied", request_id)
            return "copy_failed"
        return ""
