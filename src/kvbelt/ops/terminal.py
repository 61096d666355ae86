"""The launcher's output on standard error: progress, and log lines prefixed with the process's name.

The launcher must clean up even if the terminal is gone, so a failed write only ends the output.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.live import Live

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


#: A log line that is shown although logs are not, once all is ready.
_SEVERE = re.compile(r"\[?\b(warning|error|critical)\b", re.IGNORECASE)
_HEAD = 48  #: where in a line its level stands


class Terminal:
    """Writes lines to one stream, by default standard error.

    Lines of processes, and all lines where the stream is no terminal, have the process's name before them.

    Args:
        stream: default: standard error.
        colour: default: as the stream wants it.
        show_logs: show what the processes log; else only warnings and errors once ``serving`` is set.
    """

    def __init__(self, stream: TextIO | None = None, *, colour: bool | None = None, show_logs: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._colour = wants_colour(self._stream) if colour is None else colour
        self._show_logs = show_logs
        self._names_width = 2
        self._colours: dict[str, str] = {}
        self._gone = False
        self._live: Live | None = None
        self.serving = False
        self.redraws = _can_redraw(self._stream)
        self.unicode = (getattr(self._stream, "encoding", None) or "utf-8").lower().startswith("utf")

    @property
    def width(self) -> int | None:
        """Columns; None: the stream is no terminal."""
        if not self.redraws:
            return None
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or None
        except (OSError, ValueError):
            return None

    def register(self, names: list[str]) -> None:
        """Align and colour the lines of these processes."""
        self._names_width = max([self._names_width, *map(len, names)])
        for name in names:
            self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])

    def prefixed(self, name: str, line: str) -> str:
        return f"{self.paint(f'{name:<{self._names_width}} |', self._colours.get(name, _BOLD))} {line}"

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def log(self, name: str, line: str) -> None:
        if self._show_logs or (self.serving and _SEVERE.search(line, 0, _HEAD)):
            self._write(self.prefixed(name, line))

    def say(self, line: str) -> None:
        """Write a line as it is."""
        self._write(line)

    def info(self, line: str) -> None:
        self._write(line if self.redraws else self.prefixed("up", line))

    def error(self, line: str) -> None:
        self.info(self.paint(line, _RED))

    def redraw(self, lines: Sequence[str]) -> None:
        """Show these lines in place of those of the last call. Only if the stream ``redraws``."""
        from rich.text import Text  # noqa: PLC0415 -- only a terminal pays for it

        shown = Text("\n").join(map(Text.from_ansi, lines))
        shown.no_wrap, shown.overflow = True, "ellipsis"

        def draw() -> None:
            if self._live is None:
                self._live = _live(self._stream)
                self._live.start()
            self._live.update(shown, refresh=True)

        self._until_gone(draw)

    def stop_redrawing(self) -> None:
        """Later lines come below the redrawn ones."""
        live, self._live = self._live, None
        if live is not None:
            self._until_gone(live.stop)

    def _write(self, line: str) -> None:
        if (live := self._live) is not None:
            from rich.text import Text  # noqa: PLC0415 -- as above

            self._until_gone(lambda: live.console.print(Text.from_ansi(line), soft_wrap=True))
        else:
            self._until_gone(lambda: print(line, file=self._stream, flush=True))

    def _until_gone(self, write: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            write()
        except (OSError, ValueError):
            self._gone = True


def _can_redraw(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    except ValueError:  # it is closed
        return False


def _live(stream: TextIO) -> "Live":
    from rich.console import Console  # noqa: PLC0415 -- only a terminal pays for it
    from rich.live import Live  # noqa: PLC0415 -- as above

    return Live(console=Console(file=stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
