"""Measuring one link: a client of the sending side.

A measurement is a transfer that commits nothing: a slot is reserved as for a prompt, written to and read back, and
given up. So no byte of another transfer is touched on either side, and what goes wrong on the way is handled as it is
for a transfer. A slow link carries little of it: operations grow only while they are quick.

Rules:

1. One operation is in flight at a time, and not larger than one write of a transfer.
2. It ends when anything else is to be sent. What was measured by then is reported.
"""

import itertools
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvbelt.errors import ChannelError
from kvbelt.transfer.calls import call_back
from kvbelt.transfer.ports import Channel, Reads, TransferOutcome, WriteHandle
from kvbelt.transfer.send.driver import SenderDriver
from kvbelt.transfer.send.load import Piece, Target
from kvbelt.transfer.send.plan import Span
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.send.states import SenderState
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.probe import ENOUGH_OPERATIONS, LinkSpeed, ProbeResult

SMALL_BYTES = 4096
SMALL_ROUNDS = 9
LARGE_BYTES = 8 << 20
LARGE_ROUNDS = 5
GROWTH = 16

#: The size does not grow after an operation that took this long.
QUICK_SECONDS = 0.02

#: Most time spent on one size, even if fewer rounds have run; but no fewer than ``ENOUGH_OPERATIONS`` run.
ENOUGH_SECONDS = 0.2

#: Longest time that the belt's thread waits for an operation; after it, the thread polls once a turn.
SPIN_SECONDS = 1e-3

#: A measurement's deadline.
PROBE_SECONDS = 4.0

#: A measurement reserves at most one part in this many of the decode worker's buffer.
BUFFER_SHARE = 8

Kind = Literal["write", "read"]


class Operation(NamedTuple):
    kind: Kind
    num_bytes: int


@dataclass(slots=True)
class _Open:
    transfer: SenderSession
    probing: "Probing"
    on_end: Callable[[ProbeResult], None]
    piece: Piece | None = None  # of the operation in flight


class LinkProbes:
    """Measures the links of one sending process, one at a time. On the belt's thread."""

    def __init__(
        self, engine_id: EngineId, layout: KVLayout, times: SendTimes, channel: Channel, sender: SenderDriver
    ) -> None:
        self._engine_id = engine_id
        self._layout = layout
        self._times = times
        self._channel = channel
        self._sender = sender
        self._numbers = itertools.count()
        self._open: _Open | None = None

    def begin(self, engine_id: EngineId, on_end: Callable[[ProbeResult], None]) -> None:
        peer = next((peer for peer in self._sender.peers.connected() if peer.address.engine_id == engine_id), None)
        if peer is None:
            detail = f"this worker is not connected to {engine_id}"
            call_back(on_end, ProbeResult(reason="not_connected", detail=detail))
            return
        if self._open is not None or self._others():
            busy = ProbeResult(channel=self._channel.name, reason="busy", detail="transfers are under way")
            call_back(on_end, busy)
            return
        now = self._sender.now()
        transfer = SenderSession(
            TransferId(f"probe-{self._engine_id}-{next(self._numbers)}"),
            self._engine_id,
            engine_id,
            self._tokens_to_ask(peer.regions[0].num_bytes),
            self._layout,
            now + PROBE_SECONDS,
            self._times,
            now,
            on_end=self._ended,
            measures=True,
        )
        self._open = _Open(transfer, Probing(reads=isinstance(self._channel, Reads)), on_end)
        self._sender.begin_to(transfer, peer)

    def _tokens_to_ask(self, buffer_bytes: int) -> int:
        groups = 1 + len(self._layout.windows)
        return max(1, self._blocks_to_ask(buffer_bytes) // groups) * self._layout.block_size

    def _blocks_to_ask(self, buffer_bytes: int) -> int:
        slot, share = self._layout.slot_bytes(1), buffer_bytes // BUFFER_SHARE
        wanted = min(LARGE_BYTES, self._sender.pipeline.piece_bytes, share)
        return max(1, min(-(-wanted // slot), share // slot))

    def _others(self) -> bool:
        own = self._open.transfer if self._open is not None else None
        return any(transfer is not own and transfer.outcome is None for transfer in self._sender.transfers)

    def step(self) -> bool:
        """Get on with the measurement. True: there is more to do at once."""
        probe = self._open
        if probe is None:
            return False
        transfer, probing = probe.transfer, probe.probing
        if self._others():
            self._stop(probe, "busy", "a transfer began meanwhile")
        elif transfer.state is SenderState.WAITING:
            # Its place in the queue is for prompts.
            self._stop(probe, "receiver_full", "the decode worker has no room in its buffer")
        target = transfer.load.target
        if target is None or self._open is None:
            return False
        if not probing.begun:
            probing.begin(min(self._sender.pipeline.piece_bytes, target.shape.slot_bytes))
        if probe.piece is not None:
            return self._look(probe, probe.piece)
        if probing.next is None:
            self._sender.abort(transfer, "probed")
            return True
        return self._post(probe, target, probing.next)

    def _post(self, probe: _Open, target: Target, operation: Operation) -> bool:
        def post(span: Span, place: str) -> WriteHandle:
            if operation.kind == "write":
                return self._channel.write(target.agent, [span], place, target.device)
            assert isinstance(self._channel, Reads)
            return self._channel.read(target.agent, [span], place, target.device)

        probe.probing.posting()
        probe.piece = self._sender.pipeline.lend(probe.transfer, operation.num_bytes, post)
        if probe.piece is None:
            self._stop(probe, "staging_full", "this worker has no room in its staging buffer")
        elif probe.piece.write is None:
            probe.piece = None  # it could not be posted, and has failed
        else:
            return self._look(probe, probe.piece)
        return True

    def _look(self, probe: _Open, piece: Piece) -> bool:
        """Whether the operation in flight has ended. It is waited for as long as one step of the belt may take."""
        pipeline, load = self._sender.pipeline, probe.transfer.load
        while piece.write is not None and piece in load.pieces:
            try:
                if piece.write.done():
                    probe.probing.ended()
                    piece.write.release()
                    pipeline.drop(probe.transfer, piece)
                    probe.piece = None
                    return True
            except ChannelError as error:
                pipeline.fail(probe.transfer, piece, "write_failed", str(error))
                break
            if load.stuck or not probe.probing.spinning:
                return False
        else:
            probe.probing.ended()  # the pipeline has seen its end first
        probe.piece = None
        return True

    def _stop(self, probe: _Open, why: str, detail: str) -> None:
        probe.probing.stop(why, detail)
        self._sender.abort(probe.transfer, "probed")

    def _ended(self, outcome: TransferOutcome) -> None:
        probe, self._open = self._open, None
        assert probe is not None
        probing = probe.probing
        reason, detail = probing.stopped if outcome.reason == "probed" else (outcome.reason, outcome.detail)
        result = ProbeResult(
            channel=self._channel.name, **probing.figures, num_bytes=probing.num_bytes, reason=reason, detail=detail
        )
        call_back(probe.on_end, result)


class Probing:
    """One measurement, of writes and, where the channel ``reads``, of reads.

    The clock is not the belt's, which leaves out time in which its thread did not run.
    """

    def __init__(self, *, reads: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.figures: dict[Kind, LinkSpeed] = {}  #: of one round, until there are more
        self.num_bytes = 0  #: that have moved
        #: Why nothing more is measured, and in words; empty: it goes on, or it is complete.
        self.stopped = ("", "")
        self._reads = reads
        self._clock = clock
        self._began = 0.0
        self._course: Generator[Operation, float, None] | None = None
        self.next: Operation | None = None  #: None: not begun, or over

    @property
    def begun(self) -> bool:
        return self._course is not None

    def begin(self, room: int) -> None:
        self._course = self._go(min(room, LARGE_BYTES))
        self.next = next(self._course)

    def stop(self, why: str, detail: str) -> None:
        self.stopped = why, detail
        self.next = None

    def posting(self) -> None:
        self._began = self._clock()

    @property
    def spinning(self) -> bool:
        return self._clock() - self._began < SPIN_SECONDS

    def ended(self) -> None:
        seconds = self._clock() - self._began
        if self.next is None or self._course is None:
            return
        self.num_bytes += self.next.num_bytes
        try:
            self.next = self._course.send(seconds)
        except StopIteration:
            self.next = None

    def _go(self, most: int) -> Generator[Operation, float, None]:
        kinds: tuple[Kind, ...] = ("write", "read") if self._reads else ("write",)
        for kind in kinds:
            self.figures[kind] = yield from _grow(kind, most)
        # Only now: memory that was never touched is one page of zeros to the kernel, and moves faster than any other.
        for kind in kinds:
            known = self.figures[kind]
            times = yield from _rounds(Operation(kind, known.num_bytes), LARGE_ROUNDS)
            self.figures[kind] = LinkSpeed(known.num_bytes, min(times), known.small_seconds, len(times))


def _grow(kind: Kind, most: int) -> Generator[Operation, float, LinkSpeed]:
    """Small operations, and then larger ones, as long as they are quick."""
    num_bytes = min(SMALL_BYTES, most)
    yield Operation(kind, num_bytes)  # it may open the connection
    times = yield from _rounds(Operation(kind, num_bytes), SMALL_ROUNDS)
    small = seconds = min(times)
    while num_bytes < most and seconds < QUICK_SECONDS:
        num_bytes = min(num_bytes * GROWTH, most)
        seconds = yield Operation(kind, num_bytes)
    return LinkSpeed(num_bytes, seconds, small)


def _rounds(operation: Operation, rounds: int) -> Generator[Operation, float, list[float]]:
    times: list[float] = []
    while len(times) < ENOUGH_OPERATIONS or (len(times) < rounds and sum(times) < ENOUGH_SECONDS):
        seconds = yield operation
        times.append(seconds)
    return times
