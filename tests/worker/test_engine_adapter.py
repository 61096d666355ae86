"""The adapters between engine and belt: their calls, and when blocks and slots are released."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvbelt.engine.api import IncomingKVLostError
from kvbelt.transfer.ports import SlotGoneError
from kvbelt.worker.engine_adapter import IncomingTransfer, OutgoingTransfer


@dataclass
class Sent:
    """A ``Sending`` that records its calls."""

    told: list[object] = field(default_factory=list)
    failure: str | None = None

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: object) -> None:
        """Note."""
        self.told.append((layer, first, tuple(block_ids)))

    def computed(self) -> None:
        """Note."""
        self.told.append("computed")

    def cancel(self, reason: str) -> None:
        """Note."""
        self.told.append(reason)


@dataclass
class Held:
    """A ``BlockHold``."""

    block_ids: tuple[int, ...] = (1, 2)
    releases: int = 0

    def release(self) -> None:
        """Count."""
        self.releases += 1


@dataclass
class Received:
    """A ``ReceivedKV``."""

    num_tokens: int = 40
    num_blocks: int = 3
    first_block: int = 1
    gone: bool = False
    scattered: list[tuple[tuple[int, ...], int | None]] = field(default_factory=list)
    releases: int = 0

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Note, or be gone."""
        if self.gone:
            raise SlotGoneError("gone")
        self.scattered.append((tuple(block_ids), first))

    def release(self) -> None:
        """Count."""
        self.releases += 1


class Begun:
    """Begins ``sent``, and keeps the callback for free blocks."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.blocks_free: list[Callable[[], None]] = []

    def __call__(self, on_blocks_free: Callable[[], None]) -> Sent:
        """Begin."""
        self.blocks_free.append(on_blocks_free)
        return self.sent


def test_a_transfer_begins_with_its_first_block() -> None:
    """A slot is reserved once, after the prompt has its own memory."""
    begin = Begun(Sent())
    outgoing = OutgoingTransfer(begin)
    assert (begin.blocks_free, outgoing.failure) == ([], None)
    outgoing.blocks_written(0, 0, [1], None)
    outgoing.blocks_written(1, 0, [1], None)
    assert len(begin.blocks_free) == 1
    assert begin.sent.told == [(0, 0, (1,)), (1, 0, (1,))]
    begin.sent.failure = "peer_lost"
    assert outgoing.failure == "peer_lost"


def test_what_never_began_gives_its_blocks_back() -> None:
    """A request that ends before it ran has no transfer to end."""
    begin, hold = Begun(Sent()), Held()
    OutgoingTransfer(begin).finished(hold, complete=False)
    assert (begin.blocks_free, hold.releases) == ([], 1)


def test_a_transfer_that_cannot_begin_is_refused() -> None:
    """The caller's mistake appears as the transfer's failure."""

    def begin(_: Callable[[], None]) -> Sent:
        raise ValueError("this process has no buffer to send from")

    outgoing, hold = OutgoingTransfer(begin), Held()
    with pytest.raises(ValueError, match="no buffer"):
        outgoing.blocks_written(0, 0, [1], None)
    assert outgoing.failure == "refused"
    outgoing.finished(hold, complete=False)
    assert hold.releases == 1


@pytest.mark.parametrize("free_first", [True, False])
@pytest.mark.parametrize("complete", [True, False])
def test_blocks_are_released_when_they_are_not_read_any_more(free_first: bool, complete: bool) -> None:
    """They are released once, after both the request's end and the belt's last read."""
    begin, hold = Begun(Sent()), Held()
    outgoing = OutgoingTransfer(begin)
    outgoing.blocks_written(0, 0, [1], None)
    if free_first:
        begin.blocks_free[0]()
    outgoing.finished(hold, complete=complete)
    assert begin.sent.told[-1] == ("computed" if complete else "aborted")
    if not free_first:
        assert hold.releases == 0
        begin.blocks_free[0]()
    assert hold.releases == 1


def test_the_last_choice_frees_the_slot() -> None:
    """Several sequences read one slot; it is freed when none of them needs it."""
    received = Received()
    incoming = IncomingTransfer(received, users=2)
    assert (incoming.num_tokens, incoming.first_block) == (40, 1)
    incoming.load([7, 8], 1)
    assert received.scattered == [((7, 8), 1)]
    incoming.release()
    assert received.releases == 0
    incoming.release()
    assert received.releases == 1


def test_a_slot_that_is_gone_is_lost_to_the_engine() -> None:
    """The belt's error becomes the engine's."""
    with pytest.raises(IncomingKVLostError) as lost:
        IncomingTransfer(Received(gone=True), users=1).load([7], 1)
    assert lost.value.reason == "expired_before_load"
