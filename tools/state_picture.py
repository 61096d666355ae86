"""The belt's two transition tables as one picture, ``docs/transfer-states.svg``. No layout program is needed.

Each machine is a map of lanes. A state has a column and a row. An arrow leaves it along its row, to the lane of the
next state, and goes down that lane. The events are written where the arrow turns, coloured by their cause. An arrow
to the next row of the same column is straight; one that skips a row is an arc on the left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from typing import TypeVar, get_args

from kvbelt.transfer.machine import Table
from kvbelt.transfer.receive import states as receiver_states
from kvbelt.transfer.send import states as sender_states
from kvbelt.wire.reservation import FromReceiver, FromSender

StateT = TypeVar("StateT", bound=StrEnum)

#: State: column, row, and its meaning in a few words.
Places = Mapping[str, tuple[int, int, str]]

SENDER_PLACES: Places = {
    "handshaking": (0, 0, "not announced yet"),
    "reserving": (0, 1, "asked for a slot"),
    "waiting": (0, 2, "in the receiver's queue"),
    "writing": (0, 3, "the slot is ours"),
    "committing": (0, 4, "every byte has landed"),
    "stopping": (1, 5, "writes are in flight"),
    "leaving": (2, 6, "until the receiver knows"),
    "done": (0, 7, "the receiver has it"),
    "failed": (3, 7, "it could not be sent"),
    "cancelled": (4, 7, "one side gave it up"),
    "expired": (5, 7, "its time was over"),
}
RECEIVER_PLACES: Places = {
    "expected": (0, 0, "a consumer waits"),
    "queued": (0, 1, "a sender waits for a slot"),
    "reserved": (0, 2, "the slot is the sender's"),
    "streaming": (1, 3, "a consumer takes parts"),
    "taken": (1, 4, "a consumer has them all"),
    "verifying": (0, 5, "digests are compared"),
    "committed": (0, 6, "whole; no consumer yet"),
    "claimed": (0, 7, "a consumer has it"),
    "quarantined": (2, 8, "it may still be written"),
    "released": (1, 9, "it was read"),
    "cancelled": (3, 9, "one side gave it up"),
    "expired": (4, 9, "lost, or too late"),
}

CAUSES = {"peer": "a message of the peer", "own": "this side", "time": "time"}

COLUMN, BOX_WIDTH, BOX_HEIGHT = 164, 148, 40
LINE, PAD = 15, 5  # of the events in a chip
ROW_GAP, LEFT, TOP = 22, 140, 92
_CHARACTER = 6.9  # pixels, of the events' type


@dataclass(frozen=True)
class Edge:
    """All events that lead from one state to another."""

    before: str
    after: str
    events: tuple[tuple[str, str], ...]  #: (name, cause)


@dataclass(frozen=True)
class Side:
    """One machine."""

    title: str
    subtitle: str
    places: Places
    finals: frozenset[str]
    held: str  #: the state in which memory is kept because a write may be in flight
    edges: tuple[Edge, ...]


def sides() -> tuple[Side, Side]:
    s, r = sender_states, receiver_states
    return (
        Side(
            "The sending side",
            "one outgoing transfer on a prefill worker",
            SENDER_PLACES,
            frozenset(state.value for state in s.FINAL),
            s.SenderState.STOPPING.value,
            _edges(s.SENDER_TABLE, {"peer": FromReceiver, "own": s.Local, "time": s.Timed}),
        ),
        Side(
            "The receiving side",
            "one incoming transfer on a decode worker",
            RECEIVER_PLACES,
            frozenset(state.value for state in r.FINAL),
            r.ReceiverState.QUARANTINED.value,
            _edges(r.RECEIVER_TABLE, {"peer": FromSender, "own": r.Local, "time": r.Timed}),
        ),
    )


def _edges(table: Table[StateT], unions: Mapping[str, object]) -> tuple[Edge, ...]:
    cause_of = {event: cause for cause, union in unions.items() for event in get_args(union)}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for before, events in table.items():
        for event, cell in events.items():
            for after in sorted(cell.to):
                if after is not before:
                    found.setdefault((str(before), str(after)), []).append((event.__name__, cause_of[event]))
    order = list(CAUSES)
    return tuple(
        Edge(before, after, tuple(sorted(events, key=lambda event: order.index(event[1]))))
        for (before, after), events in found.items()
    )


def _height(edge: Edge) -> float:
    return len(edge.events) * LINE + 2 * PAD


class Map:
    """The layout of one side."""

    def __init__(self, side: Side, left: float) -> None:
        self.side = side
        self.left = left
        missing = {edge.before for edge in side.edges} | {edge.after for edge in side.edges}
        missing -= set(side.places)
        if missing:
            raise ValueError(f"no place in the picture for {sorted(missing)}; add them to tools/state_picture.py")
        columns = 1 + max(column for column, _, _ in side.places.values())
        self.width = LEFT + (columns - 1) * COLUMN + BOX_WIDTH + 34
        rows = 1 + max(row for _, row, _ in side.places.values())
        heights = [float(BOX_HEIGHT)] * rows
        for edge in side.edges:
            row = side.places[edge.before][1]
            if not self.is_straight(edge):
                heights[row] = max(heights[row], _height(edge))
        # Below a row there must be room for the events on an arrow down from it.
        gaps = [float(ROW_GAP)] * rows
        for edge in side.edges:
            if self.is_straight(edge):
                row = side.places[edge.before][1]
                gaps[row] = max(gaps[row], _height(edge) + 20 - (heights[row] - BOX_HEIGHT) / 2)
        self.middles: list[float] = []
        y = float(TOP)
        for height, gap in zip(heights, gaps, strict=True):
            self.middles.append(y + height / 2)
            y += height + gap
        self.height = y + 6

    def is_straight(self, edge: Edge) -> bool:
        """Whether both are in one column with no state between them."""
        (column, row, _), (other, below, _) = self.side.places[edge.before], self.side.places[edge.after]
        between = [at for at, number, _ in self.side.places.values() if at == column and row < number < below]
        return column == other and not between

    def lane(self, state: str) -> float:
        return self.left + LEFT + self.side.places[state][0] * COLUMN + BOX_WIDTH / 2

    def middle(self, state: str) -> float:
        return self.middles[self.side.places[state][1]]


def picture() -> str:
    sending, receiving = sides()
    one = Map(sending, 0)
    two = Map(receiving, one.width + 24)
    width, height = two.left + two.width, max(one.height, two.height) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"',
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>The states of a transfer, on its sending and on its receiving side</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}" rx="14"/>',
        *_drawn(one),
        *_drawn(two),
        *_legend(one.left + 34, height - 22),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


_STYLE = """
.page { fill: #ffffff }
.title { fill: #1b1f24; font-size: 19px; font-weight: 650 } .subtitle { fill: #656d76; font-size: 12.5px }
.line { fill: none; stroke: #b6bec8; stroke-width: 1.6 } .tip { fill: #8c96a1 }
.box { fill: #eef2f6; stroke: #6a7683; stroke-width: 1.3 }
.final { fill: #1b1f24; stroke: #1b1f24 } .held { fill: #fdebd8; stroke: #c07a35 }
.name { fill: #1b1f24; font-size: 14px; font-weight: 600; text-anchor: middle } .name.over { fill: #ffffff }
.caption { fill: #59636e; font-size: 10.5px; text-anchor: middle } .caption.over { fill: #c4ccd4 }
.chip { fill: #ffffff; stroke: #d5dbe1 } .event { font-size: 11.5px }
.peer { fill: #0b62d0 } .own { fill: #147a43 } .time { fill: #b8480c } .note { fill: #59636e; font-size: 12px }
@media (prefers-color-scheme: dark) {
.page { fill: #12161b }
.title { fill: #e8edf2 } .subtitle, .note { fill: #97a1ac }
.line { stroke: #46505b } .tip { fill: #7b8692 }
.box { fill: #1e252d; stroke: #7b8692 }
.final { fill: #e8edf2; stroke: #e8edf2 } .held { fill: #3a2a1a; stroke: #c98c4f }
.name { fill: #e8edf2 } .name.over { fill: #12161b } .caption { fill: #97a1ac } .caption.over { fill: #4b5560 }
.chip { fill: #171c22; stroke: #333c46 }
.peer { fill: #6cb0ff } .own { fill: #58cf8b } .time { fill: #ff9d5c }
}
"""


def _drawn(place: Map) -> Iterator[str]:
    side = place.side
    yield f'<g class="side" data-side="{escape(side.title)}">'
    yield f'<text class="title" x="{place.left + 34:.1f}" y="40">{escape(side.title)}</text>'
    yield f'<text class="subtitle" x="{place.left + 34:.1f}" y="60">{escape(side.subtitle)}</text>'
    # Lines first, so that chips and boxes lie over them.
    arcs = _arcs(place)
    for edge in side.edges:
        yield from _line(place, edge, arcs)
    for edge in side.edges:
        yield from _events(place, edge, arcs)
    for state in side.places:
        yield from _box(place, state)
    yield "</g>"


def _arcs(place: Map) -> dict[Edge, int]:
    """Arrows within a column that skip a row, each with its distance: the longest is the outermost."""
    skipping = [
        edge
        for edge in place.side.edges
        if place.side.places[edge.before][0] == place.side.places[edge.after][0] and not place.is_straight(edge)
    ]
    span = {edge: place.middle(edge.after) - place.middle(edge.before) for edge in skipping}
    return {edge: number for number, edge in enumerate(sorted(skipping, key=span.__getitem__))}


def _arc(place: Map, edge: Edge, arcs: Mapping[Edge, int]) -> float:
    return place.lane(edge.before) - BOX_WIDTH / 2 - 42 - arcs[edge] * 20


def _line(place: Map, edge: Edge, arcs: Mapping[Edge, int]) -> Iterator[str]:
    x, y = place.lane(edge.before), place.middle(edge.before)
    to_x, to_y = place.lane(edge.after), place.middle(edge.after)
    end = to_y - BOX_HEIGHT / 2
    if edge in arcs:
        out = _arc(place, edge, arcs)
        start, stop = y + 6, to_y - 6
        path = f"M{x - BOX_WIDTH / 2:.1f} {start:.1f}H{out + 8:.1f}Q{out:.1f} {start:.1f} {out:.1f} {start + 8:.1f}"
        path += f"V{stop - 8:.1f}Q{out:.1f} {stop:.1f} {out + 8:.1f} {stop:.1f}H{x - BOX_WIDTH / 2 - 7:.1f}"
        yield f'<path class="line" d="{path}"/>'
        tip = x - BOX_WIDTH / 2
        yield _tip([(tip - 8, stop - 4), (tip, stop), (tip - 8, stop + 4)])
        return
    bend = 10 if to_x > x else -10
    path = f"M{x:.1f} {y:.1f}V{end - 7:.1f}"
    if to_x != x:
        path = f"M{x:.1f} {y:.1f}H{to_x - bend:.1f}Q{to_x:.1f} {y:.1f} {to_x:.1f} {y + 10:.1f}V{end - 7:.1f}"
    yield f'<path class="line" d="{path}"/>'
    yield _tip([(to_x - 4, end - 8), (to_x, end), (to_x + 4, end - 8)])


def _tip(points: Sequence[tuple[float, float]]) -> str:
    return f'<path class="tip" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}z"/>'


def _events(place: Map, edge: Edge, arcs: Mapping[Edge, int]) -> Iterator[str]:
    width = max(len(name) for name, _ in edge.events) * _CHARACTER + 2 * PAD + 4
    height = _height(edge)
    x, y = place.lane(edge.after), place.middle(edge.before)
    if edge in arcs:
        x = _arc(place, edge, arcs)
        inner = [other for other in arcs if other.before == edge.before and arcs[other] < arcs[edge]]
        y += 38 + len(inner) * 32
    elif place.is_straight(edge):
        y += (BOX_HEIGHT + height) / 2 + 8
    causes = ", ".join(f"{name} ({CAUSES[cause]})" for name, cause in edge.events)
    yield f'<g class="edge" data-from="{edge.before}" data-to="{edge.after}">'
    yield f"<title>{edge.before} → {edge.after}: {escape(causes)}</title>"
    yield (
        f'<rect class="chip" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="6"/>'
    )
    for number, (name, cause) in enumerate(edge.events):
        line = y - height / 2 + PAD + (number + 0.76) * LINE
        yield f'<text class="event {cause}" x="{x - width / 2 + PAD + 2:.1f}" y="{line:.1f}">{name}</text>'
    yield "</g>"


def _box(place: Map, state: str) -> Iterator[str]:
    x, y, caption = place.lane(state), place.middle(state), place.side.places[state][2]
    final = state in place.side.finals
    over = " over" if final else ""
    kind = " final" if final else " held" if state == place.side.held else ""
    yield f'<g class="state" data-state="{state}" data-final="{str(final).lower()}">'
    yield (
        f'<rect class="box{kind}" x="{x - BOX_WIDTH / 2:.1f}" y="{y - BOX_HEIGHT / 2:.1f}" '
        f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="{20 if final else 8}"/>'
    )
    yield f'<text class="name{over}" x="{x:.1f}" y="{y - 1:.1f}">{state}</text>'
    yield f'<text class="caption{over}" x="{x:.1f}" y="{y + 13:.1f}">{escape(caption)}</text>'
    yield "</g>"


def _legend(x: float, y: float) -> Iterator[str]:
    texts: Sequence[tuple[str, str]] = [(f"event {cause}", f"● {meaning}") for cause, meaning in CAUSES.items()]
    note = "Filled: final. Orange: memory is kept, a write may be in flight. Events that keep the state are not drawn."
    for css, text in [*texts, ("note", note)]:
        yield f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
        x += len(text) * _CHARACTER + 26
