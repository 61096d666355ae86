"""Where the engine's two KV seams meet the belt's two ends.

The engine speaks of blocks and holds, the belt of sendings and received slots; each adapter here is the
one record of one prompt's KV on its way, and knows who must be told when.
"""

import threading
from collections.abc import Sequence
from typing import Any

from kvbelt.engine.api import BlockHold, IncomingKVLostError
from kvbelt.transfer.ports import ReceivedKV, Sending, SlotGoneError


class OutgoingTransfer:
    """A prompt's KV leaving: the engine's ``OutgoingKV``, over a ``Sending``.

    Invariant: the hold is released exactly once, when the request has finished *and* the belt reads its
    blocks no more, whichever comes last. The two come from different threads.
    """

    def __init__(self) -> None:
        self._sending: Sending | None = None
        self._lock = threading.Lock()
        self._hold: BlockHold | None = None
        self._blocks_free = False

    def bind(self, sending: Sending) -> None:
        """Name the transfer. Before the request is submitted."""
        self._sending = sending

    @property
    def sending(self) -> Sending:
        """The transfer."""
        assert self._sending is not None, "bind() comes before submit()"
        return self._sending

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """Engine's thread: these blocks are final."""
        self.sending.blocks_written(layer, first, block_ids, ready)

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """Engine's thread: the request has ended, its blocks are ours until the belt has read them."""
        with self._lock:
            self._hold = hold
            release = self._blocks_free
        if complete:
            self.sending.computed()
        else:
            self.sending.cancel("aborted")
        if release:
            hold.release()

    def on_blocks_free(self) -> None:
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
        self._received = received
        self._users = users
        self._lock = threading.Lock()

    def load(self, block_ids: Sequence[int]) -> None:
        """Engine's thread: copy the slot into these blocks.

        Raises:
            IncomingKVLostError: the slot has expired meanwhile.
        """
        try:
            self._received.scatter(block_ids)
        except SlotGoneError as error:
            raise IncomingKVLostError(str(error)) from error

    def release(self) -> None:
        """One of the sequences needs it no more; the last one frees the slot."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._received.release()
