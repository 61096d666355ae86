"""What is in readers' hands: received KV that was delivered and not released.

On the belt's thread, but for ``close``.
"""

from collections.abc import Callable
from functools import partial

from kvbelt.transfer.handles import ReceivedParts, ReceivedSlot
from kvbelt.transfer.ports import PagedCopy, ReceivedKV
from kvbelt.transfer.receiver_commands import Break, Deliver, Finish, PartReady
from kvbelt.wire.ids import TransferId


class Deliveries:
    """Makes what readers get, and tells the readers of prompts in parts what comes.

    ``ask`` has the belt's thread do something; ``taken`` and ``released`` are what readers do, on that thread.
    """

    def __init__(
        self,
        copy: PagedCopy,
        ask: Callable[[Callable[[], None]], object],
        taken: Callable[[TransferId], None],
        released: Callable[[TransferId], None],
    ) -> None:
        self._copy = copy
        self._ask = ask
        self._taken = taken
        self._released = released
        self._open: dict[TransferId, ReceivedSlot | ReceivedParts] = {}

    def make(self, delivery: Deliver) -> ReceivedKV:
        """What a reader gets."""
        transfer_id = delivery.transfer_id

        def taken() -> None:
            self._ask(partial(self._taken, transfer_id))

        def release() -> None:
            self._ask(partial(self._let_go, transfer_id))

        made: ReceivedSlot | ReceivedParts
        if delivery.shape.in_parts:
            made = ReceivedParts(
                delivery.slot,
                delivery.num_tokens,
                delivery.shape,
                self._copy,
                taken,
                release,
            )
        else:
            made = ReceivedSlot(delivery.slot, delivery.num_tokens, delivery.shape, self._copy, release)
        self._open[transfer_id] = made
        return made

    def tell(self, command: PartReady | Finish | Break) -> None:
        """Something has become of a prompt in parts; its reader may have gone meanwhile."""
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

    def _let_go(self, transfer_id: TransferId) -> None:
        if self._open.pop(transfer_id, None) is not None:
            self._released(transfer_id)

    def close(self) -> None:
        """Nobody reads any more. From any thread; waits for copies under way."""
        for kv in list(self._open.values()):
            kv.release()
