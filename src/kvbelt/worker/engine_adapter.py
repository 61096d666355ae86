"""Adapters between the engine and the belt: the engine has blocks and holds, the belt has sendings and received slots.

Each adapter is the record of one prompt's KV on its way.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvbelt.engine.api import BlockHold, IncomingKVLostError
from kvbelt.transfer.ports import ReceivedKV, SlotGoneError
from kvbelt.transfer.send.handle import Sending


class OutgoingTransfer:
    """The KV of a prompt that is sent: the engine's ``OutgoingKV``, over a ``Sending``.

    The transfer begins with the prompt's computation, not before, so that a request which asks a decode worker for room
    has its own blocks already. Otherwise two could wait for each other: one for blocks, the other for room.

    Invariant: the hold is released exactly once, when the request has finished *and* the belt does not read its blocks
    any more. The two events come from different threads, in any order. The belt calls ``begin``'s argument for its own.
    """

    def __init__(self, begin: Callable[[Callable[[], None]], Sending]) -> None:
        self._begin = begin
        self._sending: Sending | None = None
        self._refused = False
        self._lock = threading.Lock()
        self._hold: BlockHold | None = None
        self._blocks_free = False

    @property
    def failure(self) -> str | None:
        """Why the transfer has failed already, if it has."""
        if self._sending is None:
            return "refused" if self._refused else None
        return self._sending.failure

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """Engine's thread: these blocks are final. Raises ValueError: this process does not send."""
        if self._sending is None:
            try:
                self._sending = self._begin(self._on_blocks_free)
            except ValueError:
                self._refused = True
                raise
        self._sending.blocks_written(layer, first, block_ids, ready)

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """Engine's thread: the request has ended, and its blocks are held until the belt has read them."""
        if self._sending is None:  # it never ran, so the belt reads nothing
            hold.release()
            return
        with self._lock:
            self._hold = hold
            release = self._blocks_free
        if complete:
            self._sending.computed()
        else:
            self._sending.cancel("aborted")
        if release:
            hold.release()

    def _on_blocks_free(self) -> None:
        """Belt's thread: it does not read the blocks any more."""
        with self._lock:
            self._blocks_free = True
            hold = self._hold
        if hold is not None:
            hold.release()


class IncomingTransfer:
    """The KV of a prompt that has come: the engine's ``IncomingKV``, over a ``ReceivedKV`` of ``users`` sequences."""

    def __init__(self, received: ReceivedKV, users: int) -> None:
        self.num_tokens = received.num_tokens
        self.first_block = received.first_block
        self._received = received
        self._users = users
        self._lock = threading.Lock()

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """Loader's thread: copy the blocks from ``first`` on. Raises IncomingKVLostError: the slot has expired."""
        try:
            self._received.scatter(block_ids, first)
        except SlotGoneError as error:
            raise IncomingKVLostError(str(error)) from error

    def release(self) -> None:
        """A sequence does not need it any more; the last one frees the slot. May wait for a load under way."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._received.release()
