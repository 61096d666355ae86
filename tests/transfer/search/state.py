"""One state of the model of both machines: its parts, how it is copied, and how equal ones are known."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec

from kvbelt.transfer.receive import states as receiver_states
from kvbelt.transfer.receive.commands import Deliver
from kvbelt.transfer.receive.incoming import IncomingTransfers, ReceiveTimes
from kvbelt.transfer.receive.states import RECEIVER_TABLE, LeaseLapsed, ReminderDue
from kvbelt.transfer.receive.states import DeadlinePassed as ReceiverDeadline
from kvbelt.transfer.send import states as sender_states
from kvbelt.transfer.send.session import Outcome, SenderSession, SendTimes
from kvbelt.transfer.send.states import (
    SENDER_TABLE,
    DeadlinePassed,
    PeerSilent,
    SenderState,
    StopOverdue,
    Unanswered,
)
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.reservation import Verify
from tests.transfer.search.snapshots import Snapshots

CELL = 4096
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=CELL)
D = EngineId("d")
LEASE, BEAT, DEADLINE = 2.0, 0.25, 15.0

#: Words and figures for people, which no side acts on: in them alone messages do not differ.
_WORDS = {"reason": "", "detail": "", "position": 0, "retry_after_seconds": 0.0}


def plain(message: Any) -> Any:
    """A message without its words."""
    words = {name: value for name, value in _WORDS.items() if name in message.__struct_fields__}
    return msgspec.structs.replace(message, **words) if words else message


#: Which of the ends without success it was is told to people; neither side does anything else because of it.
_OVER = dict.fromkeys((*sender_states.FINAL, *receiver_states.FINAL), "over") | {SenderState.DONE: "done"}

SNAPSHOTS = Snapshots(shared=(SENDER_TABLE, RECEIVER_TABLE), alike=_OVER)


SENDERS_TIMERS = (PeerSilent, DeadlinePassed, StopOverdue, Unanswered)
RECEIVERS_TIMERS = (LeaseLapsed, ReceiverDeadline, ReminderDue)
ALL_TIMERS = (*SENDERS_TIMERS, *RECEIVERS_TIMERS)
#: All that lead to different states: a deadline is an end like others.
SOME_TIMERS = (PeerSilent, StopOverdue, LeaseLapsed, ReminderDue)


@dataclass(frozen=True)
class Bounds:
    blocks: tuple[int, ...] = (2,)  #: of each transfer's prompt; each block is one write
    buffer: int = 2  #: blocks
    verify: Verify = "off"
    once: bool = False  #: a message arrives once, in any order: of a network that is well
    in_flight: int = 1  #: writes of one transfer at a time
    troubled: int = 2  #: so many of the transfers, the first ones, have any of the following trouble
    claimed: bool = False  #: readers have asked before anything else happens
    beats: bool = True  #: heartbeats are said
    timers: tuple[type, ...] = ALL_TIMERS  #: that go off, at any time, wherever the tables allow it
    cancels: bool = True  #: either side's client may go away
    stops: bool = True  #: a worker may be stopped, and wake up
    kills: bool = True
    faults: bool = True  #: a write may fail, or land nothing where digests are there to find it
    forgets: bool = True  #: a side forgets what is over, and hears of it again; the incoming once
    lands: bool = True  #: False: writes stay in flight until they are aborted


@functools.cache
def _without_trouble(bounds: Bounds) -> Bounds:
    return replace(bounds, timers=(), beats=False, cancels=False, stops=False, kills=False, faults=False, forgets=False)


@dataclass(slots=True)
class Side:
    """One transfer on its prefill worker: the session, and what its driver and its writes do."""

    session: SenderSession | None  #: None: forgotten
    life: str = "running"  #: of the process; or ``stopped``, ``dead``
    shape: SlotShape | None = None
    slot: SlotName | None = None
    base: int = 0  #: block of the buffer that the slot begins at
    posted: int = 0
    flying: list[int] = field(default_factory=list)
    landed: set[int] = field(default_factory=set)
    reported: int = 0  #: parts
    taken: int = 0
    told: int = 0  #: outcomes
    outcome: Outcome | None = None
    stopped_once: bool = False
    abandoned: bool = False


@dataclass(slots=True)
class Reader:
    """One transfer's reader on the decode worker."""

    asked: bool = False
    forgotten: bool = False  #: the incoming has forgotten the transfer once
    gone: bool = False
    told: int = 0
    delivery: Deliver | None = None
    ready: int = 0
    taken: int = 0
    finished: bool = False
    broken: bool = False
    released: bool = False


class State:
    """Of the model.

    States share what they have in common: a part is copied when it changes (``_own``), and its key is kept until then.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._owned: set[tuple[str, int]] = set()
        self._keys: dict[tuple[str, int], int] = {}
        times = ReceiveTimes(LEASE, BEAT, claim_seconds=60.0, memory_seconds=60.0)
        self.incoming = IncomingTransfers(D, LAYOUT, [bounds.buffer * CELL], times, bounds.verify)
        self.memory: dict[int, tuple[int, int]] = {}  #: block of the buffer: (transfer, block of the prompt)
        self.checks: set[tuple[int, int | None]] = set()
        self.to_incoming: set[wire.FromSender] = set()
        self.to_sides: set[tuple[int, wire.FromReceiver]] = set()
        self.sides = [Side(self._session(number)) for number in range(len(bounds.blocks))]
        self.readers = [Reader() for _ in bounds.blocks]
        self.now = 0.0

    def _bounds_of(self, number: int) -> Bounds:
        return self.bounds if number < self.bounds.troubled else _without_trouble(self.bounds)

    def _session(self, number: int) -> SenderSession:
        return SenderSession(
            TransferId(f"t{number}"),
            EngineId(f"p{number}"),
            D,
            self.bounds.blocks[number],
            LAYOUT,
            DEADLINE,
            SendTimes(BEAT, LEASE),
            0.0,
        )

    # As a model.

    def copy(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.memory, new.checks = self.memory.copy(), self.checks.copy()
        new.to_incoming, new.to_sides = self.to_incoming.copy(), self.to_sides.copy()
        new.sides, new.readers = self.sides.copy(), self.readers.copy()
        new._owned, new._keys = set(), self._keys.copy()
        # Also of the state that is copied: nothing of it may change any more.
        self._owned.clear()
        return new

    def _own(self, kind: str, number: int = 0) -> Any:
        """A part of this state that is about to change."""
        parts = self.__dict__ if kind == "incoming" else getattr(self, kind)
        where = kind if kind == "incoming" else number
        if (kind, number) not in self._owned:
            self._owned.add((kind, number))
            parts[where] = SNAPSHOTS.copy(parts[where])
        self._keys.pop((kind, number), None)
        return parts[where]

    def _key_of(self, kind: str, number: int = 0) -> int:
        known = self._keys.get((kind, number))
        if known is None:
            part = self.incoming if kind == "incoming" else getattr(self, kind)[number]
            known = self._keys[kind, number] = hash(SNAPSHOTS.key(part))
        return known

    def key(self) -> Hashable:
        return (self.without_network(), frozenset(self.to_incoming), frozenset(self.to_sides))

    def without_network(self) -> Hashable:
        """Equal for states that differ in what was said only."""
        return (
            self._key_of("incoming"),
            *(self._key_of("sides", number) for number in range(len(self.sides))),
            *(self._key_of("readers", number) for number in range(len(self.readers))),
            frozenset(self.memory.items()),
            frozenset(self.checks),
        )
