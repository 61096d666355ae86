"""Loads incoming KV on threads beside the engine's.

Rules:

1. A load is a user of the blocks that it fills. If its request ends first, the blocks are not given away.
2. ``incoming.release`` is called once: when the load has ended, or earlier if the request has ended.
3. Every end is posted to the engine's thread. There is no polling; without loads the threads sleep.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvbelt.engine.api import IncomingKVLostError
from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.scheduler import Load

_log = logging.getLogger("kvbelt.engine")

#: Loads at a time; the others queue. KV that comes in parts may take seconds, so one is not enough.
LOADERS = 4


@dataclass(slots=True, eq=False)
class LoadUnderWay:
    """One load, from the plan that starts it until the engine's thread has processed its end."""

    load: Load
    began: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False

    @property
    def request_id(self) -> str:
        return self.load.sequence.request.request_id

    def run(self, ready: Any) -> str | None:
        """Loader's thread: load after ``ready``, then release. Returns why the KV is lost; None: it is not."""
        if self._released:
            return "aborted"
        try:
            if ready is not None:
                ready.synchronize()
            self.load.incoming.load(self.load.block_ids, self.load.first)
        except IncomingKVLostError as error:
            _log.warning("request %s: incoming KV is lost (%s); computing it", self.request_id, error)
            return error.reason
        except Exception:  # noqa: BLE001 - incoming KV is not the engine's code
            _log.exception("request %s: incoming KV could not be loaded; computing it", self.request_id)
            return "copy_failed"
        finally:
            self.release()
        return None

    def release(self) -> None:
        """Any thread: rule 2."""
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            self.load.incoming.release()
        except Exception:  # noqa: BLE001 - incoming KV is not the engine's code
            _log.exception("request %s: incoming KV could not be released", self.request_id)


class Loaders:
    """The loads under way. Belongs to the engine's thread, on which ``post`` runs a command, soon.

    ``on_end`` is called on it with a load that has ended, its seconds, and why its KV is lost (None: it is not).
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        clock: Callable[[], float],
        post: Callable[[Callable[[], None]], None],
        on_end: Callable[[Load, float, str | None], None],
    ) -> None:
        self._allocator = allocator
        self._clock = clock
        self._post = post
        self._on_end = on_end
        self._under_way: dict[int, LoadUnderWay] = {}  # by arrival of the request
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="kvbelt-load")
        # Releasing may wait for a copy under way, but must not wait in the queue of loads.
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-release")

    def start(self, load: Load, ready: Any) -> None:
        """Load after ``ready`` (None, or a CUDA event after which no step writes these blocks)."""
        under_way = LoadUnderWay(load, self._clock())
        self._allocator.share(load.block_ids)
        self._under_way[load.sequence.arrival] = under_way
        self._threads.submit(self._run, under_way, ready)

    def cancel(self, arrival: int) -> None:
        """The request has ended, so its load, if there is one, may end early."""
        under_way = self._under_way.get(arrival)
        if under_way is not None:
            self._releaser.submit(under_way.release)

    def block_ids(self) -> list[tuple[int, ...]]:
        return [under_way.load.block_ids for under_way in self._under_way.values()]

    def close(self) -> None:
        """Cancel all loads and wait for their ends. Their posts are still to be run."""
        for arrival in self._under_way:
            self.cancel(arrival)
        self._releaser.shutdown()
        self._threads.shutdown()

    def _run(self, under_way: LoadUnderWay, ready: Any) -> None:
        lost = under_way.run(ready)
        self._post(partial(self._ended, under_way, self._clock() - under_way.began, lost))

    def _ended(self, under_way: LoadUnderWay, seconds: float, lost: str | None) -> None:
        del self._under_way[under_way.load.sequence.arrival]
        self._allocator.release(under_way.load.block_ids)
        self._on_end(under_way.load, seconds, lost)
