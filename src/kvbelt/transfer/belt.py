"""The belt's face: what the rest of a worker calls. Every method may be called from any thread."""

import time
from collections.abc import Callable

from kvbelt.transfer.ports import Channel, Lost, PagedCopy, ReceivedKV, Region, Sending, TransferOutcome
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.transfer.snapshot import BeltSnapshot
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import TransferId


class Belt:
    """Carries KV from this process to others and from others to this one.

    A process may send (``send_region`` given), receive (``receive_region`` given), or both. ``copy`` is
    constructed over the same staging memory: gathers go to ``send_region``, scatters come from ``receive_region``.
    Callbacks run on the belt's thread, must return quickly and must not raise.
    """

    def __init__(
        self,
        identity: BeltIdentity,
        settings: BeltSettings,
        channel: Channel,
        copy: PagedCopy | None,
        send_region: Region | None,
        receive_region: Region | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Bind, register memory, start the thread.

        Raises:
            StartError: a port is taken, or the memory could not be registered.
        """

    def close(self) -> None:
        """End every transfer, tell whoever can be told, free everything. Idempotent; returns within a second or so."""

    def receiver_address(self) -> ReceiverAddress | None:
        """What goes into a prefill request's ``kv_transfer_params``; None when this process receives nothing."""

    def send(
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
    ) -> Sending:
        """Begin to send the KV of a prompt of ``num_tokens`` tokens.

        A slot is asked for at once. ``on_blocks_free`` comes exactly once, when no block handed to
        ``blocks_written`` is read any more (also after a failure or a cancel); ``on_end`` exactly once.
        A failure never raises here: it is an outcome.
        """
        raise NotImplementedError

    def receive(
        self,
        transfer_id: TransferId,
        deadline_seconds: float,
        on_arrival: Callable[[ReceivedKV | Lost], None],
    ) -> Callable[[], None]:
        """Wait for a transfer's KV. ``on_arrival`` comes exactly once, also after the returned cancel is called.

        A transfer nobody has spoken of is waited for up to ``lease_seconds``, then it is
        ``Lost("unknown_transfer")``. Whoever gets a ``ReceivedKV`` must release it.
        """
        raise NotImplementedError

    def snapshot(self) -> BeltSnapshot:
        """Counters and gauges."""
        raise NotImplementedError
