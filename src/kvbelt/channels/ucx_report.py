"""What UCX has really chosen, from its own report.

UCX picks a transport for each pair of processes and kind of memory, silently, and falls back to TCP where nothing
better works. Asked by ``UCX_PROTO_INFO`` it says in its log what it has picked for each kind of operation, once, when
that is first used; nothing is said per message. The log goes to a file of this process's, which is read when somebody
asks.

A user who has set one of these variables keeps his setting, and the report is empty.
"""

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from kvbelt.channels.choice import Choice

#: The operations that move KV, ucp_put and ucp_get. NIXL's notifications are active messages: not asked for.
_OPERATIONS = "*ucp_??t*"

_MAX_BYTES = 1 << 20

_libc = ctypes.CDLL(None)

_TITLE = re.compile(r"\| (?:\S+ )?(self|intra-node|inter-node) cfg#\d+ +\|")
_WHAT = re.compile(r"\| remote memory (write|read) .*?(?:from|to|into) (host|cuda|rocm|ze)\b")
_RANGE = re.compile(r"\| +(\d+)(?:\.\.(\d+|inf))? +\| +([^|]*?) +\| +([^|]*?) +\|$")


class UcxReport:
    """Of this process: UCX has one log a process. ``ucx_report`` makes it."""

    def __init__(self) -> None:
        self._file: int | None = None  # for as long as the process lives
        with contextlib.suppress(OSError):
            self._file, name = tempfile.mkstemp(prefix="kvbelt-ucx-")
            # It has no name, so that nothing of it stays behind however this process ends.
            Path(name).unlink()

    @contextlib.contextmanager
    def asked_for(self) -> Iterator[None]:
        """While UCX is loaded, and while each agent is made: what they read from the environment."""
        if self._file is None or any(name in os.environ for name in ("UCX_LOG_FILE", "UCX_PROTO_INFO")):
            yield
            return
        asked = {"UCX_LOG_FILE": f"/proc/self/fd/{self._file}", "UCX_PROTO_INFO": _OPERATIONS}
        os.environ.update(asked)
        try:
            yield
        finally:
            for name in asked:  # children have files of their own
                os.environ.pop(name, None)

    def choices(self) -> tuple[Choice, ...]:
        """What has been chosen so far, for other processes. From any thread."""
        return tuple(dict.fromkeys(one for one in choices_in(self._text()) if one.scope != "self"))

    def complaints(self) -> list[str]:
        """UCX's warnings and errors, which would stand on standard output otherwise."""
        return [line for line in self._text().splitlines() if " WARN " in line or " ERROR " in line]

    def _text(self) -> str:
        if self._file is None:
            return ""
        _libc.fflush(None)  # UCX writes through C's buffers, and what it says is often less than one
        return os.pread(self._file, _MAX_BYTES, 0).decode(errors="replace")


@cache
def ucx_report() -> UcxReport:
    """This process's."""
    return UcxReport()


def choices_in(text: str) -> Iterator[Choice]:
    """Each table of UCX's report, by its last line: the largest messages."""
    scope = memory = transport = ""
    operation: Literal["write", "read"] | None = None
    for line in text.splitlines():
        if "+---" in line and operation is not None and transport:
            yield Choice(scope, operation, memory, transport)
            operation, transport = None, ""
        elif title := _TITLE.search(line):
            scope, operation, transport = title[1], None, ""
        elif what := _WHAT.search(line):
            operation = "write" if what[1] == "write" else "read"
            memory = what[2]
        elif operation is not None and (found := _RANGE.search(line.rstrip())):
            transport = found[4]
