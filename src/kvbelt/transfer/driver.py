"""The belt's thread: owns the sockets, the channel and the time of all transfers of a process.

Rules:

1. Sessions and buffers belong to this thread. Other threads ``ask``: they put a call into a queue and go on.
2. The thread sleeps until a frame, a call or the next deadline. It looks more often only while copies or
   writes are under way, or while a peer may be writing here.
3. Nothing on it waits for a peer.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvbelt.errors import ChannelError, SettingsError, StartError
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.calls import Calls
from kvbelt.transfer.desk import Desk, DeskTimes, nothing_held
from kvbelt.transfer.dispatch import Dispatch
from kvbelt.transfer.fencing import this_process
from kvbelt.transfer.links import LinkTallies
from kvbelt.transfer.patience import PatientClock
from kvbelt.transfer.ports import Channel, PagedCopy, PrefixIndex, Region
from kvbelt.transfer.pump import Pump
from kvbelt.transfer.receiver_states import ReceiverState
from kvbelt.transfer.reception import Reception
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.transfer.snapshot import BeltSnapshot, Sum
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire.about import Link
from kvbelt.wire.handshake import Hello, MemoryRegion, Welcome
from kvbelt.wire.ids import EngineId

log = logging.getLogger(__name__)

SeenT = TypeVar("SeenT")

#: How long ``close`` waits for peers to say that they have stopped writing here, and for the thread.
CLOSE_SECONDS = 1.0

#: Bytes of a piece where the settings leave it to the device: on CPU what stays in a core's cache between
#: gather and write, on a GPU enough that posting (some 10 us a write) does not matter.
PIECE_BYTES = {"cpu": 1 << 19, "cuda": 64 << 20}

#: Of a transfer whose every byte has landed, and whose slot is not free yet.
COMMITTED = (ReceiverState.VERIFYING, ReceiverState.COMMITTED, ReceiverState.CLAIMED, ReceiverState.TAKEN)

#: zmq's poller counts in milliseconds; shorter sleeps are slept.
_POLL_RESOLUTION = 1e-3


class Driver:
    """The thread, and everything it owns."""

    def __init__(  # noqa: PLR0917 -- as Belt
        self,
        identity: BeltIdentity,
        settings: BeltSettings,
        channel: Channel,
        copy: PagedCopy | None,
        send_region: Region | None,
        receive_regions: Sequence[Region],
        prefix: PrefixIndex | None,
        clock: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._settings = settings
        self._channel = channel
        self._copy = copy
        self._send_region = send_region
        self._receive_regions = receive_regions
        self._prefix = prefix
        self._clock = PatientClock(clock)
        self._compatibility = identity.compatibility(channel.name)
        self._here = this_process()
        self._calls = Calls()
        self._thread = threading.Thread(target=self._main, name="kvbelt-belt", daemon=True)
        self._started = threading.Event()
        self._start_error: Exception | None = None
        self._closing = False
        # Closing and asking must not cross: once the flag is set nothing is added.
        self._gate = threading.Lock()
        self._closed = False
        self._more = False  # the last turn left something to do at once
        self._refusals = Refusals()
        self._mechanism = "NULL"
        self._pump: Pump | None = None
        self.dispatch: Dispatch | None = None  #: set by ``start`` where there is a send region
        self.reception: Reception | None = None  #: set by ``start`` where there is a receive region

    # For other threads.

    def start(self) -> None:
        """Bind, register memory, start the thread.

        Raises:
            StartError: a port is taken, or the memory could not be registered.
            SettingsError: a buffer is too small.
        """
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error

    def close(self) -> None:
        """End everything. Idempotent. Not from the belt's own thread."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        if self.reception is not None:
            self.reception.deliveries.close()
        if self._thread.is_alive():
            self._calls.add(self._begin_closing)
            self._thread.join()
        self._calls.close()

    def now(self) -> float:
        """Seconds on the belt's clock."""
        return self._clock()

    def ask(self, call: Callable[[], None]) -> bool:
        """Have the belt's thread do something; False: the belt is closed or was never started."""
        with self._gate:
            if self._closed or not self._thread.is_alive():
                return False
            self._calls.add(call)
            return True

    def snapshot(self) -> BeltSnapshot:
        """Counters and gauges. Waits a turn of the belt; after ``close`` it is the last state."""
        return self._seen(self.look)

    def links(self) -> list[Link]:
        """What has moved to each receiver. Likewise."""
        return self._seen(lambda: self.dispatch.links() if self.dispatch is not None else [])

    def _seen(self, look: Callable[[], SeenT]) -> SeenT:
        """What a look on the belt's thread sees."""
        taken: list[SeenT] = []
        ready = threading.Event()

        def take() -> None:
            taken.append(look())
            ready.set()

        if threading.current_thread() is self._thread or not self.ask(take):
            return look()
        while not ready.wait(timeout=0.1):
            if not self._thread.is_alive():
                return look()
        return taken[0]

    # The thread.

    def _main(self) -> None:
        sockets: Sockets | None = None
        try:
            sockets = Sockets(self._settings.keys, self._refusals)
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
            if self.reception is not None:
                # Also of what was delivered in the last turns, or before a failure: no part of it comes any more.
                self.reception.deliveries.close()
            self._tear_down(sockets)

    def _fail_all(self) -> None:
        """A mistake of ours has stopped the thread: nobody may wait for it."""
        with self._gate:
            self._closed = True
        try:
            self._calls.run()
            if self.dispatch is not None:
                self.dispatch.abandon_all("belt_failed")
            if self.reception is not None:
                self.reception.close("belt_failed")
        except Exception:
            log.exception("not everybody could be told")

    def _set_up(self, sockets: Sockets) -> None:
        settings, identity = self._settings, self._identity
        sockets.watch(self._calls.fileno)
        for region in (self._send_region, *self._receive_regions):
            if region is not None:
                self._channel.register(region)
        if self._receive_regions:
            self.reception = self._make_reception(sockets, self._receive_regions)
        if self._send_region is not None:
            assert self._copy is not None
            piece_bytes = settings.piece_bytes or PIECE_BYTES[self._send_region.device]
            links = LinkTallies(self._clock)
            self._pump = Pump(self._channel, self._copy, self._send_region, identity.layout, piece_bytes, links)
            self.dispatch = Dispatch(
                identity.engine_id,
                identity.layout,
                self._hello,
                settings,
                sockets,
                self._channel,
                self._pump,
                self._clock,
                links,
            )
        self._mechanism = sockets.mechanism()
        if self._settings.keys is not None:
            trusted = len(self._settings.keys.trusted)
            log.info("control sockets use %s; %d keys are trusted", self._mechanism, trusted)

    def _make_reception(self, sockets: Sockets, regions: Sequence[Region]) -> Reception:
        assert self._copy is not None
        settings = self._settings
        times = DeskTimes(
            settings.lease_seconds, settings.heartbeat_seconds, settings.claim_seconds, settings.memory_seconds
        )
        desk = Desk(
            self._identity.engine_id,
            self._identity.layout,
            [region.num_bytes for region in regions],
            times,
            settings.verify,
            self._prefix.held if self._prefix is not None else nothing_held,
        )
        welcome = Welcome(
            engine_id=self._identity.engine_id,
            compatibility=self._compatibility,
            agent_metadata=self._channel.local_metadata(),
            regions=tuple(
                MemoryRegion(region.address, region.num_bytes, region.device, region.device_index) for region in regions
            ),
        )
        return Reception(welcome, self._here, settings, sockets, desk, self._copy, self.ask, self._clock)

    def _hello(self, receiver: EngineId) -> Hello:
        return Hello(
            engine_id=self._identity.engine_id,
            receiver=receiver,
            worker=self._identity.worker,
            role=self._identity.role,
            process=self._here,
            compatibility=self._compatibility,
        )

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
        if self._progress_every != float("inf"):
            self._progress()
        if self.reception is not None:
            self.reception.hear(ready)
            self.reception.tick(now)
        if self.dispatch is not None:
            self.dispatch.hear(ready)
            self.dispatch.tick(now)
            self._more = self.dispatch.step()

    @property
    def _progress_every(self) -> float:
        sides = (self.reception, self.dispatch)
        return min((side.progress_every for side in sides if side is not None), default=float("inf"))

    def _progress(self) -> None:
        try:
            self._channel.progress()
        except ChannelError as error:
            # A peer's connection, not ours: whoever writes over it learns it there.
            log.warning("the channel makes no progress: %s", error)

    def _sleep_seconds(self) -> float:
        if self._more:
            return 0.0
        seconds = float("inf")
        now = self._clock()
        if self.dispatch is not None:
            seconds = min(seconds, self.dispatch.due - now, self.dispatch.look_every)
        if self.reception is not None:
            seconds = min(seconds, self.reception.due - now)
        return max(min(seconds, self._progress_every), 0.0)

    def _begin_closing(self) -> None:
        self._closing = True

    def _last_turns(self, sockets: Sockets) -> None:
        """Tell everybody, and give writers a moment to acknowledge."""
        if self.dispatch is not None:
            self.dispatch.abandon_all("closed")
        if self.reception is not None:
            self.reception.close("closed")
        give_up = time.monotonic() + CLOSE_SECONDS / 2
        while time.monotonic() < give_up:
            writing = self.reception is not None and bool(self.reception.desk.suspects())
            sending = self.dispatch is not None and self.dispatch.num_open > 0
            if not writing and not sending:
                break
            self._turn(sockets, min(self._sleep_seconds(), 0.02))

    def _tear_down(self, sockets: Sockets | None) -> None:
        if sockets is not None:
            sockets.close_all()
        try:
            self._channel.close()
        except Exception:
            log.exception("the channel did not close")

    def look(self) -> BeltSnapshot:
        """What there is now. On the belt's thread, or after its end."""
        dispatch, reception = self.dispatch, self.reception
        held = reception.desk.bytes_by_state() if reception else Counter[ReceiverState]()
        return BeltSnapshot(
            receive_bytes=reception.desk.sizes[0] if reception else 0,
            overflow_bytes=sum(reception.desk.sizes[1:]) if reception else 0,
            overflow_bytes_used=reception.desk.overflow_bytes() if reception else 0,
            bytes_reserved=held[ReceiverState.RESERVED] + held[ReceiverState.STREAMING],
            bytes_committed=sum(held[state] for state in COMMITTED),
            bytes_quarantined=held[ReceiverState.QUARANTINED],
            arrivals=dict(reception.desk.states()) if reception else {},
            received_total=dict(reception.desk.ended_total) if reception else {},
            received_bytes_total=reception.desk.committed_bytes_total if reception else 0,
            reused_bytes_total=reception.desk.reused_bytes_total if reception else 0,
            staging_bytes=self._send_region.num_bytes if self._send_region else 0,
            staging_bytes_used=self._pump.staging_bytes_used if self._pump else 0,
            sends=dict(dispatch.states()) if dispatch else {},
            sent_total=dict(dispatch.ended_total) if dispatch else {},
            sent_bytes_total=dispatch.bytes_total if dispatch else 0,
            writes_total=self._pump.num_writes if self._pump else 0,
            write_seconds=dispatch.write_seconds if dispatch else Sum(),
            exposed_seconds=dispatch.exposed_seconds if dispatch else Sum(),
            peers=dispatch.peers.num_ready if dispatch else 0,
            mechanism=self._mechanism,
            refused_total=self._refusals.totals(),
        )
