"""Processes that stand still for a while."""

import contextlib
import os
import signal
from collections.abc import Iterator

from kvbelt.ops.deployment import RunningProcess


@contextlib.contextmanager
def stopped(process: RunningProcess) -> Iterator[None]:
    """A process that does nothing, and keeps its connections."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)
