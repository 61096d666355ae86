"""Both session machines and the incoming, and between them a network that forgets nothing.

Whatever was said once may arrive at any time, any number of times, or never: so a state need not remember what was
lost or delivered, and all loss, repetition, reordering and delay is in it, without a budget. Timers may go off
whenever the table allows them to: all clocks are in it, the wrong ones too. What is bounded is how many transfers there
are, their size, and how often a client changes its mind or a process is stopped or killed (once).

The bytes of a slot are modelled as the last writer of each block.
"""

from collections.abc import Iterable
from typing import Any

from kvbelt.transfer.receive.commands import Answer, Break, Check, Deliver, Finish, Lose, PartReady
from kvbelt.transfer.receive.states import RECEIVER_TABLE, CancelRead, PartTaken, ReceiverState, Release, Verified
from kvbelt.transfer.send.session import AbortWrites, BeginWriting, ContinueWriting, Outcome, Send
from kvbelt.transfer.send.states import (
    SENDER_TABLE,
    Abort,
    BeatDue,
    PartWritten,
    PeerReady,
    SenderState,
    WriteFailed,
    WritesDrained,
    Written,
)
from kvbelt.transfer.shape import PLACES, SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, TransferId
from tests.transfer.invariants import check_incoming
from tests.transfer.search.state import CELL, DEADLINE, LAYOUT, Bounds, Reader, Side, State, plain

Action = tuple[Any, ...]


class Belts(State):
    """A state, and the actions that are possible in it."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        if bounds.claimed:
            for number in range(len(bounds.blocks)):
                self.do(("claim", number))

    def actions(self) -> Iterable[Action]:
        for message in self.to_incoming:
            yield "incoming hears", message
        for number, message in self.to_sides:
            if self.sides[number].life == "running":
                yield "sender hears", number, message
        for number in range(len(self.sides)):
            yield from self._sender_actions(number)
            yield from self._reader_actions(number)
            yield from self._record_actions(number)
        for number, part in self.checks:
            yield "check", number, part

    def _sender_actions(self, number: int) -> Iterable[Action]:  # noqa: C901, PLR0912 -- one case an action
        bounds, side = self._bounds_of(number), self.sides[number]
        session = side.session
        if side.flying and bounds.lands:
            # Also a stopped process's write lands: a network card does not stop with it.
            for block in sorted(side.flying):
                yield "land", number, block
                if bounds.verify == "always" and bounds.faults:
                    yield "lands nothing", number, block
        if side.life == "stopped":
            yield "wake", number
        if side.life != "running":
            return
        if bounds.stops and not side.stopped_once and session is not None:
            yield "stop", number
        if bounds.kills and session is not None and session.state is not SenderState.HANDSHAKING:
            yield "kill", number
        if session is None:
            return
        if session.ended:
            if bounds.forgets and not side.flying:
                yield "sender forgets", number
            return
        if session.state is SenderState.HANDSHAKING:
            yield "begin", number
            return
        if self._may_post(side):
            yield "post", number
        if bounds.cancels and not side.abandoned:
            yield "abandon", number
        if bounds.faults and side.flying and session.state is SenderState.WRITING:
            yield "write fails", number
        if bounds.beats and session.state is SenderState.WRITING:
            yield "sender's", number, BeatDue
        for timer in bounds.timers:
            if timer in SENDER_TABLE[session.state]:
                yield "sender's", number, timer

    def _reader_actions(self, number: int) -> Iterable[Action]:
        bounds, reader = self._bounds_of(number), self.readers[number]
        if not reader.asked:
            yield "claim", number
        elif bounds.cancels and not reader.gone and not reader.told:
            yield "cancel_read", number
        if reader.delivery is not None and not reader.released:
            if reader.taken < reader.ready and not reader.broken:
                yield "read", number
            elif reader.finished or reader.broken:
                yield "release", number
            elif bounds.cancels:
                yield "let go", number

    def _record_actions(self, number: int) -> Iterable[Action]:
        bounds, reader = self._bounds_of(number), self.readers[number]
        record = self._record(number)
        if record is None:
            return
        if record.ended:
            if bounds.forgets and not reader.forgotten and number not in {check[0] for check in self.checks}:
                yield "incoming forgets", number
            return
        for timer in bounds.timers:
            if timer in RECEIVER_TABLE[record.state]:
                yield "receiver's", number, timer
        if self.sides[number].life == "dead" and record.state is ReceiverState.QUARANTINED:
            yield "seen dead", number

    def _record(self, number: int):
        return self.incoming._find(TransferId(f"t{number}"))

    @staticmethod
    def _number(transfer_id: TransferId) -> int:
        return int(transfer_id[1:])

    def do(self, action: Action) -> None:  # noqa: C901, PLR0912 -- one case an action
        """Let it happen, and check."""
        match action:
            case "incoming hears", message:
                if self.bounds.once:
                    self.to_incoming.discard(message)
                self._on_incoming(self._own("incoming").on_message(message, self.now))
            case "sender hears", number, message:
                if self.bounds.once:
                    self.to_sides.discard((number, message))
                self._hear(number, message)
            case "begin", number:
                self._handle(number, PeerReady())
            case "post", number:
                side = self._own("sides", number)
                side.flying.append(side.posted)
                side.posted += 1
            case "land", number, block:
                self._land(number, block, arrives=True)
            case "lands nothing", number, block:
                self._land(number, block, arrives=False)
            case "write fails", number:
                self._own("sides", number).flying.pop()
                self._handle(number, WriteFailed("write_failed", ""))
                self._report(number)
            case "abandon", number:
                self._own("sides", number).abandoned = True
                self._handle(number, Abort("aborted"))
                self._report(number)
            case "sender's", number, timer:
                self._handle(number, timer())
                self._report(number)
            case "stop", number:
                side = self._own("sides", number)
                side.life, side.stopped_once = "stopped", True
            case "wake", number:
                self._own("sides", number).life = "running"
                self._report(number)
            case "kill", number:
                self._kill(number)
            case "sender forgets", number:
                self._own("sides", number).session = None
            case "claim", number:
                self._own("readers", number).asked = True
                self._on_incoming(self._own("incoming").claim(TransferId(f"t{number}"), self.now + DEADLINE, self.now))
            case "cancel_read", number:
                self._own("readers", number).gone = True
                self._on_incoming(self._own("incoming").handle(TransferId(f"t{number}"), CancelRead(), self.now))
            case "read", number:
                self._read(number)
            case "release" | "let go", number:
                self._own("readers", number).released = True
                self._on_incoming(self._own("incoming").handle(TransferId(f"t{number}"), Release(), self.now))
            case "incoming forgets", number:
                self._own("readers", number).forgotten = True
                del self._own("incoming")._ended[TransferId(f"t{number}")]
            case "receiver's", number, timer:
                incoming, record = self._own("incoming"), self._record(number)
                self._on_incoming(incoming._done(record, record.handle(timer(), self.now), self.now))
            case "seen dead", number:
                self._on_incoming(self._own("incoming").sender_dead(EngineId(f"p{number}"), self.now))
            case "check", number, part:
                self._check(number, part)
            case _:
                raise ValueError(action)
        self.validate()

    # The decode worker.

    def _on_incoming(self, commands: list[Any]) -> None:
        for command in commands:
            match command:
                case Answer(sender=sender, message=message):
                    self.to_sides.add((int(sender[1:]), plain(message)))
                case Check(transfer_id=transfer_id, part=part):
                    self.checks.add((self._number(transfer_id), part))
                case Deliver(transfer_id=transfer_id, shape=shape):
                    reader = self._own("readers", self._number(transfer_id))
                    reader.told += 1
                    reader.delivery = command
                    if not shape.in_parts:
                        reader.ready, reader.finished = 1, True
                case PartReady(transfer_id=transfer_id, part=part):
                    reader = self._own("readers", self._number(transfer_id))
                    if not reader.released:
                        assert part == reader.ready
                        reader.ready += 1
                case Finish(transfer_id=transfer_id):
                    self._own("readers", self._number(transfer_id)).finished = True
                case Break(transfer_id=transfer_id):
                    self._own("readers", self._number(transfer_id)).broken = True
                case Lose(transfer_id=transfer_id):
                    self._own("readers", self._number(transfer_id)).told += 1
        held = {
            record.slot.offset // CELL + block
            for record in self.incoming._live.values()
            if record.slot is not None
            for block in range(record.slot.num_bytes // CELL)
        }
        # What lies in memory that was given back is no longer anybody's.
        self.memory = {block: content for block, content in self.memory.items() if block in held}

    def _check(self, number: int, part: int | None) -> None:
        self.checks.discard((number, part))
        record = self._record(number)
        right = False
        if record is not None and record.slot is not None:
            right = self._wrong(number, record.slot.offset // CELL, record.shape, part or 0) is None
        self._on_incoming(self._own("incoming").handle(TransferId(f"t{number}"), Verified(part, right), self.now))

    def _wrong(self, number: int, base: int, shape: SlotShape, number_of_part: int) -> str | None:
        part = shape.part(number_of_part)
        for block in range(part.first, part.first + part.num_blocks):
            found = self.memory.get(base + shape.offset_of(part, 0, block) // CELL)
            if found != (number, block):
                return f"t{number} is read: {found} instead of block {block}"
        return None

    def _read(self, number: int) -> None:
        reader = self._own("readers", number)
        assert reader.delivery is not None
        reader.taken += 1
        if reader.delivery.shape.in_parts:
            self._on_incoming(self._own("incoming").handle(TransferId(f"t{number}"), PartTaken(), self.now))

    # The prefill workers.

    def _hear(self, number: int, message: wire.FromReceiver) -> None:
        side = self.sides[number]
        if side.session is None:
            # Rule 5 of wire/reservation.py, as SenderDriver has it.
            if isinstance(message, wire.Granted | wire.Expired | wire.Cancel):
                sender = EngineId(f"p{number}")
                self.to_incoming.add(wire.Cancelled(transfer_id=message.transfer_id, slot=message.slot, sender=sender))
            return
        self._handle(number, message)
        self._report(number)

    def _handle(self, number: int, event: Any) -> None:
        side = self._own("sides", number)
        assert side.session is not None
        for command in side.session.handle(event, self.now):
            self._perform(number, side, command)

    def _perform(self, number: int, side: Side, command: Any) -> None:
        match command:
            case Send(message=message):
                self.to_incoming.add(plain(message))
            case BeginWriting(granted):
                side.shape = SlotShape(LAYOUT, self.bounds.blocks[number], granted.first_block, granted.part_blocks)
                side.slot, side.base = granted.slot, granted.offset // CELL
            case ContinueWriting(taken):
                side.taken = max(side.taken, taken)
            case AbortWrites():
                side.flying.clear()
            case Outcome():
                side.told += 1
                side.outcome = command

    def _may_post(self, side: Side) -> bool:
        if side.shape is None or side.session is None or side.session.state is not SenderState.WRITING:
            return False
        if side.posted == side.shape.num_blocks or len(side.flying) >= self.bounds.in_flight:
            return False
        return side.shape.part_of(side.posted) < side.taken + self.credit

    #: Parts that are written before the first of them was taken.
    credit = PLACES

    def _land(self, number: int, block: int, *, arrives: bool) -> None:
        side = self._own("sides", number)
        assert side.shape is not None
        part = side.shape.part(side.shape.part_of(block))
        if arrives:
            self.memory[side.base + side.shape.offset_of(part, 0, block) // CELL] = (number, block)
        side.flying.remove(block)
        side.landed.add(block)
        self._report(number)

    def _report(self, number: int) -> None:
        """Report writes as WritePipeline reports them to a running driver."""
        side = self.sides[number]
        session, shape = side.session, side.shape
        if side.life != "running" or session is None or shape is None:
            return
        if session.state is SenderState.STOPPING and not side.flying:
            self._handle(number, WritesDrained())
            return
        if session.state is not SenderState.WRITING:
            return
        digest = 7 if self.bounds.verify != "off" else None
        side = self._own("sides", number)
        while shape.in_parts and side.reported < shape.num_parts:
            part = shape.part(side.reported)
            if not side.landed.issuperset(range(part.first, part.first + part.num_blocks)):
                return
            self._handle(number, PartWritten(side.reported, digest))
            side.reported += 1
        if len(side.landed) == shape.travelling and (not shape.in_parts or side.taken == shape.num_parts):
            self._handle(number, Written(None if shape.in_parts else digest))

    def _kill(self, number: int) -> None:
        side = self._own("sides", number)
        side.life, side.session = "dead", None
        side.flying.clear()

    # What must hold.

    def validate(self) -> None:
        check_incoming(self.incoming)
        for number, side in enumerate(self.sides):
            self._check_side(number, side)
        for number, reader in enumerate(self.readers):
            self._check_reader(number, reader)

    def _check_side(self, number: int, side: Side) -> None:
        assert side.told <= 1, f"t{number} has ended twice"
        session = side.session
        if session is not None:
            over = session.ended or session.state in (SenderState.STOPPING, SenderState.LEAVING)
            assert (side.told == 1) == over
            assert session.outcome is side.outcome, f"the outcome of t{number} has changed"
            if session.ended and session.outcome is not None:
                assert session.state is session.outcome.state
                assert not side.flying, f"t{number} is over on its side and still writes"
        if side.flying:
            record = self._record(number)
            assert record is not None, f"t{number} writes, and the incoming has forgotten it"
            assert record.slot is not None, f"t{number} writes, and its slot was freed: {record.story()}"
            assert record.slot.name == side.slot, f"t{number} writes into {side.slot}, and has {record.slot.name}"
        if side.outcome is not None and side.outcome.state is SenderState.DONE:
            record = self._record(number)
            if record is not None and record.reservation is not None and record._last_slot == side.slot:
                assert record._committed, f"t{number} is done for its sender, and was never visible"

    def _check_reader(self, number: int, reader: Reader) -> None:
        assert reader.told <= 1, f"the reader of t{number} was told {reader.told} times"
        if not reader.asked:
            assert not reader.told
        delivery = reader.delivery
        if delivery is None or reader.released or reader.broken:
            return
        record = self._record(number)
        for part in range(reader.taken, reader.ready):
            wrong = self._wrong(number, delivery.slot.offset // CELL, delivery.shape, part)
            assert wrong is None, wrong
            assert record is not None
            assert record.slot == delivery.slot, f"t{number} is read, and its slot was freed"
            side = self.sides[number]
            for block in side.flying if side.shape is not None else ():
                assert (delivery.shape.part_of(block) - part) % PLACES, f"t{number} is read while it is written"

    def all_over(self) -> bool:
        """Nothing is open on either side, and nothing is held."""
        return (
            not self.incoming._live
            and not self.checks
            and all(side.session is None or side.session.ended for side in self.sides)
            and all(not side.flying for side in self.sides)
            and all(reader.told or not reader.asked for reader in self.readers)
            and all(reader.delivery is None or reader.released for reader in self.readers)
        )

    def all_delivered(self) -> bool:
        """Whether every prompt was read whole."""
        return self.all_over() and all(reader.finished and reader.released for reader in self.readers)

    # Time, for who wants to know what a state ends in.

    def tick(self) -> None:
        """Everybody who runs looks at the clock."""
        self._on_incoming(self._own("incoming").tick(self.now))
        for number in range(len(self.sides)):
            side = self._own("sides", number)
            if side.session is not None and side.life == "running":
                for command in side.session.tick(self.now):
                    self._perform(number, side, command)
                self._report(number)
        for engine in sorted(self.incoming.suspects()):
            if self.sides[int(engine[1:])].life == "dead":
                self._on_incoming(self._own("incoming").sender_dead(engine, self.now))
        self.validate()
