"""The sending side's bytes: the real pump and its staging memory, over all orders in which anything may happen.

Engines hand blocks over, slots are granted, copies and writes end, receivers take parts, all in any order. Some peers
take nothing at all. The question is whether these can keep the others from their end.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbelt.transfer.ports import Region
from kvbelt.transfer.send.load import Load, Target
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.transfer.send.plan import Run
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.send.states import BlocksFree, PartWritten, WriteFailed, WritesDrained, Written
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from tests.transfer.invariants import check_arena
from tests.transfer.search.snapshots import Snapshots

CELL = 4096
#: Slots of different transfers are far apart.
SLOT = 1 << 20

Action = tuple[Any, ...]

SNAPSHOTS = Snapshots()


@dataclass(frozen=True)
class Prompt:
    agent: str
    blocks: int
    part_blocks: int = 0  #: 0: in one piece


@dataclass(frozen=True)
class Bounds:
    prompts: tuple[Prompt, ...]
    staging: int  #: cells
    piece: int = 1  #: cells
    layers: int = 1
    silent: frozenset[str] = frozenset()  #: agents whose writes never land
    asynchronous: bool = False  #: gathers take time
    stops: bool = False  #: any transfer may be stopped, at any time
    at_once: bool = False  #: engines have handed everything over before anything else happens

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.layers, 1, 1, 1, "x", "x", CELL)


@dataclass(slots=True, eq=False)
class Write:
    channel: "Channel"
    agent: str
    spans: tuple[tuple[int, int, int], ...]
    ended: bool = False

    def done(self) -> bool:
        return self.ended

    def release(self) -> None:
        if self in self.channel.flying:
            self.channel.flying.remove(self)
        self.ended = True


class Channel:
    """``Channel``: writes land when the search says so."""

    name = "search"

    def __init__(self, staging: dict[int, Any], there: dict[int, Any]) -> None:
        self.staging = staging
        self.there = there
        self.flying: list[Write] = []

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> Write:
        write = Write(self, agent, tuple(spans))
        self.flying.append(write)
        return write

    def land(self, write: Write) -> None:
        """Copy what is in staging now to the receiver."""
        for local, remote, num_bytes in write.spans:
            for cell in range(num_bytes // CELL):
                self.there[remote // CELL + cell] = self.staging.get(local // CELL + cell)
        self.flying.remove(write)
        write.ended = True


@dataclass(slots=True, eq=False)
class Gather:
    """``Fence``."""

    ended: bool = False

    def done(self) -> bool:
        return self.ended


class Copy:
    """``PagedCopy``: a block's number says what is in it."""

    def __init__(self, staging: dict[int, Any], asynchronous: bool) -> None:
        self.staging = staging
        self.asynchronous = asynchronous
        self.under_way: list[tuple[Gather, int, tuple[Any, ...]]] = []

    def gather(self, layer: int, block_ids: Sequence[Any], offset: int, ready: Any) -> Gather:
        gather = Gather()
        self.under_way.append((gather, offset // CELL, tuple((layer, block) for block in block_ids)))
        if not self.asynchronous:
            self.end(0)
        return gather

    def end(self, index: int) -> None:
        gather, first, blocks = self.under_way.pop(index)
        for number, block in enumerate(blocks):
            self.staging[first + number] = block
        gather.ended = True


@dataclass(slots=True)
class Sending:
    """One transfer, and the observations of it."""

    transfer: SenderSession
    shape: SlotShape
    handed: int = 0  #: blocks of every layer
    parts_done: int = 0
    done: bool = False
    stopped: bool = False
    blocks_free: bool = False

    @property
    def load(self) -> Load:
        return self.transfer.load


class Staging:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.staging: dict[int, Any] = {}
        self.there: dict[int, Any] = {}
        self.channel = Channel(self.staging, self.there)
        self.copy_ = Copy(self.staging, bounds.asynchronous)
        region = Region(0, bounds.staging * CELL, "cpu")
        self.pipeline = WritePipeline(self.channel, self.copy_, region, bounds.layout, bounds.piece * CELL)
        self.sendings: list[Sending] = []
        for number, prompt in enumerate(bounds.prompts):
            names = TransferId(str(number)), EngineId("p"), EngineId(prompt.agent)
            transfer = SenderSession(*names, prompt.blocks, bounds.layout, 15.0, SendTimes(0.25, 2.0), 0.0)
            shape = SlotShape(bounds.layout, prompt.blocks, 0, prompt.part_blocks or prompt.blocks)
            self.sendings.append(Sending(transfer, shape))
            self.pipeline.add(transfer)
            while bounds.at_once and transfer.computed_at is None:
                self._hand(number)

    # As a model.

    def copy(self) -> "Staging":
        return SNAPSHOTS.copy(self)

    def key(self) -> Hashable:
        return SNAPSHOTS.key(self)

    def actions(self) -> Iterable[Action]:
        for number, sending in enumerate(self.sendings):
            load, prompt = sending.load, self.bounds.prompts[number]
            if sending.stopped:
                continue
            if sending.transfer.computed_at is None:
                yield "hand over", number
            if load.target is None:
                yield "grant", number
            if load.taken < sending.parts_done and prompt.agent not in self.bounds.silent:
                yield "taken", number
            if self.bounds.stops and not sending.done:
                yield "stop", number
        for index, write in enumerate(self.channel.flying):
            if write.agent not in self.bounds.silent:
                yield "land", index
        for index in range(len(self.copy_.under_way)):
            yield "gathered", index

    def do(self, action: Action) -> None:
        """Let it happen, move bytes, and check."""
        match action:
            case "hand over", number:
                self._hand(number)
            case "grant", number:
                sending, prompt = self.sendings[number], self.bounds.prompts[number]
                self.pipeline.begin(sending.transfer, Target(prompt.agent, "cpu", (number + 1) * SLOT, sending.shape))
            case "taken", number:
                self._take(number)
            case "stop", number:
                self.sendings[number].stopped = True
                self.pipeline.stop(self.sendings[number].transfer)
            case "land", index:
                self.channel.land(self.channel.flying[index])
            case "gathered", index:
                self.copy_.end(index)
            case _:
                raise ValueError(action)
        self._step()
        self._validate()

    def _hand(self, number: int) -> None:
        """Hand over the next block of every layer."""
        sending = self.sendings[number]
        block = sending.handed
        for layer in range(self.bounds.layers):
            self.pipeline.hand_over(sending.transfer, [Run(layer, block, ((number, block),))])
        sending.handed += 1
        if sending.handed == sending.shape.num_blocks:
            self.pipeline.computed(sending.transfer, 0.0)

    def _take(self, number: int) -> None:
        sending = self.sendings[number]
        self._compare(number, sending.load.taken)
        self.pipeline.parts_taken(sending.transfer, sending.load.taken + 1)

    def _step(self) -> None:
        for _ in range(1000):
            reports, more = self.pipeline.step(0.0)
            for transfer, report in reports:
                number = int(transfer.transfer_id)
                sending = self.sendings[number]
                match report:
                    case PartWritten(part=part):
                        sending.parts_done = max(sending.parts_done, part + 1)
                    case Written():
                        sending.done = True
                        if not sending.shape.in_parts:
                            self._compare(number, 0)
                    case BlocksFree():
                        assert not sending.blocks_free
                        sending.blocks_free = True
                    case WriteFailed():
                        raise AssertionError(report)
                    case WritesDrained():
                        assert sending.stopped
                        assert not self._flies(number), f"{report} of {number} while it writes"
            if not more:
                return
        raise AssertionError("the pump does not come to rest")

    def _flies(self, number: int) -> bool:
        slot = range((number + 1) * SLOT, (number + 2) * SLOT)
        return any(remote in slot for write in self.channel.flying for _, remote, _ in write.spans)

    def _compare(self, number: int, number_of_part: int) -> None:
        """What lies in the slot is what was handed over."""
        sending = self.sendings[number]
        part = sending.shape.part(number_of_part)
        for layer in range(self.bounds.layers):
            for block in range(part.first, part.first + part.num_blocks):
                cell = ((number + 1) * SLOT + sending.shape.offset_of(part, layer, block)) // CELL
                found = self.there.get(cell)
                assert found == (layer, (number, block)), f"{found} instead of block {block} of prompt {number}"

    def _validate(self) -> None:
        check_arena(self.pipeline._staging)
        # What was dropped, or never landed, uses no staging.
        used = sum(piece.num_blocks for transfer in self.pipeline._transfers.values() for piece in transfer.load.pieces)
        assert self.pipeline.staging_bytes_used == used * CELL

    def others_done(self) -> bool:
        """Every prompt for a receiver that takes it has arrived, or was stopped and holds nothing."""
        return all(
            sending.done or (sending.stopped and not sending.load.pieces)
            for sending, prompt in zip(self.sendings, self.bounds.prompts, strict=True)
            if prompt.agent not in self.bounds.silent
        )
