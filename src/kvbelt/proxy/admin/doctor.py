"""The doctor's first finding, for the console.

``kvbelt doctor`` asks this proxy and its workers from a process of its own, because the proxy must not wait for it. It
does so only while somebody looks.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import msgspec

from kvbelt.proxy.settings import ProxySettings
from kvbelt.wire.console import DoctorFinding

PERIOD = 30.0  #: seconds from the end of one look to the next one
LIMIT = 60.0  #: seconds that a look may take

#: How long it observes. No probes: a page that is open must send no requests of its own.
_HOW = ("--json", "--no-probe", "--seconds", "2")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


class _Finding(msgspec.Struct, frozen=True):
    severity: str
    what: str
    change: str


class _Report(msgspec.Struct, frozen=True):
    findings: list[_Finding]


class Doctor:
    """``port`` is the proxy's, once it listens."""

    def __init__(
        self, settings: ProxySettings, port: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._port, self._clock = settings, port, clock
        self._task: asyncio.Task[None] | None = None
        self._looked: float | None = None
        self._found: DoctorFinding | None = None

    def finding(self) -> DoctorFinding | None:
        """What the last look has found first; None: nothing, or there was none yet. May begin another look."""
        running = self._task is not None and not self._task.done()
        if not running and (self._looked is None or self._clock() - self._looked > PERIOD):
            self._task = asyncio.create_task(self._look(), name="doctor")
        return self._found

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        host = _EVERYWHERE.get(self._settings.host, self._settings.host)
        try:
            self._found = _first(await self._asked(f"http://{host}:{self._port()}"))
        except (OSError, TimeoutError, msgspec.DecodeError):
            self._found = None  # the alarms stay, which need no process
        finally:
            self._looked = self._clock()

    async def _asked(self, url: str) -> bytes:
        secrets = {
            "--admin-key-file": self._settings.admin_key,
            "--worker-api-key-file": self._settings.worker_api_key,
        }
        given = {option: key for option, key in secrets.items() if key is not None}
        with contextlib.ExitStack() as stack:
            files = {option: stack.enter_context(_in_memory(key)) for option, key in given.items()}
            words = [word for option, file in files.items() for word in (option, f"/dev/fd/{file}")]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "kvbelt", "doctor", "--url", url, *_HOW, *words,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                pass_fds=tuple(files.values()),
            )  # fmt: skip
        try:
            async with asyncio.timeout(LIMIT):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return said


def _first(said: bytes) -> DoctorFinding | None:
    """Causes come first in a report; a note is nothing wrong. Raises msgspec.DecodeError."""
    for one in msgspec.json.decode(said, type=_Report).findings:
        if one.severity != "note":
            return DoctorFinding("critical" if one.severity == "error" else "warning", one.what, one.change)
    return None


@contextlib.contextmanager
def _in_memory(secret: str) -> Iterator[int]:
    """A file that is on no disk and that only its owner can read."""
    file = os.memfd_create("kvbelt-key")
    try:
        os.fchmod(file, 0o600)
        os.write(file, secret.encode())
        yield file
    finally:
        os.close(file)
