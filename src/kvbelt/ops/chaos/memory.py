"""Whether the resident memory of processes grows without bound.

A worker touches its KV memory and buffers gradually, so growth is measured from the end of the first third of a
process's lifetime to its end.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

#: A shorter lifetime shows nothing.
_LEAST_SECONDS = 60.0

#: Growth in the last two thirds that is not counted as a leak: fragmentation, caches that fill.
_ALLOWED_BYTES = 48 * MIB
_ALLOWED_SHARE = 0.15

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident bytes over the lifetime of one process."""

    process: str
    pid: int
    seconds: float
    first: int
    settled: int  #: after a third of the lifetime
    last: int

    @property
    def unbounded(self) -> bool:
        """Whether it grew more than is allowed."""
        allowed = max(_ALLOWED_BYTES, self.settled * _ALLOWED_SHARE)
        return self.seconds >= _LEAST_SECONDS and self.last - self.settled > allowed


#: Moments and bytes of one process.
Samples = Sequence[tuple[float, int]]


def growths(lives: Mapping[tuple[str, int], Samples]) -> list[Growth]:
    """Growth of every process, by name and pid, that has at least two samples."""
    found = []
    for (process, pid), samples in lives.items():
        if len(samples) < 2:
            continue
        (began, first), (ended, last) = samples[0], samples[-1]
        third = began + (ended - began) / 3
        settled = next(size for moment, size in samples if moment >= third)
        found.append(Growth(process, pid, ended - began, first, settled, last))
    return found


def resident_bytes(pid: int) -> int | None:
    """Of a process, now; None if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None
