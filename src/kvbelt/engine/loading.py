"""Loads of incoming KV, on threads of their own beside the engine's.

Rules:

1. A load uses the blocks that it fills: whoever they were for may end before it does, and they are not given away.
2. ``incoming.release`` is called once: when the load has ended, or before that because nobody wants it any more.
3. The engine is told of every end, on its own thread. Nobody polls; without loads the threads sleep.
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

#: Loads at a time; the others wait for their turn. One that comes in parts may take seconds, so there are some.
LOADERS = 4


@dataclass(slots=True, eq=False)
class LoadUnderWay:
    """One load, from the plan that orders it to the engine's hearing of its end."""

    load: Load
    began: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False

    @property
    def name(self) -> str:
        """The request's."""
        return self.load.sequence.request.request_id

    def run(self, ready: Any) -> str | None:
        """Load after ``ready``, then release. Returns why it is lost. Loader's thread."""
        if self._released:
            return "aborted"
        try:
            if ready is not None:
                ready.synchronize()
            self.load.incoming.load(self.load.block_ids, self.load.first)
        except IncomingKVLostError as error:
            _log.warning("request %s: incoming KV is lost (%s); computing it", self.name, error)
            return error.reason
        except Exception:  # noqa: BLE001 - somebody else's code
            _log.exception("request %s: incoming KV could not be loaded; computing it", self.name)
            return "copy_failed"
        finally:
            self.release()
        return None

    def release(self) -> None:
        """Rule 2. Any thread."""
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            self.load.incoming.release()
        except Exception:  # noqa: BLE001 - somebody else's code
            _log.exception("request %s: incoming KV could not be released", self.name)


class Loaders:
    """The loads under way. Methods are the engine's thread's.

    Args:
        allocator: whose blocks are filled.
        clock: seconds.
        post: runs something on the engine's thread, soon.
        on_end: told on the engine's thread of each load that has ended, how long it took in seconds, and why it is
            lost (None: it is not).
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
        # Releasing may wait for a copy under way, and must not wait for somebody else's load.
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-release")

    def __len__(self) -> int:
        """Loads that have not ended."""
        return len(self._under_way)

    def start(self, load: Load, ready: Any) -> None:
        """Begin, after ``ready`` (None, or a CUDA event after which nobody writes these blocks)."""
        under_way = LoadUnderWay(load, self._clock())
        self._allocator.share(load.block_ids)
        self._under_way[load.sequence.arrival] = under_way
        self._threads.submit(self._run, under_way, ready)

    def cancel(self, arrival: int) -> None:
        """Nobody wants it any more, if it is under way at all: it may end early."""
        under_way = self._under_way.get(arrival)
        if under_way is not None:
            self._releaser.submit(under_way.release)

    def block_ids(self) -> list[tuple[int, ...]]:
        """What the loads under way use."""
        return [under_way.load.block_ids for under_way in self._under_way.values()]

    def close(self) -> None:
        """Cancel all and wait for their ends. What they post is still to be run."""
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
