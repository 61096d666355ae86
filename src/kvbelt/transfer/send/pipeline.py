"""The moving of bytes on the sending side: gather into staging, write to the slot, piece by piece.

Rules:

1. Nothing is gathered before the slot is granted and there is staging for it: until then it stays in the engine's
   blocks.
2. Pieces overlap: while one is written the next are gathered, so a piece is read while it is in a cache.
3. Transfers take turns, and one peer holds at most a part of the staging: a peer that takes nothing does not stop the
   others. Where its pieces leave small gaps, smaller pieces go through them.
4. Staging under a write that may still be in flight is never reused.
5. Staging is taken for a piece only when everything else that its write needs is there: the slot, and of a prompt in
   parts a place in it. So a holder of staging waits for the write alone, and never for another holder.

It runs on the belt's thread and never blocks, except for what a channel does inside ``write`` itself.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from kvbelt.errors import ChannelError, SettingsError
from kvbelt.transfer.arena import Arena
from kvbelt.transfer.cut_copies import CutCopies
from kvbelt.transfer.ports import Buffer, Channel, Digest, PagedCopy, WriteHandle
from kvbelt.transfer.send.links import LinkTallies
from kvbelt.transfer.send.load import Load, PartLoad, Piece, Target
from kvbelt.transfer.send.plan import Run, Span, by_part, plan_writes, take_batch
from kvbelt.transfer.send.session import SenderSession
from kvbelt.transfer.send.states import BlocksFree, PartWritten, Report, WriteFailed, WritesDrained, Written
from kvbelt.transfer.shape import PLACES, SlotShape
from kvbelt.wire.digest import Choice, joined, plus
from kvbelt.wire.ids import TransferId
from kvbelt.wire.layout import KVLayout

#: Pieces of one transfer that are gathered or written at the same time.
MAX_PIECES = 3

#: What became of transfers, in the order in which it happened.
Reports = list[tuple[SenderSession, Report]]


class WritePipeline:
    def __init__(  # noqa: PLR0917 -- its seams
        self,
        channel: Channel,
        copy: PagedCopy,
        buffer: Buffer,
        layout: KVLayout,
        piece_bytes: int,
        links: LinkTallies | None = None,
    ) -> None:
        if buffer.num_bytes < layout.block_bytes:
            raise SettingsError(
                f"the sender's buffer has {buffer.num_bytes} bytes; one block of one layer needs {layout.block_bytes} "
                "(raise pd_buffer_size)"
            )
        self._channel = channel
        self._copies = CutCopies(copy, layout)
        self.buffer = buffer
        self._layout = layout
        self.links = links
        self._staging = Arena(buffer.num_bytes)
        # At least two pieces must fit, or nothing overlaps.
        self._piece_bytes = min(piece_bytes, buffer.num_bytes // 2)
        self._share = max(buffer.num_bytes // 4, self.piece_bytes)
        self._held: Counter[str] = Counter()  # staging bytes by agent
        self._transfers: dict[TransferId, SenderSession] = {}  # until they have stopped
        self._reports: Reports = []
        self.num_writes = 0

    @property
    def staging_bytes_used(self) -> int:
        return self._staging.used_bytes

    @property
    def piece_bytes(self) -> int:
        """Of a write, at most."""
        return self._piece_blocks(self._layout) * self._layout.block_bytes

    def _piece_blocks(self, layout: KVLayout) -> int:
        return max(1, self._piece_bytes // layout.block_bytes)

    @property
    def busy(self) -> bool:
        """Whether copies or writes are under way, so the thread should poll again soon."""
        return any(transfer.load.pieces and not transfer.load.stuck for transfer in self._transfers.values())

    @property
    def stuck(self) -> bool:
        """Whether writes could not be aborted, so the thread should poll now and then."""
        return any(transfer.load.pieces and transfer.load.stuck for transfer in self._transfers.values())

    def add(self, transfer: SenderSession) -> None:
        self._transfers[transfer.transfer_id] = transfer

    def hand_over(self, transfer: SenderSession, runs: Sequence[Run]) -> None:
        load = transfer.load
        if load.stopped:
            return
        load.handed_blocks += sum(len(run.block_ids) for run in runs)
        if load.target is None:
            load.handed.extend(runs)
        else:
            self._sort(load, load.target.shape, runs)

    def computed(self, transfer: SenderSession, at: float) -> None:
        transfer.computed_at = at

    def begin(self, transfer: SenderSession, target: Target) -> None:
        load = transfer.load
        load.target = target
        load.parts = [PartLoad(part.num_blocks * target.shape.layout.num_layers) for part in target.shape.parts()]
        handed, load.handed = load.handed, []
        self._sort(load, target.shape, handed)

    @staticmethod
    def _sort(load: Load, shape: SlotShape, runs: Sequence[Run]) -> None:
        for run in runs:
            if (travelling := run.of_layers(shape)) is None:
                continue
            for number, piece in by_part(travelling.in_blocks_of(shape), shape):
                load.parts[number].pending.append(piece)

    def parts_taken(self, transfer: SenderSession, taken: int) -> None:
        load = transfer.load
        load.taken = min(max(load.taken, taken), len(load.parts))

    def stop(self, transfer: SenderSession) -> None:
        load = transfer.load
        load.stopped = True
        load.handed.clear()
        for part in load.parts:
            part.pending.clear()

    def abort(self, transfer: SenderSession) -> None:
        """Give up writes in flight. What cannot be aborted keeps its staging, and WritesDrained is not reported."""
        load = transfer.load
        for piece in list(load.pieces):
            if piece.write is None:
                continue
            try:
                piece.write.release()
            except ChannelError:
                load.stuck = True
            else:
                self.drop(transfer, piece)

    def step(self, now: float) -> tuple[Reports, bool]:
        """Do what can be done now. Returns what came of it, and whether there is more to do at once."""
        progressed = False
        for transfer in list(self._transfers.values()):
            progressed |= self._advance(transfer, now)
            self._conclude(transfer)
        reports, self._reports = self._reports, []
        return reports, progressed or bool(reports)

    def _advance(self, transfer: SenderSession, now: float) -> bool:
        load = transfer.load
        try:
            progressed = self._gather(load)
        except Exception as error:  # noqa: BLE001 -- an engine's blocks, or its device: this transfer's end, not the belt's
            self.fail(transfer, load.pieces[-1], "gather_failed", repr(error))
            return True
        for piece in list(load.pieces):
            try:
                if piece.write is None:
                    if not all(fence.done() for fence in piece.fences):
                        break  # written in the order in which they are gathered
                    progressed = True
                    if load.stopped:
                        self.drop(transfer, piece)
                        continue
                    self._post(load, piece, now)
                    # One post a turn: other transfers, and the sockets, come between.
                    self._reap(transfer, piece, now)
                    break
                progressed |= self._reap(transfer, piece, now)
            except ChannelError as error:
                self.fail(transfer, piece, "write_failed", str(error))
            except Exception as error:  # noqa: BLE001 -- likewise
                self.fail(transfer, piece, "gather_failed", repr(error))
        return progressed

    def _gather(self, load: Load) -> bool:
        if load.target is None or load.stopped or len(load.pieces) >= MAX_PIECES:
            return False
        window = range(load.taken, min(load.taken + PLACES, len(load.parts)))
        number = next((number for number in window if load.parts[number].pending), None)
        if number is None:
            return False
        pending = load.parts[number].pending
        agent, shape = load.target.agent, load.target.shape
        block_bytes, piece_blocks = shape.layout.block_bytes, self._piece_blocks(shape.layout)
        num_blocks = 0
        for run in pending:
            num_blocks += len(run.block_ids)
            if num_blocks >= piece_blocks:
                num_blocks = piece_blocks
                break
        if self._held[agent] and self._held[agent] + num_blocks * block_bytes > self._share:
            return False
        offset = self._staging.allocate(num_blocks * block_bytes)
        if offset is None and not self._held[agent]:
            # No piece of this peer will land and make room.
            offset, num_blocks = self._gap(num_blocks, block_bytes)
        if offset is None:
            return False
        self._held[agent] += num_blocks * block_bytes
        piece = Piece(number, take_batch(pending, num_blocks), offset, num_blocks, num_blocks * block_bytes)
        load.pieces.append(piece)
        at, copy = offset, self._copies.of(shape)
        for run in piece.runs:
            piece.fences.append(copy.gather(run.layer, run.block_ids, at, run.ready))
            at += len(run.block_ids) * block_bytes
        return True

    def _gap(self, num_blocks: int, block_bytes: int) -> tuple[int | None, int]:
        """Room for fewer blocks than asked for, between what silent peers hold: where, and for how many."""
        offset = None
        while offset is None and num_blocks > 1:
            num_blocks //= 2
            offset = self._staging.allocate(num_blocks * block_bytes)
        return offset, num_blocks

    def _post(self, load: Load, piece: Piece, now: float) -> None:
        target, region = load.target, self.buffer.take()
        assert target is not None
        spans = plan_writes(
            piece.runs, target.shape, target.shape.part(piece.part), region.address + piece.offset, target.slot_address
        )
        if load.first_write is None:
            load.first_write = now
        load.num_writes += 1
        self.num_writes += 1
        if self.links is not None:
            piece.link = self.links.posting(target.agent, piece.num_bytes)
        piece.write = self._channel.write(target.agent, spans, region.place, target.device)
        if target.choice is not None:
            piece.digest = self._digest(target, target.choice, piece)

    def lend(self, transfer: SenderSession, num_bytes: int, post: Callable[[Span, str], WriteHandle]) -> Piece | None:
        """Have ``post`` begin one operation between staging and the transfer's slot; None: staging has no room.

        ``post`` gets the span and the place of the staging. For transfers without blocks: their owner drops the piece
        once its operation is done. A piece without ``write`` could not be posted, and has failed.
        """
        target = transfer.load.target
        assert target is not None  # the slot was granted
        block_bytes = target.shape.layout.block_bytes
        num_blocks = -(-num_bytes // block_bytes)
        offset = None if self._held[target.agent] else self._staging.allocate(num_blocks * block_bytes)
        if offset is None:
            return None
        piece = Piece(0, (), offset, num_blocks, num_blocks * block_bytes)
        self._held[target.agent] += piece.num_bytes
        transfer.load.pieces.append(piece)
        region = self.buffer.take()
        try:
            piece.write = post(Span(region.address + offset, target.slot_address, num_bytes), region.place)
        except ChannelError as error:
            self.fail(transfer, piece, "write_failed", str(error))
        return piece

    def _digest(self, target: Target, choice: Choice, piece: Piece) -> Digest | None:
        cells = []
        row = 0
        for run in piece.runs:
            cells.append(choice.of_run(run.layer, run.first, len(run.block_ids), row))
            row += len(run.block_ids)
        chosen = joined(cells)
        return self._copies.of(target.shape).digest_sent(piece.offset, chosen) if len(chosen) else None

    def _reap(self, transfer: SenderSession, piece: Piece, now: float) -> bool:
        write, load = piece.write, transfer.load
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
        load.last_landed = now
        self.drop(transfer, piece)
        return True

    def _count(self, piece: Piece, *, landed: bool) -> None:
        link, piece.link = piece.link, None
        if link is not None and self.links is not None:
            self.links.ended(link, piece.num_bytes, landed=landed)

    def drop(self, transfer: SenderSession, piece: Piece) -> None:
        target = transfer.load.target
        assert target is not None
        self._count(piece, landed=False)
        transfer.load.pieces.remove(piece)
        self._staging.free(piece.offset)
        self._held[target.agent] -= piece.num_bytes
        if not self._held[target.agent]:
            del self._held[target.agent]

    def fail(self, transfer: SenderSession, piece: Piece, reason: str, detail: str) -> None:
        """A piece has failed. Its staging is free, unless a write of it is in flight all the same."""
        load = transfer.load
        self.stop(transfer)
        try:
            if piece.write is not None:
                piece.write.release()
        except ChannelError as error:
            load.stuck = True
            detail = f"{detail}; {error}"
        else:
            self.drop(transfer, piece)
        if not load.reported:
            load.reported = True
            self._reports.append((transfer, WriteFailed(reason, detail, peer=reason == "write_failed")))

    def _conclude(self, transfer: SenderSession) -> None:
        load = transfer.load
        computed = transfer.computed_at is not None
        gathering = any(piece.write is None for piece in load.pieces)
        pending = load.handed or any(part.pending for part in load.parts)
        if not load.blocks_free and not gathering and not pending and (computed or load.stopped):
            load.blocks_free = True
            self._reports.append((transfer, BlocksFree()))
        if load.stopped:
            if not load.pieces:
                del self._transfers[transfer.transfer_id]
                self._reports.append((transfer, WritesDrained()))
        elif load.target is not None and not load.reported:
            self._conclude_parts(transfer, load.target)

    def _conclude_parts(self, transfer: SenderSession, target: Target) -> None:
        load, in_parts = transfer.load, target.shape.in_parts
        for number, part in enumerate(load.parts):
            if in_parts and part.landed and not part.reported:
                part.reported = True
                digest = part.digest if target.choice is not None else None
                self._reports.append((transfer, PartWritten(number, digest)))
        if transfer.computed_at is None:
            return
        total_blocks = transfer.engine_blocks * self._layout.num_layers
        if load.handed_blocks != total_blocks:
            load.reported = True
            detail = f"{load.handed_blocks} of {total_blocks} blocks were handed over"
            self._reports.append((transfer, WriteFailed("incomplete", detail)))
        elif all(part.landed for part in load.parts) and (not in_parts or load.taken == len(load.parts)):
            load.reported = True
            wanted = target.choice is not None and not in_parts
            self._reports.append((transfer, Written(load.parts[0].digest if wanted else None)))
