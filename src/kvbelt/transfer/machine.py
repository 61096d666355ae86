"""What the two session machines share: a transition table, and an error that tells a session's story."""

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Generic, TypeVar

StateT = TypeVar("StateT", bound=StrEnum)

#: State to event type to the states that may follow. What is not in it may not happen.
Table = Mapping[StateT, Mapping[type, frozenset[StateT]]]


class IllegalTransitionError(Exception):
    """An event that a session's state does not allow: a mistake of ours, never of a peer."""


class Machine(Generic[StateT]):
    """A state, and the events that led to it."""

    def __init__(self, name: str, table: Table[StateT], state: StateT) -> None:
        self.name = name
        self.state = state
        self._table = table
        self._story: deque[str] = deque(maxlen=32)

    def check(self, event: object) -> None:
        """Refuse an event that the table does not know in this state.

        Raises:
            IllegalTransitionError: with the story so far.
        """
        if type(event) not in self._table[self.state]:
            raise IllegalTransitionError(f"{self.name}: {event!r} in state {self.state}; {self.story()}")

    def move(self, event: object, state: StateT) -> None:
        """Go to ``state`` because of ``event``.

        Raises:
            IllegalTransitionError: the table does not lead there.
        """
        self.check(event)
        if state not in self._table[self.state][type(event)]:
            raise IllegalTransitionError(
                f"{self.name}: {event!r} may not lead from {self.state} to {state}; {self.story()}"
            )
        if state is not self.state:
            self._story.append(f"{self.state} -{type(event).__name__}-> {state}")
        self.state = state

    def story(self) -> str:
        """How it came to this state, oldest first."""
        return ", ".join(self._story) or "no transition yet"


def to(*states: Any) -> frozenset[Any]:
    """The states that may follow."""
    return frozenset(states)
