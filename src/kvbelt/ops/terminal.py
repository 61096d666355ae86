"""The launcher's output on standard error: log lines prefixed with the process's name, and progress.

The launcher must clean up even if the terminal is gone, so a failed write only ends the output.
"""

import os
import sys
from collections.abc import Iterator
from typing import TextIO

_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
_RED = "31"
_BOLD = "1"

#: A process that never writes a newline must not make the launcher buffer its output without limit.
MAX_LINE_BYTES = 16_384


class LineSplitter:
    """Splits chunks of bytes into lines; lines over ``MAX_LINE_BYTES`` are passed on in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield _text(line)
        while len(self._rest) > MAX_LINE_BYTES:
            yield _text(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]

    def close(self) -> Iterator[str]:
        if self._rest:
            yield _text(self._rest)
        self._rest = b""


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip("\r")


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR (no-color.org) is set or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Terminal:
    """Writes prefixed lines to one stream, by default standard error."""

    def __init__(self, stream: TextIO | None = None, *, colour: bool | None = None, show_logs: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._colour = wants_colour(self._stream) if colour is None else colour
        self._show_logs = show_logs
        self._width = 2
        self._colours: dict[str, str] = {}
        self._gone = False

    def register(self, names: list[str]) -> None:
        """Align and colour the lines of these processes."""
        self._width = max([self._width, *map(len, names)])
        for name in names:
            self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])

    def prefixed(self, name: str, line: str) -> str:
        return f"{self.paint(f'{name:<{self._width}} |', self._colours.get(name, _BOLD))} {line}"

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def log(self, name: str, line: str) -> None:
        if self._show_logs:
            self._write(self.prefixed(name, line))

    def info(self, line: str) -> None:
        self._write(self.prefixed("up", line))

    def error(self, line: str) -> None:
        self._write(self.prefixed("up", self.paint(line, _RED)))

    def _write(self, line: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._gone = True
