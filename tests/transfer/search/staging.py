"""The sending side's bytes: the real pump and its staging memory, over all orders in which anything may happen.

Engines hand blocks over, slots are granted, copies and writes end, receivers take parts: each when it likes. Some
peers take nothing at all. The question is whether those who do not can keep the others from their end.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbelt.transfer.plan import Run
from kvbelt.transfer.ports import Region
from kvbelt.transfer.pump import BlocksFree, Broken, Landed, Load, PartDone, Pump, Stopped, Target
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.ids import TransferId
from kvbelt.wire.layout import KVLayout
from tests.transfer.search.snapshots import Snapshots

CELL = 4096
#: Slots of different transfers are far apart.
SLOT = 1 << 20

Action = tuple[Any, ...]

SNAPSHOTS = Snapshots()


@dataclass(frozen=True)
class Prompt:
    """One transfer."""

    agent: str
    blocks: int
    part_blocks: int = 0  #: 0: in one piece


@dataclass(frozen=True)
class Bounds:
    """What is in a search."""

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
        """Of every process."""
        return KVLayout(self.layers, 1, 1, 1, "x", "x", CELL)


@dataclass(slots=True, eq=False)
class Write:
    """``WriteHandle``."""

    channel: "Channel"
    agent: str
    spans: tuple[tuple[int, int, int], ...]
    ended: bool = False

    def done(self) -> bool:
        """Whether it has landed."""
        return self.ended

    def release(self) -> None:
        """Abort it."""
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
        """Post one."""
        write = Write(self, agent, tuple(spans))
        self.flying.append(write)
        return write

    def land(self, write: Write) -> None:
        """What lies in staging now is what arrives."""
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
        """Whether it has ended."""
        return self.ended


class Copy:
    """``PagedCopy``: a block's number says what is in it."""

    def __init__(self, staging: dict[int, Any], asynchronous: bool) -> None:
        self.staging = staging
        self.asynchronous = asynchronous
        self.under_way: list[tuple[Gather, int, tuple[Any, ...]]] = []

    def gather(self, layer: int, block_ids: Sequence[Any], offset: int, ready: Any) -> Gather:
        """Begin one."""
        gather = Gather()
        self.under_way.append((gather, offset // CELL, tuple((layer, block) for block in block_ids)))
        if not self.asynchronous:
            self.end(0)
        return gather

    def end(self, index: int) -> None:
        """It is in place."""
        gather, first, blocks = self.under_way.pop(index)
        for number, block in enumerate(blocks):
            self.staging[first + number] = block
        gather.ended = True


@dataclass(slots=True)
class Sending:
    """One transfer, beside its load."""

    load: Load
    shape: SlotShape
    handed: int = 0  #: blocks of every layer
    parts_done: int = 0
    done: bool = False
    stopped: bool = False
    blocks_free: bool = False


class Staging:
    """One state."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.staging: dict[int, Any] = {}
        self.there: dict[int, Any] = {}
        self.channel = Channel(self.staging, self.there)
        self.copy_ = Copy(self.staging, bounds.asynchronous)
        region = Region(0, bounds.staging * CELL, "cpu")
        self.pump = Pump(self.channel, self.copy_, region, bounds.layout, bounds.piece * CELL)
        self.sendings: list[Sending] = []
        for number, prompt in enumerate(bounds.prompts):
            load = Load(TransferId(str(number)), prompt.blocks * bounds.layers)
            shape = SlotShape(bounds.layout, prompt.blocks, 0, prompt.part_blocks or prompt.blocks)
            self.sendings.append(Sending(load, shape))
            self.pump.add(load)
            while bounds.at_once and not load.computed:
                self._hand(number)

    # As a model.

    def copy(self) -> "Staging":
        """Another one in the same state."""
        return SNAPSHOTS.copy(self)

    def key(self) -> Hashable:
        """Equal for equal states."""
        return SNAPSHOTS.key(self)

    def actions(self) -> Iterable[Action]:
        """What may happen."""
        for number, sending in enumerate(self.sendings):
            load, prompt = sending.load, self.bounds.prompts[number]
            if sending.stopped:
                continue
            if not load.computed:
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
                self.pump.begin(sending.load, Target(prompt.agent, "cpu", (number + 1) * SLOT, sending.shape))
            case "taken", number:
                self._take(number)
            case "stop", number:
                self.sendings[number].stopped = True
                self.pump.stop(self.sendings[number].load)
            case "land", index:
                self.channel.land(self.channel.flying[index])
            case "gathered", index:
                self.copy_.end(index)
            case _:
                raise ValueError(action)
        self._step()
        self._validate()

    def _hand(self, number: int) -> None:
        """The next block, of every layer."""
        sending = self.sendings[number]
        block = sending.handed
        for layer in range(self.bounds.layers):
            self.pump.hand_over(sending.load, [Run(layer, block, ((number, block),))])
        sending.handed += 1
        if sending.handed == sending.shape.num_blocks:
            sending.load.computed = True

    def _take(self, number: int) -> None:
        sending = self.sendings[number]
        self._compare(number, sending.load.taken)
        self.pump.go_on(sending.load, sending.load.taken + 1)

    def _step(self) -> None:
        for _ in range(1000):
            reports, more = self.pump.step(0.0)
            for report in reports:
                sending = self.sendings[int(report.transfer_id)]
                match report:
                    case PartDone(part=part):
                        sending.parts_done = max(sending.parts_done, part + 1)
                    case Landed():
                        sending.done = True
                        if not sending.shape.in_parts:
                            self._compare(int(report.transfer_id), 0)
                    case BlocksFree():
                        assert not sending.blocks_free
                        sending.blocks_free = True
                    case Broken():
                        raise AssertionError(report)
                    case Stopped():
                        assert sending.stopped
                        assert not self._flies(int(report.transfer_id)), f"{report} while it writes"
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
        self.pump._staging.validate()
        # What was dropped, or never landed, uses no staging.
        used = sum(piece.num_blocks for load in self.pump._loads.values() for piece in load.pieces)
        assert self.pump.staging_bytes_used == used * CELL

    def others_done(self) -> bool:
        """Every prompt for somebody who takes it has arrived, or was stopped and holds nothing."""
        return all(
            sending.done or (sending.stopped and not sending.load.pieces)
            for sending, prompt in zip(self.sendings, self.bounds.prompts, strict=True)
            if prompt.agent not in self.bounds.silent
        )
