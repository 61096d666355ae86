"""Received KV on its way into vLLM's blocks.

Threads: the model runner's thread calls everything that is public, the belt's thread calls ``_on_arrival``, and
loaders copy, so that neither of the others waits for a copy. ``_lock`` guards the records; nothing is copied or waited
for while it is held.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from kvbelt.errors import KVBeltError
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Lost, ReceivedKV, SlotGoneError
from kvbelt.vllm.groups import to_fill
from kvbelt.vllm.step_messages import Arrived, Claim, Load, StepCommands
from kvbelt.wire.shards import Ranks, pieces_for, ranks_of, transfer_of

log = logging.getLogger(__name__)

#: Threads that load. One fills blocks as fast as several do. But a prompt larger than the buffer comes in parts, and
#: the thread that loads it waits for each of them.
_LOADERS = 4


@dataclass(slots=True, eq=False)
class Incoming:
    """One prompt whose KV comes, from its claim until the end of its load was reported or it was dropped.

    It comes in ``pieces``: one from each rank of the prefill server that has something that this rank has.
    """

    pieces: int
    cancels: list[Callable[[], None]] = field(default_factory=list)
    load: Load | None = None
    arrivals: list[ReceivedKV | Lost] = field(default_factory=list)  #: that no loader has
    dropped: bool = False
    ended: int = 0  #: pieces that loaders are done with
    filled: set[tuple[int, int]] = field(default_factory=set)  #: heads of layers of which the blocks are filled
    reason: str = ""  #: why the first piece that was not loaded was not
    looked: threading.Event = field(default_factory=threading.Event)  #: the belt has said what was there at the claim

    def cancel(self) -> None:
        for cancel in self.cancels:
            cancel()


class Loading:
    def __init__(self, belt: Belt) -> None:
        self._belt = belt
        self._layout = belt.identity.layout
        self._lock = threading.Lock()
        self._incoming: dict[str, Incoming] = {}
        self._threads = ThreadPoolExecutor(_LOADERS, thread_name_prefix="kvbelt-load")
        # To be reported with the next output.
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._failed: set[str] = set()
        self._received: dict[str, str] = {}

    def obey(self, commands: StepCommands) -> None:
        for claim in commands.claims:
            self._claim(claim)
        for load in commands.loads:
            if load.now:
                self._load_now(load)
            else:
                with self._lock:
                    incoming = self._incoming[load.request_id]
                    incoming.load = load
                self._go_on(load.request_id, incoming)
        for request_id in commands.drops:
            self._drop(request_id)

    def arrived(self, request_id: str, seconds: float) -> Arrived | None:
        """What was claimed, if it has arrived whole. Waits at most so long for the belt's first answer."""
        with self._lock:
            incoming = self._incoming.get(request_id)
        if incoming is None:
            return None
        incoming.looked.wait(seconds)
        with self._lock:
            arrival = incoming.arrivals[0] if incoming.arrivals and incoming.pieces == 1 else None
        if (
            arrival is None
            or isinstance(arrival, Lost)
            or not arrival.whole
            or not self._parts(arrival) >= self._all_parts
        ):
            return None
        return Arrived(arrival.num_tokens, arrival.first_block)

    def take_loaded(self) -> tuple[set[str], set[int], set[str]]:
        """What is new since the last call.

        Returns:
            Requests whose loads have ended, those of their blocks that were not filled, and those of the requests that
            have to be computed from their beginning: with several groups of layers blocks say too little.
        """
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad_blocks = self._bad_blocks, set()
            failed, self._failed = self._failed, set()
        return loaded, bad, failed

    def take_received(self) -> dict[str, str]:
        """Request to reason, of loads that have ended since the last call; an empty reason means success."""
        with self._lock:
            received, self._received = self._received, {}
        return received

    def close(self) -> None:
        """Wait for the loaders. The belt must have been closed."""
        self._threads.shutdown(wait=True)

    @property
    def _all_parts(self) -> set[tuple[int, int]]:
        """Heads of layers that a prompt must have; a drafter's layers need not come."""
        layers = range(self._layout.num_layers - self._layout.draft_layers)
        return set(product(layers, range(self._layout.num_kv_heads)))

    def _parts(self, received: ReceivedKV) -> set[tuple[int, int]]:
        """Heads of layers that a piece has."""
        heads = range(self._layout.num_kv_heads) if received.heads is None else received.heads
        layers = range(self._layout.num_layers) if received.layers is None else received.layers
        return set(product(layers, heads))

    def _claim(self, claim: Claim) -> None:
        handoff, us = claim.handoff, self._belt.identity
        senders: Ranks | None = us.ranks
        if handoff.tp_size is not None:
            senders = ranks_of(handoff.tp_size * len(handoff.stages), handoff.stages)
        pieces = pieces_for(us.rank, senders, us.ranks, us.model_heads, us.layers) if senders is not None else []
        # A prefill server whose heads or layers cannot be dealt to our ranks sends nothing.
        names = [transfer_of(handoff.transfer_id, piece) for piece in pieces] or [handoff.transfer_id]
        self._incoming[claim.request_id] = incoming = Incoming(len(names))
        on_arrival = partial(self._on_arrival, claim.request_id, incoming)
        for name in names:
            cancel = self._belt.receive(name, handoff.deadline_seconds, on_arrival, incoming.looked.set)
            incoming.cancels.append(cancel)

    def _drop(self, request_id: str) -> None:
        """Give up a claim. The end of a load that was commanded is still reported: vLLM waits for its blocks."""
        with self._lock:
            incoming = self._incoming.get(request_id)
            if incoming is None:
                return
            incoming.dropped = True
            if incoming.load is None:
                # vLLM waits for nothing. KV that still arrives is released then.
                del self._incoming[request_id]
        incoming.cancel()
        self._go_on(request_id, incoming)

    def _on_arrival(self, request_id: str, incoming: Incoming, arrival: ReceivedKV | Lost) -> None:
        with self._lock:
            incoming.arrivals.append(arrival)
        self._go_on(request_id, incoming)

    def _go_on(self, request_id: str, incoming: Incoming) -> None:
        """Hand what has arrived to loaders once everything that they need is there.

        Each piece at once: the slot of one must not wait for another piece, which may wait for room.
        """
        with self._lock:
            load = incoming.load
            if load is None and not incoming.dropped:
                return
            arrivals, incoming.arrivals = incoming.arrivals, []
        for arrival in arrivals:
            self._threads.submit(self._load_piece, request_id, incoming, arrival, load)

    def _load_piece(self, request_id: str, incoming: Incoming, arrival: ReceivedKV | Lost, load: Load | None) -> None:
        """Loader's thread: fill the blocks, release the slot; with the last piece, report."""
        reason, parts = "dropped", set[tuple[int, int]]()
        try:
            if isinstance(arrival, Lost):
                reason = arrival.reason
                if not incoming.dropped and not incoming.reason:
                    log.warning("the KV of request %s did not come: %s (%s)", request_id, reason, arrival.detail)
            elif load is not None and not incoming.dropped:
                reason = self._fill(request_id, arrival, load)
                parts = self._parts(arrival)
        finally:
            if not isinstance(arrival, Lost):
                arrival.release()
            with self._lock:
                incoming.ended += 1
                incoming.reason = incoming.reason or reason
                incoming.filled |= parts
                over = incoming.ended == incoming.pieces
                if over and load is not None:
                    del self._incoming[request_id]
                    self._loaded.add(request_id)
                    reason = incoming.reason or ("" if incoming.filled >= self._all_parts else "heads_missing")
                    self._report(load, reason, bad=bool(reason) and not incoming.dropped)
            if reason and not over:
                incoming.cancel()  # without one piece the others are of no use

    def _load_now(self, load: Load) -> None:
        """Model runner's thread: load what has arrived, for the forward pass that follows."""
        with self._lock:
            (arrival,) = self._incoming.pop(load.request_id).arrivals
        assert not isinstance(arrival, Lost)  # ``arrived`` has said so, and KV that has arrived stays
        try:
            reason = self._fill(load.request_id, arrival, load)
        finally:
            arrival.release()
        with self._lock:
            self._report(load, reason, bad=bool(reason))

    def _report(self, load: Load, reason: str, *, bad: bool) -> None:
        self._received[load.request_id] = reason
        if bad and load.others:
            self._failed.add(load.request_id)
        elif bad:
            self._bad_blocks.update(load.block_ids)

    def _fill(self, request_id: str, received: ReceivedKV, load: Load) -> str:
        # One token more than is loaded, where this server derives the first token itself.
        if received.num_tokens not in (load.num_tokens, load.num_tokens + 1):
            log.error("request %s: KV of %d tokens for %d", request_id, received.num_tokens, load.num_tokens)
            return "wrong_length"
        if load.first < received.first_block:
            # This server said that it had these blocks, so they were not sent; they have been evicted since.
            log.warning("request %s: blocks %d to %d are gone", request_id, load.first, received.first_block)
            return "prefix_evicted"
        block_ids = load.block_ids if not load.others else to_fill(load, self._layout, received.num_tokens)
        if block_ids is None:
            return "window_edge"
        try:
            received.scatter(block_ids, load.first)
        except SlotGoneError:
            return "slot_gone"
        except (KVBeltError, RuntimeError, ValueError):
            # A device that fails will fail vLLM as well; the failure of one load need not end the server.
            log.exception("request %s: its KV could not be copied", request_id)
            return "copy_failed"
        return ""
