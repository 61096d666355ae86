"""Shows how processes start: one redrawn line each on a terminal, else a line for each change."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvbelt.ops.terminal import Terminal

#: Without a terminal: interval of lines while nothing changes.
_PLAIN_SECONDS = 5.0

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_SPINNER = "|/-\\"
_GREEN, _YELLOW = "32", "33"

#: A process's state in words.
_WORDS = {"loading": "loading the model", "waiting": "waiting for workers"}


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    state: str
    seconds: float  #: since the start; of a ready process: until it was ready
    spent: str = ""  #: of a ready process: what took this time

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def words(self) -> str:
        said, _, detail = self.state.partition(": ")
        return f"{_WORDS.get(said, said)}{f': {detail}' if detail else ''}"


class StartBoard:
    def __init__(self, names: Sequence[str], terminal: Terminal) -> None:
        self._names = names
        self._terminal = terminal
        self._rows: dict[str, Row] = {}
        self._began: dict[str, dict[str, float]] = {name: {} for name in names}  # each state of a process, in order
        self._shown_at = 0.0

    def show(self, states: Sequence[str], elapsed: float) -> None:
        """Show the state of each process, ``elapsed`` seconds after the start."""
        before = self._rows
        self._rows = {}
        waits = any(state != "ready" for state in states[:-1])
        for name, state in zip(self._names, states, strict=True):
            # While workers are not ready, a proxy's reasons repeat what their own lines say.
            short = "waiting" if waits and state.startswith("waiting") else state
            self._began[name].setdefault(short.partition(": ")[0], elapsed)
            row = Row(name, short, elapsed, self._spent(name) if state == "ready" else "")
            known = before.get(name)
            self._rows[name] = known if known is not None and known.ready and row.ready else row
        if self._terminal.redraws:
            self._terminal.redraw([self._line(row) for row in self._rows.values()])
            return
        for name, row in self._rows.items():
            if name not in before or before[name].state != row.state:
                spent = f" ({row.spent})" if row.spent else ""
                self._plain(f"{name} {row.words}{' after' if row.ready else ','} {row.seconds:.1f} s{spent}", elapsed)
        if elapsed - self._shown_at > _PLAIN_SECONDS:
            late = [f"{row.name} {row.words}" for row in self._rows.values() if not row.ready]
            self._plain(f"{elapsed:.0f} s: {', '.join(late)}", elapsed)

    def close(self) -> None:
        """Leave the last lines where they are."""
        self._terminal.stop_redrawing()

    def _spent(self, name: str) -> str:
        """The seconds of each state before it was ready; "" if there was at most one."""
        states = list(self._began[name].items())
        spans = pairwise(states)
        spent = [f"{_WORDS.get(state, state)} {end - begin:.1f} s" for (state, begin), (_, end) in spans]
        return ", ".join(spent) if len(spent) > 1 else ""

    def _plain(self, line: str, elapsed: float) -> None:
        self._terminal.info(line)
        self._shown_at = elapsed

    def _line(self, row: Row) -> str:
        paint, width = self._terminal.paint, max(map(len, self._names))
        if row.ready:
            mark = paint("✔" if self._terminal.unicode else "+", _GREEN)
        else:
            frames = _SPINNER if self._terminal.unicode else _PLAIN_SPINNER
            mark = paint(frames[int(row.seconds * 10) % len(frames)], _YELLOW)
        spent = f"  ({row.spent})" if row.spent else ""
        return f"{mark} {row.name:<{width}}  {row.words}  {row.seconds:.0f} s{spent}"
