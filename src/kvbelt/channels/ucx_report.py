"""The transports that UCX has chosen, from its own report.

UCX silently picks a transport for each pair of processes and kind of memory, and falls back to TCP where nothing better
works. With ``UCX_PROTO_INFO`` it logs its choice for each kind of operation, at the first use and not per message. Each
process has its own log file, which is read on demand.

If the user has set one of these variables, the setting stays, and the report is empty.
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

#: The operations that move KV: ucp_put and ucp_get. NIXL's notifications are active messages, and are left out.
_OPERATIONS = "*ucp_??t*"

_MAX_BYTES = 1 << 20

_libc = ctypes.CDLL(None)

_TITLE = re.compile(r"\| (?:\S+ )?(self|intra-node|inter-node) cfg#\d+ +\|")
_WHAT = re.compile(r"\| remote memory (write|read) .*?(?:from|to|into) (host|cuda|rocm|ze)\b")
_RANGE = re.compile(r"\| +(\d+)(?:\.\.(\d+|inf))? +\| +([^|]*?) +\| +([^|]*?) +\|$")


class UcxReport:
    """This process's log: UCX has one a process. ``ucx_report`` creates it."""

    def __init__(self) -> None:
        self._file: int | None = None  # never closed
        with contextlib.suppress(OSError):
            self._file, name = tempfile.mkstemp(prefix="kvbelt-ucx-")
            # Without a name, the file disappears with the process.
            Path(name).unlink()

    @contextlib.contextmanager
    def requested(self) -> Iterator[None]:
        """Set the environment that UCX reads when it is loaded, and when an agent is created."""
        if self._file is None or any(name in os.environ for name in ("UCX_LOG_FILE", "UCX_PROTO_INFO")):
            yield
            return
        asked = {"UCX_LOG_FILE": f"/proc/self/fd/{self._file}", "UCX_PROTO_INFO": _OPERATIONS}
        os.environ.update(asked)
        try:
            yield
        finally:
            for name in asked:  # child processes have their own files
                os.environ.pop(name, None)

    def choices(self) -> tuple[Choice, ...]:
        """Any thread: the choices so far, for connections to other processes."""
        return tuple(dict.fromkeys(one for one in choices_in(self._text()) if one.scope != "self"))

    def complaints(self) -> list[str]:
        """UCX's warnings and errors, which it would otherwise print to standard output."""
        return [line for line in self._text().splitlines() if " WARN " in line or " ERROR " in line]

    def _text(self) -> str:
        if self._file is None:
            return ""
        _libc.fflush(None)  # UCX writes through C's buffers, and often less than one
        return os.pread(self._file, _MAX_BYTES, 0).decode(errors="replace")


@cache
def ucx_report() -> UcxReport:
    return UcxReport()


def choices_in(text: str) -> Iterator[Choice]:
    """The last line of each table in UCX's report, which is for the largest messages."""
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
