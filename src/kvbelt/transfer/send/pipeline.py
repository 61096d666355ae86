"""The moving of bytes on the sending side: gather into staging, write to the slot, piece by piece.

Rules:

1. Nothing is gathered before the slot is granted and there is staging for it: until then it stays in the
   engine's blocks.
2. Pieces overlap: while one is written the next are gathered, so a piece is read while it is in a cache.
3. Transfers take turns, and one peer holds at most a part of the staging: a peer that takes nothing does
   not stop the others. Where its pieces leave small gaps, smaller pieces go through them.
4. Staging under a write that may still be in flight is never used again.
5. Staging is taken for a piece only when everything else that its write needs is there: the slot, and of a prompt in
   parts a place in it. So who holds staging waits for the write alone, and nobody waits for somebody who waits.

It runs on the belt's thread and never blocks, except for what a channel does inside ``write`` itself.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbelt.errors import ChannelError, SettingsError
from kvbelt.transfer.arena import Arena
from kvbelt.transfer.links import LinkTallies, LinkTally
from kvbelt.transfer.plan import Run, by_part, plan_writes, take_batch
from kvbelt.transfer.ports import Channel, Digest, Fence, PagedCopy, Reads, Region, WriteHandle
from kvbelt.transfer.probing import Probing
from kvbelt.transfer.shape import PLACES, SlotShape
from kvbelt.wire.digest import Choice, joined, plus
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
    shape: SlotShape
    choice: Choice | None = None  #: which cells' digests are wanted; None: nobody asks


@dataclass(frozen=True, slots=True)
class PartDone:
    """Every block of every layer of one part is in the slot, and there are several parts."""

    transfer_id: TransferId
    part: int
    digest: int | None


@dataclass(frozen=True, slots=True)
class Landed:
    """Every block of every layer is in the slot; where there are parts, the receiver has taken them all."""

    transfer_id: TransferId
    digest: int | None  #: of the slot; None: not asked for, or told of each part


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


@dataclass(frozen=True, slots=True)
class Measured:
    """A link was measured as far as it will be."""

    transfer_id: TransferId


Report = PartDone | Landed | Broken | Stopped | BlocksFree | Measured


@dataclass(slots=True, eq=False)
class _Piece:
    part: int
    runs: Sequence[Run]
    offset: int  # in staging
    num_blocks: int
    fences: list[Fence]
    write: WriteHandle | None = None
    digest: Digest | None = None
    link: LinkTally | None = None  # while its write counts as in flight


@dataclass(slots=True, eq=False)
class _PartLoad:
    """One part of a transfer's bytes; a transfer that is not in parts has one."""

    total_blocks: int  # of all layers
    pending: deque[Run] = field(default_factory=deque)
    landed_blocks: int = 0
    digest: int = 0  # of what has landed
    reported: bool = False

    @property
    def landed(self) -> bool:
        return self.landed_blocks == self.total_blocks


@dataclass(slots=True, eq=False)
class Load:
    """One transfer's bytes."""

    transfer_id: TransferId
    total_blocks: int  #: of the prompt, all layers together
    probing: Probing | None = None  #: there is no prompt: a link is measured
    target: Target | None = None  #: None until the slot is granted
    handed: list[Run] = field(default_factory=list)  #: until the slot is granted, then empty
    parts: list[_PartLoad] = field(default_factory=list)  #: once it is granted
    taken: int = 0  #: parts that the receiver has read
    pieces: deque[_Piece] = field(default_factory=deque)  #: gathering first come, first written
    handed_blocks: int = 0
    landed_blocks: int = 0
    computed: bool = False
    stopped: bool = False
    stuck: bool = False  #: what is in flight cannot be aborted, and ends when the peer pleases
    reported: bool = False  #: Landed, Broken or Measured was said; each follows at most once
    blocks_free: bool = False
    num_writes: int = 0
    first_write: float | None = None
    last_landed: float | None = None

    @property
    def pending(self) -> bool:
        """Whether blocks wait to be gathered."""
        return bool(self.handed) or any(part.pending for part in self.parts)


class Pump:
    """All loads of one process."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        channel: Channel,
        copy: PagedCopy,
        region: Region,
        layout: KVLayout,
        piece_bytes: int,
        links: LinkTallies | None = None,
    ) -> None:
        if region.num_bytes < layout.block_bytes:
            raise SettingsError(
                f"the sender's buffer has {region.num_bytes} bytes; one block of one layer needs {layout.block_bytes} "
                "(raise pd_buffer_size)"
            )
        self._channel = channel
        self._copy = copy
        self._region = region
        self._layout = layout
        self._links = links
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
    def piece_bytes(self) -> int:
        """Of the largest write."""
        return self._piece_blocks * self._layout.block_bytes

    @property
    def reads(self) -> bool:
        """Whether the channel can read."""
        return isinstance(self._channel, Reads)

    @property
    def busy(self) -> bool:
        """Whether copies or writes are under way, so that a look soon is worth while."""
        return any(load.pieces and not load.stuck for load in self._loads.values())

    @property
    def stuck(self) -> bool:
        """Whether there are writes that could not be aborted, worth a look now and then."""
        return any(load.pieces and load.stuck for load in self._loads.values())

    def add(self, load: Load) -> None:
        """A transfer begins."""
        self._loads[load.transfer_id] = load

    def hand_over(self, load: Load, runs: Sequence[Run]) -> None:
        """Blocks are final."""
        if load.stopped:
            return
        load.handed_blocks += sum(len(run.block_ids) for run in runs)
        if load.target is None:
            load.handed.extend(runs)
        else:
            self._sort(load, load.target.shape, runs)

    def begin(self, load: Load, target: Target) -> None:
        """The slot is granted."""
        load.target = target
        if load.probing is not None:
            load.probing.begin(min(self.piece_bytes, target.shape.slot_bytes))
        num_layers = self._layout.num_layers
        load.parts = [_PartLoad(part.num_blocks * num_layers) for part in target.shape.parts()]
        handed, load.handed = load.handed, []
        self._sort(load, target.shape, handed)

    @staticmethod
    def _sort(load: Load, shape: SlotShape, runs: Sequence[Run]) -> None:
        for run in runs:
            for number, piece in by_part(run, shape):
                load.parts[number].pending.append(piece)

    def go_on(self, load: Load, taken: int) -> None:
        """The receiver has read so many parts: their places may be written again."""
        load.taken = min(max(load.taken, taken), len(load.parts))

    def stop(self, load: Load) -> None:
        """Gather and post nothing more for it."""
        load.stopped = True
        load.handed.clear()
        for part in load.parts:
            part.pending.clear()

    def abort(self, load: Load) -> None:
        """Give up writes in flight. What cannot be aborted keeps its staging, and Stopped is not said."""
        for piece in [piece for piece in load.pieces if piece.write is not None]:
            try:
                assert piece.write is not None
                piece.write.release()
            except ChannelError:
                load.stuck = True
                continue
            self._drop(load, piece)

    def step(self, now: float) -> tuple[list[Report], bool]:
        """Do what can be done now. Returns what came of it, and whether there is more to do at once."""
        reports: list[Report] = []
        progressed = False
        for load in list(self._loads.values()):
            if load.probing is not None:
                progressed |= self._measure(load, load.probing, reports)
            else:
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
        if load.target is None or load.stopped or len(load.pieces) >= MAX_PIECES:
            return False
        window = range(load.taken, min(load.taken + PLACES, len(load.parts)))
        number = next((number for number in window if load.parts[number].pending), None)
        if number is None:
            return False
        pending = load.parts[number].pending
        agent, block_bytes = load.target.agent, self._layout.block_bytes
        num_blocks = 0
        for run in pending:
            num_blocks += len(run.block_ids)
            if num_blocks >= self._piece_blocks:
                num_blocks = self._piece_blocks
                break
        if self._held[agent] and self._held[agent] + num_blocks * block_bytes > self._share:
            return False
        offset = self._staging.allocate(num_blocks * block_bytes)
        if offset is None and not self._held[agent]:
            # Nothing of its own will land and make room.
            offset, num_blocks = self._gap(num_blocks)
        if offset is None:
            return False
        self._held[agent] += num_blocks * block_bytes
        piece = _Piece(number, take_batch(pending, num_blocks), offset, num_blocks, [])
        load.pieces.append(piece)
        at = offset
        for run in piece.runs:
            piece.fences.append(self._copy.gather(run.layer, run.block_ids, at, run.ready))
            at += len(run.block_ids) * block_bytes
        return True

    def _gap(self, num_blocks: int) -> tuple[int | None, int]:
        """Room for fewer blocks than asked for, between what silent peers hold: where, and for how many."""
        offset = None
        while offset is None and num_blocks > 1:
            num_blocks //= 2
            offset = self._staging.allocate(num_blocks * self._layout.block_bytes)
        return offset, num_blocks

    def _post(self, load: Load, piece: _Piece, now: float) -> None:
        target = load.target
        assert target is not None
        spans = plan_writes(
            piece.runs,
            target.shape,
            target.shape.part(piece.part),
            self._region.address + piece.offset,
            target.slot_address,
        )
        if load.first_write is None:
            load.first_write = now
        load.num_writes += 1
        self.num_writes += 1
        if self._links is not None:
            piece.link = self._links.posting(target.agent, piece.num_blocks * self._layout.block_bytes)
        piece.write = self._channel.write(target.agent, spans, self._region.place, target.device)
        if target.choice is not None:
            piece.digest = self._digest(target.choice, piece)

    def _measure(self, load: Load, probing: Probing, reports: list[Report]) -> bool:
        """The next operation of a measurement, if none is under way. Bytes move between staging and the slot."""
        if load.target is None:
            return False
        try:
            if not load.pieces:
                if load.stopped or load.reported:
                    return False
                if probing.next is None or not self._post_probe(load, load.target, probing):
                    load.reported = True
                    reports.append(Measured(load.transfer_id))
                    return True
            return self._reap_probe(load, load.pieces[0], probing)
        except ChannelError as error:
            self._fail(load, load.pieces[0], "write_failed", str(error), reports)
            return True

    def _post_probe(self, load: Load, target: Target, probing: Probing) -> bool:
        """False: there is no room in staging."""
        assert probing.next is not None
        kind, num_bytes = probing.next
        num_blocks = -(-num_bytes // self._layout.block_bytes)
        offset = None if self._held[target.agent] else self._staging.allocate(num_blocks * self._layout.block_bytes)
        if offset is None:
            probing.stop("staging_full", "this worker has no room in its staging buffer")
            return False
        self._held[target.agent] += num_blocks * self._layout.block_bytes
        piece = _Piece(0, (), offset, num_blocks, [])
        load.pieces.append(piece)
        spans = [(self._region.address + offset, target.slot_address, num_bytes)]
        probing.posting()
        if kind == "write":
            piece.write = self._channel.write(target.agent, spans, self._region.place, target.device)
        else:
            assert isinstance(self._channel, Reads)
            piece.write = self._channel.read(target.agent, spans, self._region.place, target.device)
        return True

    def _reap_probe(self, load: Load, piece: _Piece, probing: Probing) -> bool:
        write = piece.write
        assert write is not None
        while not write.done():
            if load.stuck or not probing.spinning:
                return False
        probing.ended()
        write.release()
        self._drop(load, piece)
        return True

    def _digest(self, choice: Choice, piece: _Piece) -> Digest | None:
        cells = []
        row = 0
        for run in piece.runs:
            cells.append(choice.of_run(run.layer, run.first, len(run.block_ids), row))
            row += len(run.block_ids)
        chosen = joined(cells)
        return self._copy.digest_sent(piece.offset, chosen) if len(chosen) else None

    def _reap(self, load: Load, piece: _Piece, now: float) -> bool:
        write = piece.write
        assert write is not None
        # The staging is needed until both have ended.
        if not write.done():
            return False
        self._count(piece, landed=True)
        if not (piece.digest is None or piece.digest.done()):
            return False
        write.release()
        part = load.parts[piece.part]
        part.landed_blocks += piece.num_blocks
        if piece.digest is not None:
            part.digest = plus(part.digest, piece.digest.value())
        load.landed_blocks += piece.num_blocks
        load.last_landed = now
        self._drop(load, piece)
        return True

    def _count(self, piece: _Piece, *, landed: bool) -> None:
        """Its write is in flight no more."""
        link, piece.link = piece.link, None
        if link is not None and self._links is not None:
            self._links.ended(link, piece.num_blocks * self._layout.block_bytes, landed=landed)

    def _drop(self, load: Load, piece: _Piece) -> None:
        self._count(piece, landed=False)
        load.pieces.remove(piece)
        self._staging.free(piece.offset)
        assert load.target is not None
        self._held[load.target.agent] -= piece.num_blocks * self._layout.block_bytes
        if not self._held[load.target.agent]:
            del self._held[load.target.agent]

    def _fail(self, load: Load, piece: _Piece, reason: str, detail: str, reports: list[Report]) -> None:
        """A piece has failed. Its staging is free, unless a write of it is in flight all the same."""
        self.stop(load)
        try:
            if piece.write is not None:
                piece.write.release()
        except ChannelError as error:
            load.stuck = True
            detail = f"{detail}; {error}"
        else:
            self._drop(load, piece)
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
        elif load.target is not None and not load.reported:
            self._conclude_parts(load, load.target, reports)

    def _conclude_parts(self, load: Load, target: Target, reports: list[Report]) -> None:
        for number, part in enumerate(load.parts):
            if target.shape.in_parts and part.landed and not part.reported:
                part.reported = True
                digest = part.digest if target.choice is not None else None
                reports.append(PartDone(load.transfer_id, number, digest))
        if not load.computed:
            return
        if load.handed_blocks != load.total_blocks:
            load.reported = True
            detail = f"{load.handed_blocks} of {load.total_blocks} blocks were handed over"
            reports.append(Broken(load.transfer_id, "incomplete", detail, peer=False))
        elif all(part.landed for part in load.parts) and (not target.shape.in_parts or load.taken == len(load.parts)):
            load.reported = True
            wanted = target.choice is not None and not target.shape.in_parts
            reports.append(Landed(load.transfer_id, load.parts[0].digest if wanted else None))
