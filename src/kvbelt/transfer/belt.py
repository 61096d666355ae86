"""The belt: what the rest of a worker calls. Every method may be called from any thread."""

import logging
import time
from collections.abc import Callable, Sequence

from kvbelt.errors import SettingsError
from kvbelt.security.keys import speaks_for
from kvbelt.security.loopback import require_keys_beyond_loopback
from kvbelt.transfer.dispatch import Dispatch, Outgoing
from kvbelt.transfer.driver import Driver
from kvbelt.transfer.handles import SendingHandle
from kvbelt.transfer.peers import Peer
from kvbelt.transfer.ports import (
    Channel,
    Lost,
    PagedCopy,
    PeerOutcome,
    PrefixIndex,
    ReceivedKV,
    Region,
    Sending,
    TransferOutcome,
)
from kvbelt.transfer.pump import Load
from kvbelt.transfer.sender import SenderSession, SendPlan
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.transfer.snapshot import BeltSnapshot
from kvbelt.wire.about import Link
from kvbelt.wire.block_hash import packed
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.probe import Probed

log = logging.getLogger(__name__)


class Belt:
    """Carries KV from this process to others and from others to this one.

    A process may send (``send_region`` given), receive (``receive_region`` given), or both. ``copy`` is
    constructed over the same staging memory: gathers go to ``send_region``, scatters come from
    ``receive_region``, or, when that is full, from ``overflow_region``. ``prefix`` tells what this process's engine
    holds already, and need not be sent. Callbacks run on the belt's thread, must return quickly and must not raise.

    Raises:
        SettingsError: settings contradict each other, or this process would listen beyond loopback without keys.

    The memory of the receive region must outlive the process's last peer, or the process: a writer that was
    stopped may write when it wakes up.
    """

    def __init__(  # noqa: PLR0917 -- who, how, with what
        self,
        identity: BeltIdentity,
        settings: BeltSettings,
        channel: Channel,
        copy: PagedCopy | None,
        send_region: Region | None,
        receive_region: Region | None,
        overflow_region: Region | None = None,
        prefix: PrefixIndex | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if copy is None and (send_region or receive_region):
            raise SettingsError("a belt with a buffer needs something that copies blocks to and from it")
        if overflow_region is not None and receive_region is None:
            raise SettingsError("an overflow buffer needs a receive buffer that can overflow into it")
        keys = settings.keys
        if keys is not None and not speaks_for(keys.own.public, identity.engine_id):
            raise SettingsError(f"engine id {identity.engine_id} does not go with this process's key (new_engine_id)")
        if receive_region is not None:
            require_keys_beyond_loopback(
                settings.bind_host,
                keys=keys is not None,
                insecure=settings.insecure,
                setting="bind_host",
                how="Give keys, or set insecure.",
            )
        self.identity = identity
        self._settings = settings
        self._sends = send_region is not None
        self._receives = receive_region is not None
        receive_regions = [region for region in (receive_region, overflow_region) if region is not None]
        self._driver = Driver(identity, settings, channel, copy, send_region, receive_regions, prefix, clock)

    def start(self) -> None:
        """Bind, register memory, start the thread.

        Raises:
            StartError: a port is taken, or the memory could not be registered.
        """
        self._driver.start()

    def close(self) -> None:
        """End every transfer, tell whoever can be told, free everything. Idempotent; about a second at most."""
        self._driver.close()

    def receiver_address(self) -> ReceiverAddress | None:
        """What goes into a prefill request's ``kv_transfer_params``; None when this process receives nothing."""
        reception = self._driver.reception
        if reception is None:
            return None
        return ReceiverAddress(
            engine_id=self.identity.engine_id,
            host=self._settings.advertised_host,
            init_port=reception.init_port,
            alloc_port=reception.alloc_port,
            public_key=self._settings.keys.own.public if self._settings.keys is not None else None,
        )

    def warm(self, address: ReceiverAddress, on_end: Callable[[PeerOutcome], None]) -> None:
        """Connect to a receiver before the first transfer needs it; ``on_end`` comes exactly once.

        Within ``handshake_seconds``. May be repeated: a connected receiver counts as used, and stays connected.
        """

        def end(outcome: PeerOutcome) -> None:
            _call(on_end, outcome)

        def refuse(reason: str, detail: str) -> None:
            end(PeerOutcome(ok=False, reason=reason, detail=detail))

        def begin() -> None:
            dispatch = self._driver.dispatch
            assert dispatch is not None
            problem = dispatch.peers.distrust(address)
            if problem is not None:
                refuse(*problem)
            else:
                dispatch.warm(address, end)

        if not self._sends:
            refuse("sends_nothing", "this process has no buffer to send from")
        elif not self._driver.ask(begin):
            refuse("closed", "the belt is closed")

    def probe(self, engine_id: EngineId, on_end: Callable[[Probed], None]) -> None:
        """Measure the link to a receiver that is connected; ``on_end`` comes exactly once, within some seconds.

        It is not done while anything is being sent, and ends when something is to be.
        """

        def end(probed: Probed) -> None:
            _call(on_end, probed)

        def begin() -> None:
            assert self._driver.dispatch is not None
            self._driver.dispatch.probe(engine_id, end)

        if not self._sends:
            end(Probed(reason="sends_nothing", detail="this process has no buffer to send from"))
        elif not self._driver.ask(begin):
            end(Probed(reason="closed", detail="the belt is closed"))

    def send(  # noqa: C901 -- the closures that cross to the belt's thread
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
        prefix_hashes: Sequence[bytes] = (),
    ) -> Sending:
        """Begin to send the KV of a prompt of ``num_tokens`` tokens.

        ``prefix_hashes`` are those of its full blocks (wire/block_hash.py): what the receiver's engine holds of them
        is not sent. A slot is asked for at once. ``on_blocks_free`` comes exactly once, when no block handed to
        ``blocks_written`` is read any more (also after a failure or a cancel); ``on_end`` exactly once.
        A transfer that cannot be done is an outcome; only a caller's mistake raises.

        Raises:
            ValueError: ``num_tokens`` is not positive, or this process has no buffer to send from.
        """
        layout = self.identity.layout
        if num_tokens < 1:
            raise ValueError(f"a prompt of {num_tokens} tokens")
        if not self._sends:
            raise ValueError("this process has no buffer to send from")
        num_blocks = layout.blocks(num_tokens)
        now = self._driver.now()
        plan = SendPlan(
            transfer_id=handoff.transfer_id,
            sender=self.identity.engine_id,
            receiver=handoff.receiver.engine_id,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            num_bytes=layout.slot_bytes(num_blocks),
            deadline=now + handoff.deadline_seconds,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            lease_seconds=self._settings.lease_seconds,
            memory_seconds=self._settings.memory_seconds,
            prefix=packed(prefix_hashes),
        )
        transfer: list[Outgoing] = []  # filled by the first call; the calls after it find it

        def on_dispatch(do: Callable[[Dispatch, Outgoing], None]) -> None:
            def call() -> None:
                if transfer and self._driver.dispatch is not None:
                    do(self._driver.dispatch, transfer[0])

            self._driver.ask(call)

        def computed() -> None:
            at = self._driver.now()
            on_dispatch(lambda dispatch, outgoing: dispatch.computed(outgoing, at))

        handle = SendingHandle(
            layout,
            num_blocks,
            self._settings.batch_bytes,
            hand_over=lambda runs: on_dispatch(lambda dispatch, outgoing: dispatch.hand_over(outgoing, runs)),
            computed=computed,
            abandon=lambda reason: on_dispatch(lambda dispatch, outgoing: dispatch.abandon(outgoing, reason)),
        )

        def blocks_free() -> None:
            _call(on_blocks_free)

        def end(outcome: TransferOutcome) -> None:
            _call(on_end, outcome)

        def refuse(reason: str, detail: str) -> None:
            handle.failed(reason)
            blocks_free()
            end(TransferOutcome(ok=False, reason=reason, detail=detail))

        def outgoing(peer: Peer) -> Outgoing:
            load = Load(plan.transfer_id, num_blocks * layout.num_layers)
            return Outgoing(SenderSession(plan, now), load, peer, blocks_free, end, handle.failed)

        def begin() -> None:
            dispatch = self._driver.dispatch
            assert dispatch is not None
            problem = dispatch.peers.distrust(handoff.receiver)
            if problem is not None:
                refuse(*problem)
            elif dispatch.knows(plan.transfer_id):
                refuse("duplicate_transfer", f"transfer {plan.transfer_id} is already under way")
            else:
                transfer.append(dispatch.begin(handoff.receiver, outgoing))

        if not self._driver.ask(begin):
            refuse("closed", "the belt is closed")
        return handle

    def receive(
        self,
        transfer_id: TransferId,
        deadline_seconds: float,
        on_arrival: Callable[[ReceivedKV | Lost], None],
        on_look: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        """Wait for a transfer's KV. ``on_arrival`` comes exactly once, also after the returned cancel is called.

        ``on_look`` comes once the belt's thread has looked: what is there already has arrived by then.

        A transfer nobody has spoken of is waited for up to ``lease_seconds``, then it is
        ``Lost("unknown_transfer")``. Whoever gets a ``ReceivedKV`` must release it.

        Raises:
            ValueError: this process has no buffer to receive into.
        """
        if not self._receives:
            raise ValueError("this process has no buffer to receive into")
        deadline = self._driver.now() + deadline_seconds

        def arrived(arrival: ReceivedKV | Lost) -> None:
            _call(on_arrival, arrival)

        def claim() -> None:
            assert self._driver.reception is not None
            self._driver.reception.claim(transfer_id, deadline, arrived)
            if on_look is not None:
                _call(on_look)

        def unclaim() -> None:
            assert self._driver.reception is not None
            self._driver.reception.unclaim(transfer_id, arrived)

        def cancel() -> None:
            self._driver.ask(unclaim)

        if not self._driver.ask(claim):
            arrived(Lost("closed", "the belt is closed"))
        return cancel

    def snapshot(self) -> BeltSnapshot:
        """Counters and gauges. Waits a turn of the belt; after ``close`` it is the last state."""
        return self._driver.snapshot()

    def links(self) -> list[Link]:
        """How much has moved to each receiver, and in what time. Waits a turn of the belt."""
        return self._driver.links()


def _call(callback: Callable[..., None], *arguments: object) -> None:
    """Call somebody else's code on the belt's thread: their mistake must not end everybody's transfers."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of the belt has failed")
