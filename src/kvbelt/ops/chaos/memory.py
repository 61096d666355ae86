"""Resident memory of processes over their lives, and whether it grows without bound.

A worker touches its KV memory and buffers little by little, so that growth is looked for late in a life: between the
end of its first third and its end.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

#: A life shorter than this shows nothing.
_LEAST_SECONDS = 60.0

#: Growth in the last two thirds of a life that is still nobody's leak: fragmentation, caches that fill.
_ALLOWED_BYTES = 48 * MIB
_ALLOWED_SHARE = 0.15

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Growth:
    """One life of one process. Bytes of resident memory."""

    process: str
    pid: int
    seconds: float
    first: int
    settled: int  #: after a third of its life
    last: int

    @property
    def unbounded(self) -> bool:
        """Whether it has grown more than is explained."""
        allowed = max(_ALLOWED_BYTES, self.settled * _ALLOWED_SHARE)
        return self.seconds >= _LEAST_SECONDS and self.last - self.settled > allowed


#: Moments and bytes of one life.
Samples = Sequence[tuple[float, int]]


def growths(lives: Mapping[tuple[str, int], Samples]) -> list[Growth]:
    """Of every life, by process and pid, that was looked at more than once."""
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
    """Of a process, now; None: it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None
