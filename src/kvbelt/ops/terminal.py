"""What the launcher shows, on standard error: log lines prefixed with their process's name, and progress.

A terminal that has gone away must never stop the launcher from cleaning up, so a failed write ends the
showing and nothing else.
"""

import os
import sys
from collections.abc import Iterator
from typing import TextIO

_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
_RED = "31"
_BOLD = "1"

#: A process that writes no newline must not make the launcher hold its output for ever.
MAX_LINE_BYTES = 16_384


class LineSplitter:
    """Turns chunks of bytes into lines; a longer line than ``MAX_LINE_BYTES`` is handed on in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that ``chunk`` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield _text(line)
        while len(self._rest) > MAX_LINE_BYTES:
            yield _text(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]

    def close(self) -> Iterator[str]:
        """What is left without a newline."""
        if self._rest:
            yield _text(self._rest)
        self._rest = b""


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip("\r")


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR (no-color.org) or a dumb terminal says not to."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Console:
    """Writes prefixed lines to one stream (standard error unless told otherwise)."""

    def __init__(self, stream: TextIO | None = None, *, colour: bool | None = None, show_logs: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._colour = wants_colour(self._stream) if colour is None else colour
        self._show_logs = show_logs
        self._width = 2
        self._colours: dict[str, str] = {}
        self._gone = False

    def know(self, names: list[str]) -> None:
        """Align and colour for these processes."""
        self._width = max([self._width, *map(len, names)])
        for name in names:
            self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])

    def prefixed(self, name: str, line: str) -> str:
        """``line`` as it is shown."""
        return f"{self.paint(f'{name:<{self._width}} |', self._colours.get(name, _BOLD))} {line}"

    def paint(self, text: str, code: str) -> str:
        """``text`` in an ANSI colour, where colours are shown."""
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def log(self, name: str, line: str) -> None:
        """One line of a process."""
        if self._show_logs:
            self._write(self.prefixed(name, line))

    def say(self, line: str) -> None:
        """One line of the launcher itself."""
        self._write(self.prefixed("up", line))

    def alarm(self, line: str) -> None:
        """One line of the launcher about something that went wrong."""
        self._write(self.prefixed("up", self.paint(line, _RED)))

    def _write(self, line: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._gone = True
