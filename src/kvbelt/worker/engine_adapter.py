"""Where the engine's two KV seams meet the belt's two ends.

The engine speaks of blocks and holds, the belt of sendings and received slots; each adapter here is the
one record of one prompt's KV on its way, and knows who must be told when.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvbelt.engine.api import BlockHold, IncomingKVLostError
from kvbelt.transfer.ports import ReceivedKV, Sending, SlotGoneError


class OutgoingTransfer:
    """A prompt's KV leaving: the engine's ``OutgoingKV``, over a ``Sending``.

    The transfer begins with the prompt's computation, not before: whoever asks a decode worker for room has its own
    blocks already. So nobody has room there while it waits for blocks that wait for room.

    Invariant: the hold is released exactly once, when the request has finished *and* the belt reads its
    blocks no more, whichever comes last. The two come from different threads.

    Args:
        begin: begins the transfer; its argument is to be called once the belt reads the blocks no more.
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
        """The reason, if the transfer has already failed."""
        if self._sending is None:
            return "refused" if self._refused else None
        return self._sending.failure

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """Engine's thread: these blocks are final.

        Raises:
            ValueError: the transfer cannot begin, for this process does not send.
        """
        if self._sending is None:
            try:
                self._sending = self._begin(self._on_blocks_free)
            except ValueError:
                self._refused = True
                raise
        self._sending.blocks_written(layer, first, block_ids, ready)

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """Engine's thread: the request has ended, its blocks are ours until the belt has read them."""
        if self._sending is None:  # it never ran: nobody has heard of it, and nobody reads anything
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
        """Belt's thread: it reads the blocks no more."""
        with self._lock:
            self._blocks_free = True
            hold = self._hold
        if hold is not None:
            hold.release()


class IncomingTransfer:
    """A prompt's KV arrived: the engine's ``IncomingKV``, over a ``ReceivedKV`` that ``users`` sequences share."""

    def __init__(self, received: ReceivedKV, users: int) -> None:
        self.num_tokens = received.num_tokens
        self.first_block = received.first_block
        self._received = received
        self._users = users
        self._lock = threading.Lock()

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """A loader's thread: copy the prompt's blocks from ``first`` on into these.

        Raises:
            IncomingKVLostError: the slot has expired meanwhile.
        """
        try:
            self._received.scatter(block_ids, first)
        except SlotGoneError as error:
            raise IncomingKVLostError(str(error)) from error

    def release(self) -> None:
        """One of the sequences needs it no more; the last one frees the slot. May wait for a load under way."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._received.release()
