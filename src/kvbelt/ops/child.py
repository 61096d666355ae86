"""One child process: its output is always drained, and its end is certain.

- It has its own session: Ctrl-C in the terminal reaches only the launcher, which then ends the children in order.
- The kernel kills it when the launcher dies (PR_SET_PDEATHSIG), even by kill -9.
- Its output is read continuously, so that it never blocks on a full pipe. The last lines are kept for error messages.
- To end it, its process group gets SIGTERM, and SIGKILL after a grace period.
- Its end is seen through a pidfd. The rest of its group is killed before it is reaped, because until then its pid
  cannot be reused. (asyncio's subprocesses wait, in some releases, for the pipes as well, which a descendant may hold
  open.)
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.ops.processes import ProcessSpec
from kvbelt.ops.terminal import LineSplitter

TAIL_LINES = 20

#: Seconds between SIGTERM and SIGKILL. All children must be gone 5 s after the launcher is told to end.
GRACE_SECONDS = 3.0

_CHUNK = 65_536
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here, because loading between fork and exec is unsafe


def _die_with(parent: int) -> Callable[[], None]:
    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # If the launcher died before the line above, no signal would ever come.
        if os.getppid() != parent:
            os._exit(1)

    return in_child


class Child:
    """A running process. Create it within a running event loop.

    The thread that creates it must outlive it: the kernel ties the child's life to that thread.

    Attributes:
        spec: what was started.
        tail: the last lines of its output.

    Raises:
        StartError: the program does not exist or cannot be run.
    """

    def __init__(self, spec: ProcessSpec, on_line: Callable[[str, str], None], *, log_dir: Path | None = None) -> None:
        self.spec = spec
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._on_line = on_line
        self._splitter = LineSplitter()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        try:
            self._process = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.env},
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 -- it makes two system calls and nothing else
            )
        except OSError as error:
            raise StartError(f"{spec.name}: cannot run {spec.argv[0]}: {error.strerror or error}") from None
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._log = (log_dir / f"{spec.name}.log").open("ab", buffering=0) if log_dir is not None else None
        self._pidfd = os.pidfd_open(self._process.pid)
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output.fileno(), self._on_output)
        self._loop.add_reader(self._pidfd, self._on_end)

    @property
    def pid(self) -> int:
        """The process id; kept after the end."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self._ended.result() if self._ended.done() else None

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """Wait for its end and return its exit status (negative: a signal)."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Send SIGTERM, and SIGKILL after ``grace`` seconds. Returns when the process and its group are gone."""
        if not self.running:
            return
        self._signal_group(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)  # a stopped process does not handle SIGTERM
        try:
            await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self._signal_group(signal.SIGKILL)
            await self.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _on_end(self) -> None:
        self._signal_group(signal.SIGKILL)  # descendants; the child itself is dead but not reaped
        status = self._process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        while self._on_output():  # the rest of the pipe
            pass
        self._close_output()
        self._ended.set_result(status)

    def _on_output(self) -> bool:
        # One chunk per call, so that a child that writes without end does not block the loop.
        if self._output.closed:
            return False
        try:
            chunk = os.read(self._output.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self._close_output()
            return False
        if self._log is not None:
            self._log.write(chunk)
        for line in self._splitter.feed(chunk):
            self._line(line)
        return True

    def _close_output(self) -> None:
        if self._output.closed:
            return
        self._loop.remove_reader(self._output.fileno())
        self._output.close()
        for line in self._splitter.close():
            self._line(line)
        if self._log is not None:
            self._log.close()

    def _line(self, line: str) -> None:
        self.tail.append(line)
        self._on_line(self.spec.name, line)


def describe_end(returncode: int) -> str:
    """An exit status in words: ``exit status 1``, ``killed by SIGKILL``."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
