"""Telling those who carry a prompt's KV away which of its blocks are final."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kvbelt.engine.live import Live
from kvbelt.engine.pool import PoolLayout
from kvbelt.engine.scheduler import Chunk

_log = logging.getLogger("kvbelt.engine")


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a step completes of one prompt: its blocks from ``first`` on."""

    live: Live
    first: int
    block_ids: tuple[int, ...]


def announcements(chunks: Iterable[tuple[Chunk, Live]], layout: PoolLayout) -> list[Announcement]:
    """Which prompt blocks a step completes, for those who carry them away.

    With a request's first chunk come the blocks before it, which were cached or loaded and are complete already.
    """
    news: list[Announcement] = []
    for chunk, live in chunks:
        sequence = live.sequence
        if sequence.request.outgoing is None or live.outgoing_broken:
            continue
        end = chunk.start + chunk.length
        whole = end // layout.block_size if end < sequence.prompt_len else layout.blocks(sequence.prompt_len)
        if whole > live.announced:
            news.append(Announcement(live, live.announced, tuple(sequence.block_ids[live.announced : whole])))
    return news


def tell(news: list[Announcement], layer: int, ready: object) -> None:
    """A layer was written. A carrier's failure is its own alone."""
    for piece in news:
        live = piece.live
        outgoing = live.request.outgoing
        if outgoing is None or live.outgoing_broken:
            continue
        try:
            outgoing.blocks_written(layer, piece.first, piece.block_ids, ready)
        except Exception:  # noqa: BLE001 - somebody else's code
            live.outgoing_broken = True
            _log.exception("request %s: outgoing KV failed in layer %d", live.request.request_id, layer)
