"""The belt: one thread that owns the sockets, the channel and the time of all transfers of a process.

Rules:

1. Sessions and buffers belong to the belt's thread. Other threads put calls into a queue and go on.
2. The thread sleeps until a frame, a call or the next deadline. It looks more often only while copies or
   writes are under way, or while a peer may be writing here.
3. Nothing on it waits for a peer.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from kvbelt.errors import SettingsError, StartError
from kvbelt.transfer.calls import Calls
from kvbelt.transfer.desk import Desk, DeskTimes
from kvbelt.transfer.dispatch import Dispatch, Outgoing
from kvbelt.transfer.fencing import this_process
from kvbelt.transfer.handles import ReceivedSlot, SendingHandle
from kvbelt.transfer.patience import PatientClock
from kvbelt.transfer.peers import Peer
from kvbelt.transfer.ports import Channel, Lost, PagedCopy, ReceivedKV, Region, Sending, TransferOutcome
from kvbelt.transfer.pump import Load, Pump
from kvbelt.transfer.receiver import Deliver
from kvbelt.transfer.receiver_states import ReceiverState
from kvbelt.transfer.reception import Reception
from kvbelt.transfer.sender import SenderSession, SendPlan
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.transfer.snapshot import BeltSnapshot, Sum
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.handshake import Hello, MemoryRegion, Welcome
from kvbelt.wire.ids import EngineId, TransferId

log = logging.getLogger(__name__)

#: How long ``close`` waits for peers to say that they have stopped writing here, and for the thread.
CLOSE_SECONDS = 1.0

#: Bytes of a piece where the settings leave it to the device: on CPU what stays in a core's cache between
#: gather and write, on a GPU enough that posting (some 10 us a write) does not matter.
PIECE_BYTES = {"cpu": 1 << 19, "cuda": 64 << 20}

#: zmq's poller counts in milliseconds; shorter sleeps are slept.
_POLL_RESOLUTION = 1e-3


class Belt:
    """Carries KV from this process to others and from others to this one.

    A process may send (``send_region`` given), receive (``receive_region`` given), or both. ``copy`` is
    constructed over the same staging memory: gathers go to ``send_region``, scatters come from
    ``receive_region``. Callbacks run on the belt's thread, must return quickly and must not raise.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if copy is None and (send_region or receive_region):
            raise SettingsError("a belt with a buffer needs something that copies blocks to and from it")
        self.identity = identity
        self._settings = settings
        self._channel = channel
        self._copy = copy
        self._send_region = send_region
        self._receive_region = receive_region
        self._clock = PatientClock(clock)
        self._compatibility = identity.compatibility(channel.name)
        self._here = this_process()
        self._calls = Calls()
        self._thread = threading.Thread(target=self._main, name="kvbelt-belt", daemon=True)
        self._started = threading.Event()
        self._start_error: Exception | None = None
        self._closing = False
        # Closing and asking for something must not cross: after the flag is set nothing is added.
        self._gate = threading.Lock()
        self._closed = False
        self._ignored: Counter[str] = Counter()
        self._dispatch: Dispatch | None = None
        self._reception: Reception | None = None
        self._pump: Pump | None = None
        self._delivered: dict[TransferId, ReceivedSlot] = {}

    # The face.

    def start(self) -> None:
        """Bind, register memory, start the thread.

        Raises:
            StartError: a port is taken, or the memory could not be registered.
        """
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error

    def close(self) -> None:
        """End every transfer, tell whoever can be told, free everything. Idempotent; about a second at most."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        for slot in list(self._delivered.values()):
            slot.release()
        if self._thread.is_alive():
            self._calls.add(self._begin_closing)
            self._thread.join()
        self._calls.close()

    def receiver_address(self) -> ReceiverAddress | None:
        """What goes into a prefill request's ``kv_transfer_params``; None when this process receives nothing."""
        if self._reception is None:
            return None
        return ReceiverAddress(
            engine_id=self.identity.engine_id,
            host=self._settings.advertised_host,
            init_port=self._reception.init_port,
            alloc_port=self._reception.alloc_port,
        )

    def send(  # noqa: C901 -- the closures that cross to the belt's thread
        self,
        handoff: PrefillHandoff,
        num_tokens: int,
        on_blocks_free: Callable[[], None],
        on_end: Callable[[TransferOutcome], None],
    ) -> Sending:
        """Begin to send the KV of a prompt of ``num_tokens`` tokens.

        A slot is asked for at once. ``on_blocks_free`` comes exactly once, when no block handed to
        ``blocks_written`` is read any more (also after a failure or a cancel); ``on_end`` exactly once.
        A transfer that cannot be done is an outcome; only a caller's mistake raises.

        Raises:
            ValueError: ``num_tokens`` is not positive, or this process has no buffer to send from.
        """
        layout = self.identity.layout
        if num_tokens < 1:
            raise ValueError(f"a prompt of {num_tokens} tokens")
        if self._send_region is None:
            raise ValueError("this process has no buffer to send from")
        num_blocks = layout.blocks(num_tokens)
        now = self._clock()
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
        )
        transfer: list[Outgoing] = []  # filled by the first call; the calls after it find it

        def on_dispatch(do: Callable[[Dispatch, Outgoing], None]) -> None:
            def call() -> None:
                if transfer and self._dispatch is not None:
                    do(self._dispatch, transfer[0])

            self._ask(call)

        def computed() -> None:
            at = self._clock()
            on_dispatch(lambda dispatch, outgoing: dispatch.computed(outgoing, at))

        handle = SendingHandle(
            layout,
            num_blocks,
            hand_over=lambda run: on_dispatch(lambda dispatch, outgoing: dispatch.hand_over(outgoing, run)),
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
            load = Load(plan.transfer_id, num_blocks, num_blocks * layout.num_layers)
            return Outgoing(SenderSession(plan, now), load, peer, blocks_free, end, handle.failed)

        def begin() -> None:
            assert self._dispatch is not None
            if self._dispatch.knows(plan.transfer_id):
                refuse("duplicate_transfer", f"transfer {plan.transfer_id} is already under way")
            else:
                transfer.append(self._dispatch.begin(handoff.receiver, outgoing))

        if not self._ask(begin):
            refuse("closed", "the belt is closed")
        return handle

    def receive(
        self,
        transfer_id: TransferId,
        deadline_seconds: float,
        on_arrival: Callable[[ReceivedKV | Lost], None],
    ) -> Callable[[], None]:
        """Wait for a transfer's KV. ``on_arrival`` comes exactly once, also after the returned cancel is called.

        A transfer nobody has spoken of is waited for up to ``lease_seconds``, then it is
        ``Lost("unknown_transfer")``. Whoever gets a ``ReceivedKV`` must release it.

        Raises:
            ValueError: this process has no buffer to receive into.
        """
        if self._receive_region is None:
            raise ValueError("this process has no buffer to receive into")
        deadline = self._clock() + deadline_seconds

        def arrived(arrival: ReceivedKV | Lost) -> None:
            _call(on_arrival, arrival)

        def claim() -> None:
            assert self._reception is not None
            self._reception.claim(transfer_id, deadline, arrived)

        def unclaim() -> None:
            assert self._reception is not None
            self._reception.unclaim(transfer_id, arrived)

        def cancel() -> None:
            self._ask(unclaim)

        if not self._ask(claim):
            arrived(Lost("closed", "the belt is closed"))
        return cancel

    def snapshot(self) -> BeltSnapshot:
        """Counters and gauges. Waits a turn of the belt; after ``close`` it is the last state."""
        taken: list[BeltSnapshot] = []
        ready = threading.Event()

        def take() -> None:
            taken.append(self._snapshot())
            ready.set()

        if threading.current_thread() is self._thread or not self._ask(take):
            return self._snapshot()
        while not ready.wait(timeout=0.1):
            if not self._thread.is_alive():
                return self._snapshot()
        return taken[0]

    def _ask(self, call: Callable[[], None]) -> bool:
        """Have the belt's thread do something; False: the belt is closed or was never started."""
        with self._gate:
            if self._closed or not self._thread.is_alive():
                return False
            self._calls.add(call)
            return True

    # The thread.

    def _main(self) -> None:
        sockets = Sockets()
        try:
            self._set_up(sockets)
        except Exception as error:  # noqa: BLE001 -- raised again where start() was called
            self._start_error = error if isinstance(error, StartError | SettingsError) else StartError(str(error))
            self._tear_down(sockets)
            self._started.set()
            return
        self._started.set()
        try:
            while not self._closing:
                self._turn(sockets, self._sleep_seconds())
            self._last_turns(sockets)
        except Exception:
            log.exception("the belt has failed; every transfer of this process is lost")
            self._fail_all()
        finally:
            self._tear_down(sockets)

    def _fail_all(self) -> None:
        """A mistake of ours has stopped the thread: nobody may wait for it."""
        with self._gate:
            self._closed = True
        try:
            self._calls.run()
            if self._dispatch is not None:
                self._dispatch.abandon_all("belt_failed")
            if self._reception is not None:
                self._reception.close("belt_failed")
        except Exception:
            log.exception("not everybody could be told")

    def _set_up(self, sockets: Sockets) -> None:
        settings, identity = self._settings, self.identity
        sockets.watch(self._calls.fileno)
        for region in (self._send_region, self._receive_region):
            if region is not None:
                self._channel.register(region)
        if self._receive_region is not None:
            self._reception = self._make_reception(sockets, self._receive_region)
        if self._send_region is not None:
            assert self._copy is not None
            piece_bytes = settings.piece_bytes or PIECE_BYTES[self._send_region.device]
            self._pump = Pump(self._channel, self._copy, self._send_region, identity.layout, piece_bytes)
            self._dispatch = Dispatch(self._hello, settings, sockets, self._channel, self._pump, self._clock)

    def _make_reception(self, sockets: Sockets, region: Region) -> Reception:
        settings = self._settings
        times = DeskTimes(settings.lease_seconds, settings.heartbeat_seconds, settings.memory_seconds)
        desk = Desk(self.identity.engine_id, self.identity.layout, region.num_bytes, times)
        welcome = Welcome(
            engine_id=self.identity.engine_id,
            compatibility=self._compatibility,
            agent_metadata=self._channel.local_metadata(),
            region=MemoryRegion(region.address, region.num_bytes, region.device, region.device_index),
        )
        return Reception(welcome, self._here, settings, sockets, desk, self._received, self._clock)

    def _hello(self, receiver: EngineId) -> Hello:
        return Hello(
            engine_id=self.identity.engine_id,
            receiver=receiver,
            worker=self.identity.worker,
            role=self.identity.role,
            process=self._here,
            compatibility=self._compatibility,
        )

    def _received(self, delivery: Deliver) -> ReceivedSlot:
        assert self._copy is not None
        transfer_id = delivery.transfer_id

        def released() -> None:
            assert self._reception is not None
            self._delivered.pop(transfer_id, None)
            self._reception.release(transfer_id)

        def release() -> None:
            self._ask(released)

        slot = ReceivedSlot(
            delivery.slot,
            delivery.num_tokens,
            delivery.num_blocks,
            self.identity.layout,
            self._copy,
            release=release,
        )
        self._delivered[transfer_id] = slot
        return slot

    def _turn(self, sockets: Sockets, seconds: float) -> None:
        """Sleep at most so long, then do everything there is to do."""
        if not self._calls.fall_asleep():
            seconds = 0.0
        woke = self._clock.asleep(seconds)
        if seconds >= _POLL_RESOLUTION:
            # Rounded up: waking before a deadline would only mean to sleep again.
            ready = sockets.wait(-1 if seconds == float("inf") else int(seconds * 1000) + 1)
        else:
            ready = sockets.wait(0)
            if not ready and seconds > 0.0:
                time.sleep(seconds)
        woke()
        self._calls.wake()
        self._calls.run()
        now = self._clock()
        if self._reception is not None:
            if self._reception.progress_every != float("inf"):
                self._channel.progress()
            self._reception.hear(ready, self._ignored)
            self._reception.tick(now)
        if self._dispatch is not None:
            self._dispatch.hear(ready, self._ignored)
            self._dispatch.tick(now)
            self._more = self._dispatch.step()

    _more = False

    def _sleep_seconds(self) -> float:
        if self._more:
            return 0.0
        seconds = float("inf")
        now = self._clock()
        if self._dispatch is not None:
            seconds = min(seconds, self._dispatch.due - now)
            if self._dispatch.busy:
                seconds = min(seconds, self._settings.poll_seconds)
        if self._reception is not None:
            seconds = min(seconds, self._reception.due - now, self._reception.progress_every)
        return max(seconds, 0.0)

    def _begin_closing(self) -> None:
        self._closing = True

    def _last_turns(self, sockets: Sockets) -> None:
        """Tell everybody, and give writers a moment to acknowledge."""
        if self._dispatch is not None:
            self._dispatch.abandon_all("closed")
        if self._reception is not None:
            self._reception.close("closed")
        give_up = time.monotonic() + CLOSE_SECONDS / 2
        while time.monotonic() < give_up:
            writing = self._reception is not None and bool(self._reception.desk.suspects())
            sending = self._dispatch is not None and self._dispatch.num_open > 0
            if not writing and not sending:
                break
            self._turn(sockets, min(self._sleep_seconds(), 0.02))

    def _tear_down(self, sockets: Sockets) -> None:
        sockets.close_all()
        try:
            self._channel.close()
        except Exception:
            log.exception("the channel did not close")

    def _snapshot(self) -> BeltSnapshot:
        dispatch, reception = self._dispatch, self._reception
        held = reception.desk.bytes_by_state() if reception else Counter[ReceiverState]()
        return BeltSnapshot(
            receive_bytes=reception.desk.num_bytes if reception else 0,
            bytes_reserved=held[ReceiverState.RESERVED],
            bytes_committed=held[ReceiverState.COMMITTED] + held[ReceiverState.CLAIMED],
            bytes_quarantined=held[ReceiverState.QUARANTINED],
            arrivals=dict(reception.desk.states()) if reception else {},
            received_total=dict(reception.desk.ended_total) if reception else {},
            received_bytes_total=reception.desk.committed_bytes_total if reception else 0,
            staging_bytes=self._send_region.num_bytes if self._send_region else 0,
            staging_bytes_used=self._pump.staging_bytes_used if self._pump else 0,
            sends=dict(dispatch.states()) if dispatch else {},
            sent_total=dict(dispatch.ended_total) if dispatch else {},
            sent_bytes_total=dispatch.bytes_total if dispatch else 0,
            writes_total=self._pump.num_writes if self._pump else 0,
            write_seconds=dispatch.write_seconds if dispatch else Sum(),
            exposed_seconds=dispatch.exposed_seconds if dispatch else Sum(),
            peers=dispatch.num_peers if dispatch else 0,
            ignored_total=dict(self._ignored),
        )


def _call(callback: Callable[..., None], *arguments: object) -> None:
    """Call somebody else's code on the belt's thread: their mistake must not end everybody's transfers."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of the belt has failed")
