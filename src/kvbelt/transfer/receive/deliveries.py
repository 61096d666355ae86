"""Received KV that was delivered to consumers and not released yet. On the belt's thread, except ``close``."""

from collections.abc import Callable
from functools import partial

from kvbelt.transfer.cut_copies import CutCopies
from kvbelt.transfer.ports import ReceivedKV
from kvbelt.transfer.receive.commands import Break, Deliver, Finish, PartReady
from kvbelt.transfer.receive.handles import ReceivedParts, ReceivedSlot
from kvbelt.transfer.receive.states import FromOwner, PartTaken, Release
from kvbelt.wire.ids import TransferId


class Deliveries:
    """Consumers' handles, and what they are told. ``ask`` calls ``handle`` on the belt's thread with what they do."""

    def __init__(
        self, copies: CutCopies, ask: Callable[..., object], handle: Callable[[TransferId, FromOwner], None]
    ) -> None:
        self._copies = copies
        self._ask = ask
        self._handle = handle
        self._open: dict[TransferId, ReceivedSlot | ReceivedParts] = {}

    def make(self, delivery: Deliver) -> ReceivedKV:
        transfer_id, shape = delivery.transfer_id, delivery.shape
        copy = self._copies.of(shape)
        taken = partial(self._ask, self._handle, transfer_id, PartTaken())
        release = partial(self._ask, self._release, transfer_id)
        made: ReceivedSlot | ReceivedParts
        if shape.in_parts:
            made = ReceivedParts(delivery.slot, delivery.num_tokens, shape, copy, taken, release)
        else:
            made = ReceivedSlot(delivery.slot, delivery.num_tokens, shape, copy, release)
        self._open[transfer_id] = made
        return made

    def notify(self, command: PartReady | Finish | Break) -> None:
        """Pass an event of a prompt in parts to its consumer, which may have gone."""
        kv = self._open.get(command.transfer_id)
        if not isinstance(kv, ReceivedParts):
            return
        match command:
            case PartReady():
                kv.part_ready()
            case Finish():
                kv.finish()
            case Break(reason=reason, detail=detail):
                kv.fail(f"{reason}: {detail}")

    def _release(self, transfer_id: TransferId) -> None:
        if self._open.pop(transfer_id, None) is not None:
            self._handle(transfer_id, Release())

    def close(self) -> None:
        """Release everything. From any thread; waits for running copies."""
        for kv in list(self._open.values()):
            kv.release()
