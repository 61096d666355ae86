"""Breadth-first search over all interleavings, with state hashing."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Model(Protocol):
    """A state of a model, and the actions that are possible in it."""

    def actions(self) -> Iterable[tuple[Any, ...]]:
        """Names and arguments of the possible actions."""

    def do(self, action: tuple[Any, ...]) -> None:
        """Let it happen.

        Raises:
            AssertionError: an invariant does not hold.
        """

    def copy(self) -> "Model":
        """Another model in the same state."""

    def key(self) -> Hashable:
        """Equal for equal states."""


class Violation(AssertionError):  # noqa: N818 -- it is a finding
    """A state that breaks an invariant, and the shortest way to it."""

    def __init__(self, problem: BaseException, path: list[tuple[Any, ...]]) -> None:
        steps = "\n".join(f"  {number:2}. {' '.join(map(str, step))}" for number, step in enumerate(path, 1))
        super().__init__(f"{type(problem).__name__}: {problem}\nafter\n{steps}")
        self.problem = problem
        self.path = path


@dataclass
class Graph:
    """The states that were found, by number; 0 is the first. Edges are kept if they were asked for."""

    num_states: int = 0
    num_steps: int = 0
    goals: set[int] = field(default_factory=set)
    parents: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    edges: list[set[int]] = field(default_factory=list)  #: backwards: from where a state is reached in one step
    complete: bool = True  #: every reachable state was visited

    def path(self, state: int) -> list[tuple[Any, ...]]:
        """The shortest way to a state."""
        steps: list[tuple[Any, ...]] = []
        while state:
            state, action = self.parents[state]
            steps.append(action)
        return steps[::-1]

    def dead_ends(self) -> list[int]:
        """States from which no goal can be reached."""
        alive = set(self.goals)
        look = deque(alive)
        while look:
            for before in self.edges[look.popleft()] - alive:
                alive.add(before)
                look.append(before)
        return [state for state in range(self.num_states) if state not in alive]


def explore(
    first: Model,
    *,
    max_states: int,
    is_goal: Callable[[Any], bool] | None = None,
    at_each: Callable[[Any], None] | None = None,
    class_of: Callable[[Any], Hashable] | None = None,
) -> Graph:
    """Visit every state.

    Args:
        first: the first state.
        max_states: the search is incomplete beyond it.
        is_goal: edges are kept, and states of which it is true are goals.
        at_each: is called with one state of every class; it may not change it.
        class_of: what makes a class; default: every state is one.

    Raises:
        Violation: an invariant does not hold; the way there is a shortest one.
    """
    search = _Search(is_goal, at_each, class_of)
    search.visit(first, 0, ())
    while search.look:
        if search.graph.num_states >= max_states:
            search.graph.complete = False
            break
        search.expand(*search.look.popleft())
    return search.graph


class _Search:
    """The states that are known so far."""

    def __init__(
        self,
        is_goal: Callable[[Any], bool] | None,
        at_each: Callable[[Any], None] | None,
        class_of: Callable[[Any], Hashable] | None,
    ) -> None:
        self.graph = Graph()
        self.look: deque[tuple[int, Model]] = deque()
        self._is_goal = is_goal
        self._at_each = at_each
        self._class_of = class_of
        self._numbers: dict[int, int] = {}
        self._classes: set[int] = set()

    def expand(self, number: int, model: Model) -> None:
        """Perform every action that is possible in a state."""
        for action in list(model.actions()):
            after = model.copy()
            self.graph.num_steps += 1
            try:
                after.do(action)
            except Exception as problem:
                raise Violation(problem, [*self.graph.path(number), action]) from problem
            self.visit(after, number, action)

    def visit(self, model: Model, parent: int, action: tuple[Any, ...]) -> None:
        """Take up a state, which may be known already."""
        key = hash(model.key())
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self.graph.num_states
            self._take_in(model, number, parent, action)
            self._look_at(model, key, number)
            self.look.append((number, model))
        if self._is_goal is not None:
            self.graph.edges[number].add(parent)

    def _take_in(self, model: Model, number: int, parent: int, action: tuple[Any, ...]) -> None:
        self.graph.num_states += 1
        self.graph.parents.append((parent, action))
        if self._is_goal is not None:
            self.graph.edges.append(set())
            if self._is_goal(model):
                self.graph.goals.add(number)

    def _look_at(self, model: Model, key: int, number: int) -> None:
        if self._at_each is None:
            return
        kind = hash(self._class_of(model)) if self._class_of is not None else key
        if kind in self._classes:
            return
        self._classes.add(kind)
        try:
            self._at_each(model)
        except AssertionError as problem:
            raise Violation(problem, self.graph.path(number)) from problem
