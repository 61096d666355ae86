"""What to gather where, and what to write: data, computed without touching memory.

A run is what an engine hands over: consecutive blocks of one layer. A batch is what is gathered and
written in one go: parts of runs laid side by side in one piece of staging. Posting costs by the
descriptor, not by the byte, so neighbours on both sides are merged into one span.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvbelt.wire.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``first .. first + len(block_ids)`` of a prompt, in one layer, final after ``ready``."""

    layer: int
    first: int
    block_ids: Sequence[int]
    ready: Any = None


class Span(NamedTuple):
    """One descriptor: bytes here to bytes there."""

    local: int
    remote: int
    num_bytes: int


def take_batch(runs: deque[Run], max_blocks: int) -> list[Run]:
    """Take up to ``max_blocks`` blocks from the front, splitting the run that does not fit."""
    batch: list[Run] = []
    room = max_blocks
    while runs and room > 0:
        run = runs.popleft()
        if len(run.block_ids) > room:
            runs.appendleft(Run(run.layer, run.first + room, run.block_ids[room:], run.ready))
            run = Run(run.layer, run.first, run.block_ids[:room], run.ready)
        batch.append(run)
        room -= len(run.block_ids)
    return batch


def plan_writes(
    batch: Sequence[Run], layout: KVLayout, num_blocks: int, staging_address: int, slot_address: int
) -> list[Span]:
    """The fewest spans from a batch, staged contiguously at ``staging_address``, to a slot of ``num_blocks``."""
    spans: list[Span] = []
    local = staging_address
    for run in batch:
        remote = slot_address + (run.layer * num_blocks + run.first) * layout.block_bytes
        num_bytes = len(run.block_ids) * layout.block_bytes
        if spans and spans[-1].remote + spans[-1].num_bytes == remote:
            spans[-1] = Span(spans[-1].local, spans[-1].remote, spans[-1].num_bytes + num_bytes)
        else:
            spans.append(Span(local, remote, num_bytes))
        local += num_bytes
    return spans
