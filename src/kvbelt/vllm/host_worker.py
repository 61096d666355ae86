"""Mixed storage, the worker's half: copies blocks to host memory and back, on a thread of its own.

Rules:

1. Copies are done in the order of the calls. What ``host_store`` relies on rests on this alone.
2. A place whose copy has failed, or was given up, is *spoiled* until another copy into it succeeds: what is loaded from
   it is reported as not loaded, and vLLM computes it.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from kvbelt.vllm.orders import Keep, Restore

log = logging.getLogger(__name__)


class HostMemory(Protocol):
    """``host_memory.CpuHostMemory`` or ``CudaHostMemory``."""

    num_places: int

    def keep(self, block_ids: Sequence[int], places: Sequence[int], ready: Any) -> None:
        """Blocks to places."""

    def restore(self, block_ids: Sequence[int], places: Sequence[int]) -> None:
        """Places to blocks."""

    def close(self) -> None:
        """Free what is held."""


class HostWorker:
    """All copies of one worker process. The model runner's thread calls everything that is public."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-host")
        self._changed = threading.Condition()
        # All below: under _changed.
        self._keeping: dict[str, set[Keep]] = {}  # copies ordered and not done, by request; none is empty
        self._given_up: set[Keep] = set()  # of these: their blocks have been taken away
        self._spoiled: set[int] = set()
        self._newly_spoiled: set[int] = set()
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()

    @property
    def num_places(self) -> int:
        """Blocks that fit."""
        return self._memory.num_places

    def restore(self, order: Restore) -> None:
        """Fill the blocks, and report the request as loaded."""
        self._thread.submit(self._restore, order)

    def keep(self, order: Keep, mark: Any) -> None:
        """Copy the blocks once the device has passed the mark."""
        with self._changed:
            self._keeping.setdefault(order.request_id, set()).add(order)
        self._thread.submit(self._keep, order, mark)

    def reads(self, request_id: str) -> bool:
        """Whether this request's blocks are still to be read."""
        with self._changed:
            return request_id in self._keeping

    def give_up(self, request_id: str, seconds: float) -> bool:
        """Its blocks are being taken away: wait until they are read no more. False: they still are after so long."""
        with self._changed:
            if self._changed.wait_for(lambda: request_id not in self._keeping, seconds):
                return True
            self._given_up |= self._keeping[request_id]
            return False

    def take_loaded(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and those of their blocks that were not filled."""
        with self._changed:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad_blocks = self._bad_blocks, set()
        return loaded, bad

    def take_spoiled(self) -> frozenset[int]:
        """Places that have been spoiled since the last call."""
        with self._changed:
            spoiled, self._newly_spoiled = frozenset(self._newly_spoiled), set()
        return spoiled

    def close(self) -> None:
        """End the thread; copies under way are completed."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._memory.close()

    # The thread.

    def _keep(self, order: Keep, mark: Any) -> None:
        whole = False
        try:
            self._memory.keep(order.block_ids, order.places, mark)
            whole = True
        except Exception:
            # A device that fails fails vLLM too; a block that is not kept is only computed again.
            log.exception("request %s: its blocks could not be copied to host memory", order.request_id)
        with self._changed:
            if whole and order not in self._given_up:
                self._spoiled.difference_update(order.places)
            else:
                self._spoiled.update(order.places)
                self._newly_spoiled.update(order.places)
            self._given_up.discard(order)
            keeping = self._keeping[order.request_id]
            keeping.remove(order)
            if not keeping:
                del self._keeping[order.request_id]
            self._changed.notify_all()

    def _restore(self, order: Restore) -> None:
        with self._changed:
            bad = {block for block, place in zip(order.block_ids, order.places, strict=True) if place in self._spoiled}
        try:
            self._memory.restore(order.block_ids, order.places)
        except Exception:
            log.exception("request %s: its blocks could not be loaded from host memory", order.request_id)
            bad = set(order.block_ids)
        with self._changed:
            self._loaded.add(order.request_id)
            self._bad_blocks |= bad
