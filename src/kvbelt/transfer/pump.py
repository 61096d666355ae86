"""The moving of bytes on the sending side: gather into staging, write to the slot, piece by piece.

Rules:

1. Nothing is gathered before the slot is granted and there is staging for it: until then it stays in the
   engine's blocks.
2. Pieces overlap: while one is written the next are gathered, so a piece is read while it is in a cache.
3. Transfers take turns, and one peer holds at most a part of the staging: a peer that takes nothing does
   not stop the others.
4. Staging under a write that may still be in flight is never used again.

It runs on the belt's thread and never blocks, except for what a channel does inside ``write`` itself.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbelt.errors import ChannelError, SettingsError
from kvbelt.transfer.arena import Arena
from kvbelt.transfer.plan import Run, plan_writes, take_batch
from kvbelt.transfer.ports import Channel, Fence, PagedCopy, Region, WriteHandle
from kvbelt.wire.ids import TransferId
from kvbelt.wire.layout import KVLayout

#: Pieces of one transfer that are gathered or written at the same time.
MAX_PIECES = 3


@dataclass(frozen=True, slots=True)
class Target:
    """Where one transfer's bytes go."""

    agent: str
    device: str
    slot_address: int


@dataclass(frozen=True, slots=True)
class Landed:
    """Every block of every layer is in the slot."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Broken:
    """It cannot be completed. ``peer`` tells whether it is the peer's connection that failed."""

    transfer_id: TransferId
    reason: str
    detail: str
    peer: bool


@dataclass(frozen=True, slots=True)
class Stopped:
    """It was stopped, and none of its writes is in flight any more."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class BlocksFree:
    """None of the engine's blocks is read any more, nor will be."""

    transfer_id: TransferId


Report = Landed | Broken | Stopped | BlocksFree


@dataclass(slots=True, eq=False)
class _Piece:
    runs: Sequence[Run]
    offset: int  # in staging
    num_blocks: int
    fences: list[Fence]
    write: WriteHandle | None = None


@dataclass(slots=True, eq=False)
class Load:
    """One transfer's bytes."""

    transfer_id: TransferId
    num_blocks: int  #: of the prompt, in each layer
    total_blocks: int  #: of all layers
    target: Target | None = None  #: None until the slot is granted
    pending: deque[Run] = field(default_factory=deque)
    pieces: deque[_Piece] = field(default_factory=deque)  #: gathering first come, first written
    handed_blocks: int = 0
    landed_blocks: int = 0
    computed: bool = False
    stopped: bool = False
    reported: bool = False  #: Landed, Broken or Stopped was said; each follows at most once
    blocks_free: bool = False
    num_writes: int = 0
    first_write: float | None = None
    last_landed: float | None = None


class Pump:
    """All loads of one process."""

    def __init__(self, channel: Channel, copy: PagedCopy, region: Region, layout: KVLayout, piece_bytes: int) -> None:
        if region.num_bytes < layout.block_bytes:
            raise SettingsError(
                f"the sender's buffer has {region.num_bytes} bytes; one block of one layer needs {layout.block_bytes} "
                "(raise pd_buffer_size)"
            )
        self._channel = channel
        self._copy = copy
        self._region = region
        self._layout = layout
        self._staging = Arena(region.num_bytes)
        # At least two pieces must fit, or nothing overlaps.
        self._piece_blocks = max(1, min(piece_bytes, region.num_bytes // 2) // layout.block_bytes)
        self._share = max(region.num_bytes // 4, self._piece_blocks * layout.block_bytes)
        self._held: Counter[str] = Counter()  # staging bytes by agent
        self._loads: dict[TransferId, Load] = {}
        self.num_writes = 0

    @property
    def staging_bytes_used(self) -> int:
        """Bytes of staging under gathers and writes."""
        return self._staging.used_bytes

    @property
    def busy(self) -> bool:
        """Whether copies or writes are under way, so that a look soon is worth while."""
        return any(load.pieces for load in self._loads.values())

    def add(self, load: Load) -> None:
        """A transfer begins."""
        self._loads[load.transfer_id] = load

    def stop(self, load: Load) -> None:
        """Gather and post nothing more for it."""
        load.stopped = True
        load.pending.clear()

    def abort(self, load: Load) -> None:
        """Give up writes in flight. What cannot be aborted keeps its staging, and Stopped is not said."""
        for piece in [piece for piece in load.pieces if piece.write is not None]:
            try:
                assert piece.write is not None
                piece.write.release()
            except ChannelError:
                continue
            self._drop(load, piece)

    def step(self, now: float) -> tuple[list[Report], bool]:
        """Do what can be done now. Returns what came of it, and whether there is more to do at once."""
        reports: list[Report] = []
        progressed = False
        for load in list(self._loads.values()):
            progressed |= self._advance(load, now, reports)
            self._conclude(load, reports)
        return reports, progressed or bool(reports)

    def _advance(self, load: Load, now: float, reports: list[Report]) -> bool:
        try:
            progressed = self._gather(load)
        except Exception as error:  # noqa: BLE001 -- an engine's blocks, or its device: this transfer's end, not the belt's
            self._fail(load, load.pieces[-1], "gather_failed", repr(error), reports)
            return True
        for piece in list(load.pieces):
            try:
                if piece.write is None:
                    if not all(fence.done() for fence in piece.fences):
                        break  # written in the order in which they are gathered
                    progressed = True
                    if load.stopped:
                        self._drop(load, piece)
                        continue
                    self._post(load, piece, now)
                    # One post a turn: others, and the sockets, come between.
                    self._reap(load, piece, now)
                    break
                progressed |= self._reap(load, piece, now)
            except ChannelError as error:
                self._fail(load, piece, "write_failed", str(error), reports)
            except Exception as error:  # noqa: BLE001 -- likewise
                self._fail(load, piece, "gather_failed", repr(error), reports)
        return progressed

    def _gather(self, load: Load) -> bool:
        if load.target is None or load.stopped or len(load.pieces) >= MAX_PIECES or not load.pending:
            return False
        agent, block_bytes = load.target.agent, self._layout.block_bytes
        num_blocks = 0
        for run in load.pending:
            num_blocks += len(run.block_ids)
            if num_blocks >= self._piece_blocks:
                num_blocks = self._piece_blocks
                break
        num_bytes = num_blocks * block_bytes
        if self._held[agent] and self._held[agent] + num_bytes > self._share:
            return False
        offset = self._staging.allocate(num_bytes)
        if offset is None:
            return False
        self._held[agent] += num_bytes
        piece = _Piece(take_batch(load.pending, num_blocks), offset, num_blocks, [])
        load.pieces.append(piece)
        at = offset
        for run in piece.runs:
            piece.fences.append(self._copy.gather(run.layer, run.block_ids, at, run.ready))
            at += len(run.block_ids) * block_bytes
        return True

    def _post(self, load: Load, piece: _Piece, now: float) -> None:
        target = load.target
        assert target is not None
        spans = plan_writes(
            piece.runs, self._layout, load.num_blocks, self._region.address + piece.offset, target.slot_address
        )
        if load.first_write is None:
            load.first_write = now
        load.num_writes += 1
        self.num_writes += 1
        piece.write = self._channel.write(target.agent, spans, self._region.place, target.device)

    def _reap(self, load: Load, piece: _Piece, now: float) -> bool:
        write = piece.write
        assert write is not None
        if not write.done():
            return False
        write.release()
        load.landed_blocks += piece.num_blocks
        load.last_landed = now
        self._drop(load, piece)
        return True

    def _drop(self, load: Load, piece: _Piece) -> None:
        load.pieces.remove(piece)
        self._staging.free(piece.offset)
        assert load.target is not None
        self._held[load.target.agent] -= piece.num_blocks * self._layout.block_bytes
        if not self._held[load.target.agent]:
            del self._held[load.target.agent]

    def _fail(self, load: Load, piece: _Piece, reason: str, detail: str, reports: list[Report]) -> None:
        """A piece has failed: its write, if it had one, is in flight no more."""
        if piece.write is not None:
            try:
                piece.write.release()
            except ChannelError as error:
                detail = f"{detail}; {error}"
        self._drop(load, piece)
        self.stop(load)
        if not load.reported:
            load.reported = True
            reports.append(Broken(load.transfer_id, reason, detail, peer=reason == "write_failed"))

    def _conclude(self, load: Load, reports: list[Report]) -> None:
        gathering = any(piece.write is None for piece in load.pieces)
        if not load.blocks_free and not gathering and not load.pending and (load.computed or load.stopped):
            load.blocks_free = True
            reports.append(BlocksFree(load.transfer_id))
        if load.stopped:
            if not load.pieces:
                del self._loads[load.transfer_id]
                reports.append(Stopped(load.transfer_id))
        elif load.computed and load.target is not None and not load.reported:
            if load.handed_blocks != load.total_blocks:
                load.reported = True
                detail = f"{load.handed_blocks} of {load.total_blocks} blocks were handed over"
                reports.append(Broken(load.transfer_id, "incomplete", detail, peer=False))
            elif load.landed_blocks == load.total_blocks:
                load.reported = True
                reports.append(Landed(load.transfer_id))
