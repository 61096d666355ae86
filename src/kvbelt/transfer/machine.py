"""What the two session machines share: a transition table that drives them, and the event history for errors."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")


@dataclass(frozen=True, slots=True)
class Cell(Generic[StateT]):
    """What follows one event in one state.

    Actions and choosers are methods of the machine, named so that the table can be read before the class is.
    """

    to: Mapping[StateT, str]  #: each state that may follow, and the action performed in it; empty: none
    choose: str = ""  #: where several may follow: the method that names one of them


Row = Mapping[type, Cell[StateT]]

#: State to event type to cell. An event without a cell must not happen.
Table = Mapping[StateT, Row[StateT]]


def go(state: StateT, action: str = "") -> Cell[StateT]:
    return Cell({state: action})


def either(choose: str, to: Mapping[StateT, str]) -> Cell[StateT]:
    return Cell(to, choose)


def ignoring(state: StateT, *events: type) -> Row[StateT]:
    return {event: go(state) for event in events}


class IllegalTransitionError(Exception):
    """An event that a session's state does not allow: a mistake of ours, never of a peer."""


class Machine(Generic[StateT, EventT, CommandT]):
    """A state, and the events that led to it. Time comes in with every event, in seconds of any monotonic clock."""

    table: ClassVar[Mapping[Any, Mapping[type, Cell[Any]]]]
    final: ClassVar[frozenset[Any]]

    def __init_subclass__(cls) -> None:
        """Refuse a table that names a method that is not there."""
        for cell in (cell for row in cls.table.values() for cell in row.values()):
            for method in filter(None, (cell.choose, *cell.to.values())):
                getattr(cls, method)

    def __init__(self, name: str, state: StateT, now: float = 0.0) -> None:
        self.name = name
        self.state = state
        self.was = state  #: the state before the latest event
        self.now = now  #: when the latest event came
        self._story: deque[str] = deque(maxlen=32)

    @property
    def ended(self) -> bool:
        return self.state in self.final

    def timers(self) -> Sequence[tuple[float, type[EventT]]]:
        """When which event comes by time alone, in this state. Of several that are due the first one comes."""
        raise NotImplementedError

    @property
    def due(self) -> float:
        return min([at for at, _ in self.timers()], default=float("inf"))

    def tick(self, now: float) -> list[CommandT]:
        commands: list[CommandT] = []
        while (event := next((event for at, event in self.timers() if at <= now), None)) is not None:
            commands += self.handle(event(), now)
        return commands

    def handle(self, event: EventT, now: float) -> list[CommandT]:
        """One event. Returns commands in the order in which they are to be performed.

        Raises:
            IllegalTransitionError: the table does not know the event in this state; with the story so far.
        """
        self.now = now
        cell = self.table[self.state].get(type(event))
        if cell is None:
            raise IllegalTransitionError(f"{self.name}: {event!r} in state {self.state}; {self.story()}")
        before = self.was = self.state
        if cell.choose:
            after = getattr(self, cell.choose)(event)
            if after not in cell.to:
                raise IllegalTransitionError(f"{self.name}: {event!r} may not lead from {before} to {after}")
        else:
            (after,) = cell.to
        if after is not before:
            self._story.append(f"{before} -{type(event).__name__}-> {after}")
            self.state = after
        action = cell.to[after]
        commands: list[CommandT] = getattr(self, action)(event) if action else []
        return commands

    def story(self) -> str:
        """How it came to this state, oldest first."""
        return ", ".join(self._story) or "no transition yet"
