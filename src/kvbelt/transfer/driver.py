"""The belt's thread: owns the sockets, the channel and the time of all transfers of a process.

Rules:

1. Sessions and buffers belong to this thread. Other threads ``ask``: they put a call into a queue and go on.
2. The thread sleeps until a frame, a call or the next deadline. It looks more often only while copies or writes are
   under way, or while a peer may be writing here.
3. Nothing on it waits for a peer.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import zmq

from kvbelt.errors import ChannelError, SettingsError, StartError
from kvbelt.security.refusals import Refusals
from kvbelt.stall_aware_clock import StallAwareClock
from kvbelt.transfer.calls import Calls
from kvbelt.transfer.link_probe import LinkProbes
from kvbelt.transfer.memory import RegisteredBuffer
from kvbelt.transfer.ports import Buffer, Channel, PagedCopy, PrefixIndex
from kvbelt.transfer.receive.driver import ReceiverDriver
from kvbelt.transfer.receive.incoming import IncomingTransfers, ReceiveTimes, nothing_held
from kvbelt.transfer.receive.states import ReceiverState
from kvbelt.transfer.send.driver import SenderDriver
from kvbelt.transfer.send.links import LinkTallies
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.transfer.send.session import SendTimes
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire.handshake import Hello, MemoryRegion, Welcome
from kvbelt.wire.ids import EngineId
from kvbelt.wire.load import BeltSnapshot, Sum
from kvbelt.wire.notification import OutcomeReport, StepsReport, encode

log = logging.getLogger(__name__)

SeenT = TypeVar("SeenT")
P = ParamSpec("P")

#: How long ``close`` waits for peers to say that they have stopped writing here, and for the thread.
CLOSE_SECONDS = 1.0

#: Bytes of a piece where the settings leave it to the device: on CPU what stays in a core's cache between
#: gather and write, on a GPU enough that posting (some 10 us a write) does not matter.
PIECE_BYTES = {"cpu": 1 << 19, "cuda": 64 << 20}

#: Every byte of the transfer has landed, and its slot is not free yet.
COMMITTED = (ReceiverState.VERIFYING, ReceiverState.COMMITTED, ReceiverState.CLAIMED, ReceiverState.TAKEN)

#: zmq's poller counts in milliseconds; shorter sleeps are slept.
_POLL_RESOLUTION = 1e-3


class Driver:
    def __init__(  # noqa: PLR0917 -- as Belt
        self,
        identity: BeltIdentity,
        settings: BeltSettings,
        channel: Channel,
        copy: PagedCopy | None,
        send_buffer: Buffer | None,
        receive_buffers: Sequence[Buffer],
        prefix: PrefixIndex | None,
        clock: Callable[[], float],
    ) -> None:
        self._identity = identity
        self._settings = settings
        self._channel = channel
        self._copy = copy
        self._send_buffer = RegisteredBuffer(send_buffer, channel) if send_buffer is not None else None
        self._receive_buffers = [RegisteredBuffer(buffer, channel) for buffer in receive_buffers]
        self._prefix = prefix
        self.clock = StallAwareClock(clock)
        self._compatibility = identity.compatibility(channel.name)
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
        self.sender: SenderDriver | None = None  #: set by ``start`` where there is a send buffer
        self.probes: LinkProbes | None = None  #: likewise
        self.receiver: ReceiverDriver | None = None  #: set by ``start`` where there is a receive buffer
        # To the proxy; the second one from the first outcome on.
        self._steps: zmq.Socket[bytes] | None = None
        self._outcomes: zmq.Socket[bytes] | None = None
        self._sockets: Sockets | None = None

    # For other threads.

    def start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error

    def close(self) -> None:
        with self._gate:
            if self._closed:
                return
            self._closed = True
        if self.receiver is not None:
            self.receiver.deliveries.close()
        if self._thread.is_alive():
            self._calls.add(self._begin_closing)
            self._thread.join()
        self._calls.close()

    def ask(self, call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> bool:
        """Have the belt's thread do something; False: the belt is closed or was never started."""
        with self._gate:
            if self._closed or not self._thread.is_alive():
                return False
            self._calls.add(call, *arguments, **named)
            return True

    def seen(self, look: Callable[[], SeenT]) -> SeenT:
        """The result of a call on the belt's thread; after its end it is made at once."""
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
            if self.receiver is not None:
                # Also for what was delivered in the last turns, or before a failure: no part of it follows.
                self.receiver.deliveries.close()
            self._tear_down(sockets)

    def _fail_all(self) -> None:
        """A bug has stopped the thread: end every transfer."""
        with self._gate:
            self._closed = True
        try:
            self._calls.run()
            if self.sender is not None:
                self.sender.abort_all("belt_failed")
            if self.receiver is not None:
                self.receiver.close("belt_failed")
        except Exception:
            log.exception("some transfers could not be ended")

    def _set_up(self, sockets: Sockets) -> None:
        settings, identity = self._settings, self._identity
        self._sockets = sockets
        sockets.watch(self._calls.fileno)
        if settings.notification_endpoint is not None:
            # Apart from the ends of transfers, none of which may be replaced by another one.
            address, key = settings.notification_endpoint, settings.proxy_key
            self._steps = sockets.connect(zmq.PUSH, address, key, newest_only=True)
        sends = [self._send_buffer] if self._send_buffer is not None else []
        devices = {buffer.device for buffer in (*sends, *self._receive_buffers)}
        if devices:
            self._channel.open(devices)
        if self._receive_buffers:
            self.receiver = self._make_receiver(sockets)
        if self._send_buffer is not None:
            assert self._copy is not None
            piece_bytes = settings.piece_bytes or PIECE_BYTES[self._send_buffer.device]
            layout = identity.layout
            pipeline = WritePipeline(
                self._channel, self._copy, self._send_buffer, layout, piece_bytes, LinkTallies(self.clock)
            )
            self.sender = SenderDriver(
                identity.engine_id, self._hello, settings, sockets, self._channel, pipeline, self.clock
            )
            times = SendTimes(settings.heartbeat_seconds, settings.lease_seconds, settings.memory_seconds)
            self.probes = LinkProbes(identity.engine_id, layout, times, self._channel, self.sender)
        self._mechanism = sockets.mechanism()
        if self._settings.keys is not None:
            trusted = len(self._settings.keys.trusted)
            log.info("control sockets use %s; %d keys are trusted", self._mechanism, trusted)

    def _make_receiver(self, sockets: Sockets) -> ReceiverDriver:
        assert self._copy is not None
        settings = self._settings
        times = ReceiveTimes(
            settings.lease_seconds, settings.heartbeat_seconds, settings.claim_seconds, settings.memory_seconds
        )
        incoming = IncomingTransfers(
            self._identity.engine_id,
            self._identity.layout,
            [buffer.num_bytes for buffer in self._receive_buffers],
            times,
            settings.verify,
            self._prefix.held if self._prefix is not None else nothing_held,
        )
        who = self._identity.engine_id, self._compatibility
        return ReceiverDriver(*who, self._welcome, settings, sockets, incoming, self._copy, self.ask, self.clock)

    def _welcome(self) -> Welcome:
        regions = [buffer.take() for buffer in self._receive_buffers]
        return Welcome(
            engine_id=self._identity.engine_id,
            compatibility=self._compatibility,
            agent_metadata=self._channel.local_metadata(),
            regions=tuple(
                MemoryRegion(region.address, region.num_bytes, region.device, region.device_index) for region in regions
            ),
        )

    def _hello(self, receiver: EngineId) -> Hello:
        return Hello(
            engine_id=self._identity.engine_id,
            receiver=receiver,
            role=self._identity.role,
            compatibility=self._compatibility,
        )

    def _turn(self, sockets: Sockets, seconds: float) -> None:
        if not self._calls.fall_asleep():
            seconds = 0.0
        woke = self.clock.asleep(seconds)
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
        now = self.clock.worked()
        if self._progress_every != float("inf"):
            self._progress()
        if self.receiver is not None:
            self.receiver.on_messages(ready)
            self.receiver.tick(now)
        if self.sender is not None:
            self.sender.on_messages(ready)
            self.sender.tick(now)
            measuring = self.probes is not None and self.probes.step()
            self._more = self.sender.step() or measuring

    @property
    def _progress_every(self) -> float:
        sides = (self.receiver, self.sender)
        return min((side.progress_every for side in sides if side is not None), default=float("inf"))

    def _progress(self) -> None:
        try:
            self._channel.progress()
        except ChannelError as error:
            # It concerns one peer's connection: a write over it fails, too.
            log.warning("the channel makes no progress: %s", error)

    def _sleep_seconds(self) -> float:
        if self._more:
            return 0.0
        seconds = float("inf")
        now = self.clock()
        if self.sender is not None:
            seconds = min(seconds, self.sender.due - now, self.sender.look_every)
        if self.receiver is not None:
            seconds = min(seconds, self.receiver.due - now)
        return max(min(seconds, self._progress_every), 0.0)

    def tell(self, report: StepsReport) -> None:
        if self._steps is not None:
            Sockets.send(self._steps, encode(report))

    def tell_outcome(self, report: OutcomeReport) -> None:
        address = self._settings.notification_endpoint
        if address is None or self._sockets is None:
            return
        if self._outcomes is None:  # most workers have none to tell
            self._outcomes = self._sockets.connect(zmq.PUSH, address, self._settings.proxy_key)
        Sockets.send(self._outcomes, encode(report))

    def _begin_closing(self) -> None:
        self._closing = True

    def _last_turns(self, sockets: Sockets) -> None:
        if self.sender is not None:
            self.sender.abort_all("closed")
        if self.receiver is not None:
            self.receiver.close("closed")
        give_up = time.monotonic() + CLOSE_SECONDS / 2
        while time.monotonic() < give_up:
            writing = self.receiver is not None and bool(self.receiver.incoming.suspects())
            sending = self.sender is not None and len(self.sender.transfers) > 0
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
        if self.sender is not None:
            self.sender.peers.liveness.close(writing=len(self.sender.transfers) > 0)

    def look(self) -> BeltSnapshot:
        """A snapshot of the belt. On the belt's thread, or after its end."""
        sender, receiver = self.sender, self.receiver
        sends = sender.transfers if sender else None
        held = receiver.incoming.bytes_by_state() if receiver else Counter[ReceiverState]()
        return BeltSnapshot(
            receive_bytes=receiver.incoming.sizes[0] if receiver else 0,
            overflow_bytes=sum(receiver.incoming.sizes[1:]) if receiver else 0,
            overflow_bytes_used=receiver.incoming.overflow_bytes() if receiver else 0,
            bytes_reserved=held[ReceiverState.RESERVED] + held[ReceiverState.STREAMING],
            bytes_committed=sum(held[state] for state in COMMITTED),
            bytes_quarantined=held[ReceiverState.QUARANTINED],
            arrivals=dict(receiver.incoming.states()) if receiver else {},
            received_total=dict(receiver.incoming.ended_total) if receiver else {},
            received_bytes_total=receiver.incoming.committed_bytes_total if receiver else 0,
            reused_bytes_total=receiver.incoming.reused_bytes_total if receiver else 0,
            staging_bytes=self._send_buffer.num_bytes if self._send_buffer else 0,
            staging_bytes_used=sender.pipeline.staging_bytes_used if sender else 0,
            sends=dict(sends.states()) if sends is not None else {},
            sent_total=dict(sends.ended_total) if sends is not None else {},
            sent_bytes_total=sends.bytes_total if sends is not None else 0,
            writes_total=sender.pipeline.num_writes if sender else 0,
            write_seconds=sends.write_seconds if sends is not None else Sum(),
            exposed_seconds=sends.exposed_seconds if sends is not None else Sum(),
            peers=len(list(sender.peers.connected())) if sender else 0,
            mechanism=self._mechanism,
            refused_total=self._refusals.totals(),
        )
