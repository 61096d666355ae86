"""The belt: what the rest of a worker calls. Every method may be called from any thread."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from kvbelt.errors import SettingsError
from kvbelt.security.keys import speaks_for
from kvbelt.security.loopback import require_keys_beyond_loopback
from kvbelt.transfer.calls import call_back
from kvbelt.transfer.driver import Driver
from kvbelt.transfer.ports import (
    Buffer,
    Channel,
    Lost,
    PagedCopy,
    PeerOutcome,
    PrefixIndex,
    ReceivedKV,
    TransferOutcome,
)
from kvbelt.transfer.send.driver import SenderDriver, refuse
from kvbelt.transfer.send.handle import Sending
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.about import LinkTotals
from kvbelt.wire.block_hash import packed
from kvbelt.wire.handoff import DecodeOutcome, PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.load import BeltSnapshot
from kvbelt.wire.notification import OutcomeReport, StepsReport
from kvbelt.wire.probe import ProbeResult
from kvbelt.wire.steps import StepsNow


class Belt:
    """Carries KV from this process to others and from others to this one.

    A process may send (``send_buffer`` given), receive (``receive_buffer`` given), or both. ``copy`` is
    constructed over the same staging memory: gathers go to ``send_buffer``, scatters come from
    ``receive_buffer``, or, when that is full, from ``overflow_buffer``. Buffers are taken when the first peer connects.
    ``prefix`` tells what this process's engine holds already, and need not be sent. Callbacks run on the belt's
    thread, must return quickly and must not raise.

    Raises:
        SettingsError: settings contradict each other, or this process would listen beyond loopback without keys.

    The memory of the receive buffer must outlive the process's last peer, or the process: a sender that was
    stopped may write when it wakes up.
    """

    def __init__(  # noqa: PLR0917 -- who, how, with what
        self,
        identity: BeltIdentity,
        settings: BeltSettings,
        channel: Channel,
        copy: PagedCopy | None,
        send_buffer: Buffer | None,
        receive_buffer: Buffer | None,
        overflow_buffer: Buffer | None = None,
        prefix: PrefixIndex | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if copy is None and (send_buffer or receive_buffer):
            raise SettingsError("a belt with a buffer needs something that copies blocks to and from it")
        if overflow_buffer is not None and receive_buffer is None:
            raise SettingsError("an overflow buffer needs a receive buffer that can overflow into it")
        keys = settings.keys
        if keys is not None and not speaks_for(keys.own.public, identity.engine_id):
            raise SettingsError(f"engine id {identity.engine_id} does not go with this process's key (new_engine_id)")
        if receive_buffer is not None:
            require_keys_beyond_loopback(
                settings.bind_host,
                keys=keys is not None,
                insecure=settings.insecure,
                setting="bind_host",
                how="Give keys, or set insecure.",
            )
        self.identity = identity
        self._settings = settings
        self._sends = send_buffer is not None
        self._receives = receive_buffer is not None
        receive_buffers = [buffer for buffer in (receive_buffer, overflow_buffer) if buffer is not None]
        self._driver = Driver(identity, settings, channel, copy, send_buffer, receive_buffers, prefix, clock)

    def start(self) -> None:
        """Bind, open the channel, start the thread.

        Raises:
            StartError: a port is taken, or the channel cannot move such memory.
        """
        self._driver.start()

    def close(self) -> None:
        """End every transfer, tell the peers, free everything. Idempotent; about a second at most."""
        self._driver.close()

    def receiver_address(self) -> ReceiverAddress | None:
        """What goes into a prefill request's ``kv_transfer_params``; None when this process receives nothing."""
        receiver = self._driver.receiver
        if receiver is None:
            return None
        return ReceiverAddress(
            engine_id=self.identity.engine_id,
            host=self._settings.advertised_host,
            init_port=receiver.init_port,
            alloc_port=receiver.alloc_port,
            public_key=self._settings.keys.own.public if self._settings.keys is not None else None,
        )

    def warm(self, address: ReceiverAddress, on_end: Callable[[PeerOutcome], None]) -> None:
        """Connect to a receiver before the first transfer needs it; ``on_end`` is called exactly once.

        Within ``handshake_seconds``. May be repeated: a connected receiver counts as used, and stays connected.
        """
        if not self._sends:
            detail = "this process has no buffer to send from"
            call_back(on_end, PeerOutcome(ok=False, reason="sends_nothing", detail=detail))
        elif not self._driver.ask(self._sender.warm, address, on_end):
            call_back(on_end, PeerOutcome(ok=False, reason="closed", detail="the belt is closed"))

    def probe(self, engine_id: EngineId, on_end: Callable[[ProbeResult], None]) -> None:
        """Measure the link to a connected receiver; ``on_end`` is called exactly once, within some seconds.

        It does not begin while anything is being sent, and ends when anything is to be.
        """
        probes = self._driver.probes
        if probes is None:
            call_back(on_end, ProbeResult(reason="sends_nothing", detail="this process has no buffer to send from"))
        elif not self._driver.ask(probes.begin, engine_id, on_end):
            call_back(on_end, ProbeResult(reason="closed", detail="the belt is closed"))

    def send(
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
        prefix_hashes: Sequence[bytes] = (),
    ) -> Sending:
        """Begin to send the KV of a prompt of ``num_tokens`` tokens.

        ``prefix_hashes`` are those of its full blocks (wire/block_hash.py): what the receiver's engine holds of them
        is not sent. A slot is asked for at once. ``on_blocks_free`` is called exactly once, when no block handed to
        ``blocks_written`` is read any more (also after a failure or a cancel); ``on_end`` exactly once.
        A transfer that cannot be done is an outcome; only a caller's mistake raises.

        Raises:
            ValueError: ``num_tokens`` is not positive, or this process has no buffer to send from.
        """
        if num_tokens < 1:
            raise ValueError(f"a prompt of {num_tokens} tokens")
        if not self._sends:
            raise ValueError("this process has no buffer to send from")
        settings, now = self._settings, self._driver.clock()
        transfer = SenderSession(
            handoff.transfer_id,
            self.identity.engine_id,
            handoff.receiver.engine_id,
            num_tokens,
            self.identity.layout,
            now + handoff.deadline_seconds,
            SendTimes(settings.heartbeat_seconds, settings.lease_seconds, settings.memory_seconds),
            now,
            packed(prefix_hashes),
            on_blocks_free,
            on_end,
        )
        if not self._driver.ask(self._sender.begin, transfer, handoff.receiver):
            refuse(transfer, "closed", "the belt is closed")
        return Sending(transfer, self.identity.layout, settings.batch_bytes, self._driver.ask, self._sender)

    @property
    def _sender(self) -> SenderDriver:
        sender = self._driver.sender
        assert sender is not None  # the belt has a send buffer, and was started
        return sender

    def receive(
        self,
        transfer_id: TransferId,
        deadline_seconds: float,
        on_arrival: Callable[[ReceivedKV | Lost], None],
        on_checked: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        """Wait for a transfer's KV. ``on_arrival`` is called exactly once, also after the returned cancel is called.

        ``on_checked`` is called once the belt's thread has checked: KV that is there already was delivered before.

        A transfer that no sender has spoken of is waited for up to ``lease_seconds``, then it is
        ``Lost("unknown_transfer")``. A ``ReceivedKV`` must be released.

        Raises:
            ValueError: this process has no buffer to receive into.
        """
        if not self._receives:
            raise ValueError("this process has no buffer to receive into")
        deadline = self._driver.clock() + deadline_seconds
        arrived = partial(call_back, on_arrival)
        if not self._driver.ask(self._claim, transfer_id, deadline, arrived, on_checked):
            arrived(Lost("closed", "the belt is closed"))
        return partial(self._cancel_read, transfer_id, arrived)

    def _claim(
        self,
        transfer_id: TransferId,
        deadline: float,
        arrived: Callable[[ReceivedKV | Lost], None],
        on_checked: Callable[[], None] | None,
    ) -> None:
        assert self._driver.receiver is not None
        self._driver.receiver.claim(transfer_id, deadline, arrived)
        if on_checked is not None:
            call_back(on_checked)

    def _cancel_read(self, transfer_id: TransferId, arrived: Callable[[ReceivedKV | Lost], None]) -> None:
        assert self._driver.receiver is not None
        self._driver.ask(self._driver.receiver.cancel_read, transfer_id, arrived)

    def tell(self, steps: StepsNow) -> None:
        """Tell the proxy of the engine's steps, if there is one to tell. What was not heard yet is replaced."""
        if self._settings.notification_endpoint is not None:
            self._driver.ask(self._driver.tell, StepsReport(engine=self.identity.engine_id, steps=steps))

    def tell_outcome(self, outcome: DecodeOutcome) -> None:
        """Tell the proxy what became of a request's KV, if there is one to tell."""
        if self._settings.notification_endpoint is not None:
            report = OutcomeReport(engine=self.identity.engine_id, outcome=outcome)
            self._driver.ask(self._driver.tell_outcome, report)

    def snapshot(self) -> BeltSnapshot:
        """Counters and gauges. Waits a turn of the belt; after ``close`` it is the last state."""
        return self._driver.seen(self._driver.look)

    def links(self) -> list[LinkTotals]:
        """How much has moved to each receiver, and in what time. Waits a turn of the belt."""
        sender = self._driver.sender
        return self._driver.seen(sender.links) if sender is not None else []
