"""The CPU and the memory of the doctor's host, as its processes may use them."""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from kvbelt.ops.processes import cpu_cores

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class HostSeen:
    cores: int
    cpu_used: float  #: share of all CPU time, over the observation
    load: float  #: processes that run or wait to, the mean of the last minute
    memory_bytes: int
    memory_free: int  #: that processes can still get
    boot_id: str = ""


async def observe(seconds: float) -> HostSeen | None:
    """The use over some seconds; None where /proc does not say."""
    try:
        before = _cpu_times()
        await asyncio.sleep(seconds)
        idle, whole = (now - then for now, then in zip(_cpu_times(), before, strict=True))
        total, free = memory()
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        load = os.getloadavg()[0]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    return HostSeen(cpu_cores(), 1 - idle / whole if whole else 0.0, load, total, free, boot_id)


def _cpu_times() -> tuple[int, int]:
    """Ticks that all cores were idle, and all ticks."""
    first = (_PROC / "stat").read_text(encoding="ascii").splitlines()[0]
    ticks = [int(word) for word in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def memory() -> tuple[int, int]:
    """All bytes and those that are available: the machine's, or what is less, the control group's.

    Raises:
        OSError, ValueError, KeyError: /proc does not say.
    """
    lines = (line.split() for line in (_PROC / "meminfo").read_text(encoding="ascii").splitlines())
    said = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, free = said["MemTotal"], said["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # no limit is "max"
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = sum(int(words[1]) for words in stat if words[0] == "inactive_file")
        total, free = min(total, limit), min(free, limit - used + cached)
    return total, free
